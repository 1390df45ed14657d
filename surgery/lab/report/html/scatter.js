// Comparing runs: loss against size, and the curves of all.
function drawScatter(host) {
  const { runs, sizes } = DATA.scatter;
  const select = el("select", { id: "size" }, sizes.map((s, i) => el("option", { value: i }, s.label)));
  host.append(el("div", { class: "controls" },
    el("div", null, el("label", { for: "size" }, "loss against"), select)));
  const frameHost = el("div", { class: "frame" });
  host.append(frameHost);
  host.append(el("p", { class: "quiet" },
    "Labels are those of the table. A ring: no other run has both less loss and less of this."));

  function draw(width) {
    const { field, bytes } = sizes[Number(select.value)];
    const known = runs.filter((r) => r.loss !== null && r[field] !== null);
    const amount = bytes ? inBytes : inCount;
    const frame = plot({ width, height: 340, right: 20 }, extent(known.map((r) => r[field]), 0.1),
      extent(known.map((r) => r.loss), 0.12),
      { x: sizes[Number(select.value)].label, y: "held-out loss, nats per token" },
      { x: amount, unit: bytes ? 1024 ** Math.floor(Math.log2(Math.max(1, ...known.map((r) => r[field]))) / 10) : 1 });
    const { root, x, y } = frame;
    root.removeAttribute("aria-hidden");
    for (const run of known) {
      const best = !known.some((o) => o !== run && o.loss <= run.loss && o[field] <= run[field]
        && (o.loss < run.loss || o[field] < run[field]));
      const text = `run ${run.name}: loss ${show(run.loss, 4)}, ${amount(run[field])}`;
      const point = svg("g", {
        class: best ? "point best" : "point", tabindex: 0, role: "img", "aria-label": text,
        "data-run": run.label, transform: `translate(${x(run[field])} ${y(run.loss)})`,
      }, svg("circle", { r: 10 }), svg("text", { "text-anchor": "middle", y: 4 }, run.label));
      point.run = run;
      root.append(point);
    }
    frameHost.replaceChildren(root);
  }
  tips(frameHost, ".point", (point) => {
    const { field, bytes } = sizes[Number(select.value)];
    const run = point.closest(".point").run;
    return [run.name, ...run.differs, `loss ${show(run.loss, 4)}`,
      `${(bytes ? inBytes : inCount)(run[field])}`];
  });
  select.addEventListener("change", () => draw(frameHost.clientWidth));
  whenResized(frameHost, draw);
}

function inCount(value) {
  for (const [limit, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= limit) return `${show(value / limit)} ${unit}`;
  }
  return show(value);
}

function inBytes(value) {
  for (const [limit, unit] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (Math.abs(value) >= limit) return `${show(value / limit)} ${unit}`;
  }
  return `${show(value)} B`;
}

function drawCurves(host) {
  lineChart(host, {
    label: "Training curves of all runs", xName: "step", yName: DATA.curves.name, height: 320,
    series: DATA.curves.runs.map((run, i) => ({
      name: run.name, points: run.points, run: run.label,
      kind: `run-${i % 8} dash-${Math.floor(i / 8) % 4}`,
    })),
  });
}

// A run under the pointer or in focus is shown everywhere.
function setUpRuns() {
  const parts = () => document.querySelectorAll("[data-run]");
  const mark = (run) => parts().forEach((part) => {
    part.classList.toggle("lit", run !== null && part.dataset.run === run);
    part.classList.toggle("dim", run !== null && part.dataset.run !== run && part.matches("path"));
  });
  const over = (event) => {
    const found = event.target.closest("[data-run]");
    mark(found ? found.dataset.run : null);
  };
  document.addEventListener("mouseover", over);
  document.addEventListener("focusin", over);
}
