// All heads by importance, with their standard errors.
function drawRanking(host) {
  const { units, layers, ...about } = DATA.ranking;
  host.append(el("p", { class: "quiet" },
    `By ${String(about.estimator).replaceAll("_", " ")} (${about.unit_of_scores}), objective ` +
    `${about.objective}, ${Number(about.tokens).toLocaleString("en-US")} tokens of ${about.data} in ${about.batches} batches; ` +
    "bars are one standard error over batches."));
  const frameHost = el("div", {
    class: "frame", tabindex: 0, role: "group", "aria-roledescription": "ranking",
    "aria-label": "Heads by importance. Arrow keys move along it.",
  });
  const switcher = el("select", { id: "unit" }, units.map((u, i) => el("option", { value: i }, u.unit)));
  if (units.length > 1) {
    host.append(el("div", { class: "controls" },
      el("div", null, el("label", { for: "unit" }, "of"), switcher)));
  }
  const listed = el("div", { class: "ends-list" });
  host.append(frameHost, listed);

  const ranked = () => {
    const unit = units[Number(switcher.value) || 0];
    const all = unit.scores.flatMap((row, l) => row.map((score, h) => ({
      layer: layers[l], head: h, score, error: unit.errors ? unit.errors[l][h] : null,
      unit: unit.unit === "KV groups" ? "group" : "head",
    })));
    return all.filter((h) => h.score !== null).sort((a, b) => b.score - a.score);
  };

  function draw(width) {
    const all = ranked();
    const ends = all.flatMap((h) => [h.score - (h.error || 0), h.score + (h.error || 0)]);
    const frame = plot({ width, height: 260 }, [0, all.length + 1], extent([0, ...ends]),
      { x: `rank of ${all.length}`, y: about.unit_of_scores }, { whole: true });
    const { root, x, y } = frame;
    root.append(svg("line", { class: "zero", x1: frame.box.left, x2: frame.box.right, y1: y(0), y2: y(0) }));
    all.forEach((h, i) => {
      if (h.error) {
        root.append(svg("line", {
          class: "error", x1: x(i + 1), x2: x(i + 1), y1: y(h.score - h.error), y2: y(h.score + h.error),
        }));
      }
      root.append(svg("circle", { class: "dot", cx: x(i + 1), cy: y(h.score), r: all.length > 200 ? 1.6 : 3 }));
    });
    frameHost.replaceChildren(root);
    crosshair(frameHost, frame, all.map((_, i) => x(i + 1)), (i) => [
      `layer ${all[i].layer}, ${all[i].unit} ${all[i].head}`,
      `${show(all[i].score)}${all[i].error === null ? "" : ` ± ${show(all[i].error, 2)}`}`,
      `rank ${i + 1} of ${all.length}`,
    ]);
    const line = (h) => `${h.layer}.${h.head}`;
    const few = Math.min(5, Math.floor(all.length / 2));
    listed.replaceChildren(el("p", null,
      el("span", null, el("b", null, "Most "), all.slice(0, few).map(line).join(", ")),
      el("span", null, el("b", null, "Least "), all.slice(-few).reverse().map(line).join(", ")),
      el("span", { class: "quiet" }, `layer.${all[0].unit}`)));
  }
  switcher.addEventListener("change", () => draw(frameHost.clientWidth));
  whenResized(frameHost, draw);
}
