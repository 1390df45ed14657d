// Colours for amounts: one hue family, lightness falling (light) or rising (dark) all the way, so
// that the order can be seen without telling hues apart.
const RAMPS = {
  light: [[243, 241, 233], [199, 221, 214], [128, 184, 187], [62, 133, 160], [37, 80, 124], [27, 33, 77]],
  dark: [[36, 42, 54], [38, 68, 98], [37, 105, 133], [63, 147, 152], [133, 192, 163], [243, 235, 186]],
};

// `share` in 0..1 → [r, g, b]
function ramp(share) {
  const stops = RAMPS[isDark() ? "dark" : "light"];
  const at = Math.max(0, Math.min(1, share)) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  return stops[low].map((c, i) => Math.round(c + (stops[low + 1][i] - c) * (at - low)));
}

function css(colour) {
  return `rgb(${colour.join(",")})`;
}

function gradient() {
  const stops = RAMPS[isDark() ? "dark" : "light"].map(css);
  return `linear-gradient(to right, ${stops.join(",")})`;
}
