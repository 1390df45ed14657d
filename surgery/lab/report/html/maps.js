// Maps [layers × heads] of every metric, with a slider over the steps of training.

// Codes of surgery/lab/report/html/maps.py: {shares, values}, shares in 0..1 along the colours.
function decode(metric) {
  const text = atob(metric.codes);
  const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
  const codes = metric.bits === 16 ? new Uint16Array(bytes.buffer) : bytes;
  const highest = 2 ** metric.bits - 2;
  const { low, high, width } = metric;
  const bottom = width ? Math.asinh(low / width) : low;
  const top = width ? Math.asinh(high / width) : high;
  const valueAt = (share) => {
    const scaled = bottom + share * (top - bottom);
    return width ? width * Math.sinh(scaled) : scaled;
  };
  const shareOf = (i) => (codes[i] > highest ? NaN : codes[i] / highest);
  return { shareOf, valueAt, valueOf: (i) => valueAt(shareOf(i)) };
}

function drawMaps(host) {
  const choices = DATA.maps.flatMap((set) => set.metrics.map((metric) => ({ set, metric })));
  const select = el("select", { id: "metric" }, DATA.maps.map((set) =>
    el("optgroup", { label: set.title }, set.metrics.map((metric) =>
      el("option", { value: choices.findIndex((c) => c.metric === metric) }, metric.label)))));
  const slider = el("input", { type: "range", id: "step", min: 0, value: 0, step: 1 });
  const told = el("output", { for: "step", class: "step" });
  const play = el("button", { type: "button", class: "play" }, "Play");
  const time = el("div", { class: "time" }, el("label", { for: "step" }, "step"), slider, told, play);
  const controls = el("div", { class: "controls" },
    el("div", null, el("label", { for: "metric" }, "shown"), select), time);
  const note = el("p", { class: "quiet note" });
  const key = el("div", { class: "key" });
  const place = el("div", { class: "map" });
  const detail = el("div", { class: "detail-head" });
  host.append(controls, note, el("div", { class: "beside" }, el("div", null, place, key), detail));

  let shown = null; // {set, metric, figures}
  let grid = null;
  let head = null; // the one drawn beside the map

  function choose(index) {
    const before = shown;
    const { set, metric } = choices[index];
    shown = { set, metric, figures: decode(metric) };
    const step = before && before.metric.steps[slider.value];
    slider.max = Math.max(0, metric.steps.length - 1);
    slider.value = step === undefined || step === null ? slider.max : nearest(metric.steps, step);
    time.hidden = metric.steps.length < 2;
    const thinned = metric.observed > metric.steps.length && metric.steps.length > 0
      ? `; ${metric.steps.length} of ${metric.observed} observed steps are kept here` : "";
    const parts = [metric.note, metric.unit && `in ${metric.unit}`].filter(Boolean).join(", ");
    note.textContent = `${metric.label}${parts && `: ${parts}`}${thinned}.`;
    if (!grid || before.set !== set) build();
    paint();
  }

  function build() {
    const { set } = shown;
    const all = set.metrics.map((metric) => ({
      figures: metric === shown.metric ? shown.figures : decode(metric),
      last: Math.max(1, metric.steps.length) - 1,
    }));
    const there = Array.from({ length: set.layers * set.heads }, (_, i) => all.some(
      ({ figures, last }) => [0, last].some(
        (s) => !Number.isNaN(figures.shareOf(s * set.layers * set.heads + i)))));
    grid = headGrid("Heads by layer", set.layers, set.heads, (l, h) => there[l * set.heads + h]);
    place.replaceChildren(grid.scroll);
    head = null;
    tips(grid.table, "td[tabindex]", (cell) => [name(cell), said(cell), ...alarms(cell)]);
    grid.table.addEventListener("click", (event) => pick(event.target.closest("td[tabindex]")));
    grid.table.addEventListener("focusin", (event) => pick(event.target.closest("td[tabindex]")));
  }

  const at = (step, layer, h) => (step * shown.set.layers + layer) * shown.set.heads + h;
  const index = () => Number(slider.value);
  const name = (cell) => `layer ${cell.layer}, head ${cell.head}`;
  const said = (cell) => {
    const value = shown.figures.valueOf(at(index(), cell.layer, cell.head));
    return `${shown.metric.label}: ${show(value)} ${shown.metric.unit}`.trim();
  };

  function alarms(cell) {
    const now = shown.metric.steps[index()];
    return (DATA.marks || [])
      .filter(([step, layer, h]) => layer === cell.layer && h === cell.head && step <= now)
      .map(([step, , , alarm]) => `▲ ${alarm} since step ${step}`);
  }

  function paint() {
    const { metric, figures } = shown;
    const now = metric.steps[index()];
    const marked = new Set((DATA.marks || []).filter(([step]) => step <= now)
      .map(([, layer, h]) => `${layer}.${h}`));
    for (const cell of grid.cells) {
      if (!cell.hasAttribute("tabindex")) continue;
      const share = figures.shareOf(at(index(), cell.layer, cell.head));
      cell.style.background = Number.isNaN(share) ? "" : css(ramp(share));
      cell.classList.toggle("unknown", Number.isNaN(share));
      cell.classList.toggle("marked", marked.has(`${cell.layer}.${cell.head}`));
      cell.setAttribute("aria-label", `${name(cell)}: ${said(cell)}`);
    }
    told.textContent = metric.steps.length ? `${now} of ${metric.steps[metric.steps.length - 1]}` : "";
    slider.setAttribute("aria-valuetext", metric.steps.length ? `step ${now}` : "");
    paintKey();
    drawHead();
  }

  function paintKey() {
    const { metric, figures } = shown;
    const band = el("div", { class: "band" });
    band.style.background = gradient();
    const scaled = metric.width ? "; colours are stretched towards zero" : "";
    key.replaceChildren(band, el("div", { class: "ends" },
      el("span", null, show(metric.low)), el("span", null, show(figures.valueAt(0.5))),
      el("span", null, show(metric.high))),
    el("p", { class: "quiet" }, `all steps share this scale${scaled}`));
  }

  function pick(cell) {
    if (!cell || (head && head.layer === cell.layer && head.head === cell.head)) return;
    grid.cells.forEach((c) => c.classList.toggle("chosen", c === cell));
    head = { layer: cell.layer, head: cell.head };
    drawHead();
  }

  // The chosen head over time, among the mean of all.
  function drawHead() {
    const { set, metric, figures } = shown;
    detail.hidden = metric.steps.length < 2;
    const wanted = `${set.title} ${metric.name} ${head ? `${head.layer}.${head.head}` : ""}`;
    if (detail.hidden || detail.dataset.of === wanted) return;
    detail.dataset.of = wanted;
    const mean = metric.steps.map((step, s) => {
      let sum = 0;
      let count = 0;
      for (let i = s * set.layers * set.heads; i < (s + 1) * set.layers * set.heads; i++) {
        const value = figures.valueOf(i);
        if (!Number.isNaN(value)) { sum += value; count += 1; }
      }
      return [step, count ? sum / count : NaN];
    }).filter((p) => !Number.isNaN(p[1]));
    const series = [{ name: "mean of all heads", points: mean, kind: "faint" }];
    if (head) {
      const own = metric.steps.map((step, s) => [step, figures.valueOf(at(s, head.layer, head.head))]);
      series.push({
        name: `layer ${head.layer}, head ${head.head}`, kind: "main",
        points: own.filter((p) => !Number.isNaN(p[1])),
      });
    }
    detail.replaceChildren(el("h3", null, head ? `Layer ${head.layer}, head ${head.head}` : "Over time"),
      el("p", { class: "quiet" }, head ? "" : "Choose a head on the map to see it here."));
    lineChart(detail, {
      label: `${metric.label} over time`, xName: "step", yName: metric.label, series, height: 220,
    });
  }

  let timer = null;
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  play.addEventListener("click", () => {
    if (timer) { stop(); return; }
    if (index() >= Number(slider.max)) slider.value = 0;
    play.textContent = "Pause";
    timer = setInterval(() => {
      slider.value = index() + 1;
      paint();
      if (index() >= Number(slider.max)) stop();
    }, Math.max(60, Math.min(500, 6000 / (Number(slider.max) || 1))));
  });
  select.addEventListener("change", () => { stop(); choose(Number(select.value)); });
  slider.addEventListener("input", () => paint());
  onTheme(() => paint());
  choose(0);
}

function nearest(steps, step) {
  let best = 0;
  steps.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(steps[best] - step)) best = i; });
  return best;
}
