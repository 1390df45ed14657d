// Tables: those wider than the page can be scrolled by keys; marked ones can be sorted.
function setUpTables() {
  const look = () => {
    for (const region of document.querySelectorAll(".scroll")) {
      if (region.querySelector("[role=grid]")) continue; // its cells take the focus
      if (region.scrollWidth > region.clientWidth + 1) region.tabIndex = 0;
      else region.removeAttribute("tabindex");
    }
  };
  addEventListener("resize", look);
  look();
  document.querySelectorAll("table[data-sortable]").forEach(makeSortable);
  for (const block of document.querySelectorAll(".code")) {
    const button = el("button", { type: "button", class: "copy" }, "Copy");
    button.addEventListener("click", () => copy(block.querySelector("code"), button));
    block.append(button);
  }
}

function copy(source, button) {
  const told = (text) => {
    button.textContent = text;
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  const byHand = () => { // no clipboard for pages from a file in some browsers
    getSelection().selectAllChildren(source);
    told(document.execCommand("copy") ? "Copied" : "Selected");
  };
  if (navigator.clipboard) navigator.clipboard.writeText(source.textContent).then(() => told("Copied"), byHand);
  else byHand();
}

// Cells are compared by data-value, as numbers where they are; empty ones come last either way.
function makeSortable(table) {
  const body = table.tBodies[0];
  const columns = [...table.tHead.rows[0].cells];
  columns.forEach((column, place) => {
    const button = el("button", { type: "button" }, ...column.childNodes);
    column.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = column.getAttribute("aria-sort") === "ascending";
      columns.forEach((c) => c.removeAttribute("aria-sort"));
      column.setAttribute("aria-sort", down ? "descending" : "ascending");
      const valueOf = (row) => row.cells[place].dataset.value ?? "";
      const rows = [...body.rows].sort((a, b) => {
        const [one, two] = [valueOf(a), valueOf(b)];
        if (one === "" || two === "") return (one === "") - (two === "");
        const order = Number.isNaN(Number(one) + Number(two))
          ? one.localeCompare(two, "en", { numeric: true }) : Number(one) - Number(two);
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
}
