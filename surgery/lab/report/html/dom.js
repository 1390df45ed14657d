// Elements, numbers, and the data of this page. Text only ever goes in as text.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

function el(name, attributes, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

// 0.0512345 → "0.0512"; a real minus sign; "–" for nothing.
function show(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  let text;
  if (size >= 1e6 || size < 1e-4) text = value.toExponential(digits - 1);
  else if (size >= 10 ** digits) text = Math.round(value).toLocaleString("en-US");
  else text = String(Number(value.toPrecision(digits)));
  return text.replace(/-/g, "−");
}

function drawing(name) {
  return document.querySelector(`[data-draw="${name}"]`);
}

// Calls `draw(width)` now and whenever the width of `host` changes.
function whenResized(host, draw) {
  let last = 0;
  const look = () => {
    const width = Math.floor(host.clientWidth);
    if (width && width !== last) {
      last = width;
      draw(width);
    }
  };
  new ResizeObserver(look).observe(host);
  look();
}
