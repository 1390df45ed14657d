// Line charts: the training curve, one head over time, the curves of several runs.

// `chart`: {label, xName, yName, series: [{name, points: [[x, y]], kind}], levels, events}
function lineChart(host, chart) {
  const frameHost = el("div", {
    class: "frame", tabindex: 0, role: "group", "aria-roledescription": "line chart",
    "aria-label": `${chart.label}. Arrow keys move along it.`,
  });
  host.append(frameHost);
  const legend = legendOf(chart);
  if (legend) host.append(legend);
  whenResized(frameHost, (width) => drawLines(frameHost, chart, width));
}

function drawLines(host, chart, width) {
  const levels = chart.levels || [];
  const points = chart.series.flatMap((s) => s.points);
  const wide = width >= 560 && levels.length > 0;
  const frame = plot(
    { width, height: chart.height || 280, right: wide ? 168 : 12 },
    extent(points.map((p) => p[0]), 0.01),
    extent([...points.map((p) => p[1]), ...levels.map((l) => l.value)]),
    { x: chart.xName, y: chart.yName }, { whole: true },
  );
  const { root, x, y, box } = frame;
  for (const event of chart.events || []) {
    root.append(svg("line", {
      class: "event", x1: x(event.step), x2: x(event.step), y1: box.top, y2: box.bottom,
    }));
  }
  for (const level of levels) {
    root.append(svg("line", {
      class: `level ${level.kind}`, x1: box.left, x2: box.right, y1: y(level.value),
      y2: y(level.value),
    }));
  }
  if (wide) nameLevels(root, levels, y, box);
  host.parentElement.classList.toggle("named", wide);
  for (const series of chart.series) {
    const path = series.points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`);
    root.append(svg("path", {
      class: `line ${series.kind || ""}`, d: path.join(""), "data-run": series.run,
    }));
    if (series.points.length === 1) {
      const [only] = series.points;
      root.append(svg("circle", { class: "dot", cx: x(only[0]), cy: y(only[1]), r: 3 }));
    }
  }
  host.replaceChildren(root);
  const steps = [...new Set(points.map((p) => p[0]))].sort((a, b) => a - b);
  crosshair(host, frame, steps.map(x), (i) => describeStep(chart, steps[i]));
}

function describeStep(chart, step) {
  const lines = [`${chart.xName} ${show(step, 6)}`];
  for (const series of chart.series) {
    if (series.quiet) continue;
    const found = series.points.find((p) => p[0] === step);
    if (found) lines.push(`${series.name}: ${show(found[1], 4)}`);
  }
  for (const event of chart.events || []) if (event.step === step) lines.push(event.text);
  return lines.slice(0, 14);
}

// Names at the right end of their levels, pushed apart where they would touch.
function nameLevels(root, levels, y, box) {
  const placed = levels.map((level) => ({ level, at: y(level.value) })).sort((a, b) => a.at - b.at);
  placed.forEach((item, i) => {
    if (i && item.at - placed[i - 1].at < 15) item.at = placed[i - 1].at + 15;
  });
  const over = placed.length ? Math.max(0, placed[placed.length - 1].at - box.bottom) : 0;
  for (const { level, at } of placed) {
    root.append(svg("text", { class: `levelname ${level.kind}`, x: box.right + 8, y: at + 4 - over },
      `${level.name.split(",")[0]} ${show(level.value, 4)}`));
  }
}

function legendOf(chart) {
  const entries = [...chart.series.filter((s) => !s.quiet), ...(chart.levels || [])];
  if (entries.length < 2) return null;
  return el("ul", { class: "legend" }, entries.map((entry) => {
    const kind = "points" in entry ? `line ${entry.kind || ""}` : `level ${entry.kind}`;
    const sample = svg("svg", { width: 24, height: 10, "aria-hidden": "true" },
      svg("path", { class: kind, d: "M0 5L24 5" }));
    const value = "value" in entry ? ` ${show(entry.value, 4)}` : "";
    return el("li", { class: "value" in entry ? "of-level" : null, "data-run": entry.run }, sample, entry.name, value);
  }));
}

// Mean over a window around each point: what the noise hides.
function smoothed(points) {
  const reach = Math.floor(points.length / 40);
  return points.map((point, i) => {
    const near = points.slice(Math.max(0, i - reach), i + reach + 1);
    return [point[0], near.reduce((sum, p) => sum + p[1], 0) / near.length];
  });
}

function drawCurve(host) {
  const { points, name, levels, events } = DATA.curve;
  const noisy = points.length >= 80;
  const series = [{ name, points, kind: noisy ? "faint" : "main" }];
  if (noisy) series.push({ name: `${name}, smoothed`, points: smoothed(points), kind: "main" });
  lineChart(host, {
    label: `${name} over ${points[points.length - 1][0]} steps`, xName: "step",
    yName: `${name}, nats per token`, series, events,
    levels: levels.map((level) => ({ ...level, kind: level.moment })),
  });
}
