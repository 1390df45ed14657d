// Light or dark: as the system says, until the button says otherwise.
const wantsDark = matchMedia("(prefers-color-scheme: dark)");
const themeListeners = [];

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : wantsDark.matches;
}

function onTheme(listener) {
  themeListeners.push(listener);
}

function setUpTheme() {
  const button = document.getElementById("theme");
  const tell = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Change to ${isDark() ? "light" : "dark"} colours`);
    themeListeners.forEach((listener) => listener());
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    tell();
  });
  wantsDark.addEventListener("change", tell);
  tell();
}
