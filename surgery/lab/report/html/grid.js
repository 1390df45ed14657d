// A table of heads: layers downwards, heads across. Tab reaches one cell, arrows move on.

// `present(layer, head)`: whether there is such a head.
function headGrid(label, layers, heads, present) {
  const every = heads > 48 ? 16 : heads > 20 ? 4 : 1;
  const top = el("tr", null, el("th", { class: "corner", scope: "col" }, "layer"));
  for (let head = 0; head < heads; head++) {
    top.append(el("th", { scope: "col", class: head % every ? "between" : null },
      head % every ? "" : String(head)));
  }
  const body = el("tbody");
  const cells = [];
  for (let layer = 0; layer < layers; layer++) {
    const row = el("tr", null, el("th", { scope: "row" }, String(layer)));
    for (let head = 0; head < heads; head++) {
      const there = present(layer, head);
      const cell = el("td", there ? { tabindex: -1 } : { class: "none", "aria-hidden": "true" });
      cell.layer = layer;
      cell.head = head;
      cells.push(cell);
      row.append(cell);
    }
    body.append(row);
  }
  const table = el("table", { class: "heads", role: "grid", "aria-label": label },
    el("thead", null, top), body);
  table.style.setProperty("--heads", heads);
  const scroll = el("div", { class: "scroll" }, table);
  const reach = (cell) => {
    cells.forEach((c) => c.tabIndex === 0 && (c.tabIndex = -1));
    cell.tabIndex = 0;
  };
  const first = cells.find((cell) => cell.hasAttribute("tabindex"));
  if (first) first.tabIndex = 0;
  table.addEventListener("focusin", (event) => event.target.matches("td") && reach(event.target));
  table.addEventListener("keydown", (event) => {
    const { layer, head } = event.target;
    if (layer === undefined) return;
    const steps = {
      ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
      Home: [0, -heads], End: [0, heads], PageUp: [-layers, 0], PageDown: [layers, 0],
    };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const next = goal(layer, head, step);
    if (next) next.focus();
  });
  // The next head in that direction; for a jump, the last one there.
  function goal(layer, head, [down, right]) {
    const jump = Math.abs(down) > 1 || Math.abs(right) > 1;
    const [dy, dx] = [Math.sign(down), Math.sign(right)];
    let found = null;
    for (let y = layer + dy, x = head + dx; y >= 0 && y < layers && x >= 0 && x < heads; y += dy, x += dx) {
      const cell = cells[y * heads + x];
      if (!cell.hasAttribute("tabindex")) continue;
      found = cell;
      if (!jump) break;
    }
    return found;
  }
  return { scroll, table, cells };
}
