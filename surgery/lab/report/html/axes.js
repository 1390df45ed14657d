// Scales and axes of line charts, rankings and scatter plots.

// Round numbers that cover [low, high], about `count` of them.
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

// Extremes with a little air around them.
function extent(values, air = 0.06) {
  const known = values.filter((v) => v !== null && Number.isFinite(v));
  let low = Infinity;
  let high = -Infinity;
  for (const value of known) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return [0, 1];
  if (low === high) return [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const more = (high - low) * air;
  return [low - more, high + more];
}

// An empty plot with its axes: {root, x, y, box}. `sizes`: {width, height, right}.
function plot(sizes, xRange, yRange, names, formats = {}) {
  const box = {
    left: 52, top: 26, right: sizes.width - (sizes.right || 12), bottom: sizes.height - 38,
  };
  const root = svg("svg", {
    width: sizes.width, height: sizes.height, viewBox: `0 0 ${sizes.width} ${sizes.height}`,
    class: "plot", "aria-hidden": "true",
  });
  const x = scale(xRange[0], xRange[1], box.left, box.right);
  const y = scale(yRange[0], yRange[1], box.bottom, box.top);
  const axis = svg("g", { class: "axis" });
  for (const value of ticks(yRange[0], yRange[1], 5)) {
    axis.append(svg("line", { x1: box.left, x2: box.right, y1: y(value), y2: y(value) }));
    axis.append(svg("text", { x: box.left - 8, y: y(value) + 4, "text-anchor": "end" },
      (formats.y || show)(value)));
  }
  const unit = formats.unit || 1;
  const count = sizes.width < 480 ? 4 : 8;
  for (const tick of ticks(xRange[0] / unit, xRange[1] / unit, count)) {
    const value = tick * unit;
    if (formats.whole && !Number.isInteger(value)) continue;
    axis.append(svg("text", { x: x(value), y: box.bottom + 17, "text-anchor": "middle" },
      (formats.x || show)(value)));
  }
  axis.append(svg("text", { class: "name", x: box.right, y: sizes.height - 4, "text-anchor": "end" },
    names.x));
  if (names.y) axis.append(svg("text", { class: "name", x: 0, y: 10 }, names.y));
  root.append(axis);
  return { root, x, y, box };
}

// Left and right, or the pointer, move along `places` (x in pixels, ascending) of a chart.
function crosshair(host, frame, places, linesOf) {
  const line = svg("line", { class: "cross", y1: frame.box.top, y2: frame.box.bottom });
  line.style.visibility = "hidden";
  frame.root.append(line);
  let at = Number(host.dataset.at || 0);
  const move = (index) => {
    at = Math.max(0, Math.min(places.length - 1, index));
    host.dataset.at = at;
    line.setAttribute("x1", places[at]);
    line.setAttribute("x2", places[at]);
    line.style.visibility = "visible";
    const around = frame.root.getBoundingClientRect();
    showTip(host, linesOf(at), {
      left: around.left + places[at], width: 0, top: around.top + frame.box.top,
      bottom: around.top + frame.box.top + 24,
    });
  };
  const away = () => {
    line.style.visibility = "hidden";
    hideTip();
  };
  host.onpointermove = (event) => {
    const offset = event.clientX - frame.root.getBoundingClientRect().left;
    let best = 0;
    places.forEach((x, i) => {
      if (Math.abs(x - offset) < Math.abs(places[best] - offset)) best = i;
    });
    move(best);
  };
  host.onpointerleave = away;
  host.onfocus = () => host.matches(":focus-visible") && move(at);
  host.onblur = away;
  host.onkeydown = (event) => {
    const far = Math.max(1, Math.round(places.length / 10));
    const jumps = { ArrowLeft: -1, ArrowRight: 1, PageDown: -far, PageUp: far };
    if (event.key in jumps) move(at + jumps[event.key]);
    else if (event.key === "Home") move(0);
    else if (event.key === "End") move(places.length - 1);
    else return;
    event.preventDefault();
  };
}
