// One tooltip for the whole page: on hover, on focus, on tap; Escape closes it.
const tip = el("div", { id: "tip", role: "tooltip", hidden: true });
document.body.append(tip);
let tipOwner = null;

function showTip(owner, lines, box) {
  hideTip();
  tip.replaceChildren(...lines.map((line, i) => el(i ? "div" : "strong", null, line)));
  tip.hidden = false;
  tipOwner = owner;
  owner.setAttribute("aria-describedby", "tip");
  const around = box || owner.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const widest = document.documentElement.clientWidth;
  const left = around.left + around.width / 2 - own.width / 2;
  tip.style.left = `${scrollX + Math.max(6, Math.min(left, widest - own.width - 6))}px`;
  const above = around.top - own.height - 8;
  tip.style.top = `${scrollY + (above < 6 ? around.bottom + 8 : above)}px`;
}

function hideTip() {
  tip.hidden = true;
  if (tipOwner) tipOwner.removeAttribute("aria-describedby");
  tipOwner = null;
}

// `linesOf(target)`: what is to be said of the element under the pointer or in focus.
function tips(host, selector, linesOf) {
  const open = (event) => {
    const target = event.target.closest(selector);
    if (target && host.contains(target)) {
      const lines = linesOf(target);
      if (lines) showTip(target, lines);
    }
  };
  host.addEventListener("mouseover", open);
  host.addEventListener("focusin", open);
  host.addEventListener("mouseout", hideTip);
  host.addEventListener("focusout", hideTip);
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
