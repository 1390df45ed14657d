// The role of every head: a letter and a colour, named in the legend.
function drawRoles(host) {
  const { legend, thresholds, ...columns } = DATA.roles;
  const heads = Math.max(...columns.head) + 1;
  const layers = Math.max(...columns.layer) + 1;
  const where = new Map(columns.layer.map((layer, i) => [`${layer}.${columns.head[i]}`, i]));
  const grid = headGrid("Roles of heads", layers, heads, (l, h) => where.has(`${l}.${h}`));
  grid.table.classList.add("letters");
  const kinds = legend.map((role) => (role.colour === null ? "role-plain" : `role-${role.colour}`));
  for (const cell of grid.cells) {
    const i = where.get(`${cell.layer}.${cell.head}`);
    if (i === undefined) continue;
    const role = legend[columns.role[i]];
    cell.textContent = role.letter;
    cell.classList.add(kinds[columns.role[i]]);
    cell.setAttribute("aria-label", `layer ${cell.layer}, head ${cell.head}: ${role.name}`);
  }
  tips(grid.table, "td[tabindex]", (cell) => describe(where.get(`${cell.layer}.${cell.head}`)));
  function describe(i) {
    const lines = [`layer ${columns.layer[i]}, head ${columns.head[i]}: ${legend[columns.role[i]].name}`];
    if (columns.score[i] !== null) lines.push(`score ${show(columns.score[i])}`);
    if (columns.offset[i] !== null) lines.push(`looks ${show(columns.offset[i])} tokens away`);
    if (columns.relation[i] !== null) lines.push(`relation ${columns.relation[i]}`);
    if (columns.kv_head[i] !== null) lines.push(`KV head ${columns.kv_head[i]}`);
    if (columns.nearest[i]) {
      lines.push(`most like layer ${columns.nearest[i][0]} head ${columns.nearest[i][1]}` +
        (columns.redundancy[i] === null ? "" : `, redundancy ${show(columns.redundancy[i])}`));
    }
    if (columns.cluster[i] !== null) lines.push(`cluster ${columns.cluster[i]}`);
    return lines;
  }
  const items = legend.map((role, i) => el("li", null,
    el("span", { class: `swatch ${kinds[i]}`, "aria-hidden": "true" }, role.letter),
    `${role.name} `, el("span", { class: "quiet" }, String(role.count))));
  host.append(grid.scroll, el("ul", { class: "legend roles-legend" }, items));
  const limits = Object.entries(thresholds);
  if (limits.length) {
    host.append(el("p", { class: "quiet" }, "Thresholds: " +
      limits.map(([name, value]) => `${name.replaceAll("_", " ")} ${show(value)}`).join(", ") + "."));
  }
}
