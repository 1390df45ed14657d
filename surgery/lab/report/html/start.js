// Everything above, where this page has a place for it.
const DRAWN = {
  curve: drawCurve, maps: drawMaps, roles: drawRoles, ranking: drawRanking,
  scatter: drawScatter, curves: drawCurves,
};
setUpTheme();
for (const [name, draw] of Object.entries(DRAWN)) {
  const host = drawing(name);
  if (host && DATA[name]) draw(host);
}
setUpTables();
if (DATA.scatter) setUpRuns();
document.documentElement.dataset.ready = "true";
