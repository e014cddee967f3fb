// Sorting and filtering; the page is complete without it.
"use strict";

function sortable(table) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.classList.add("sorted");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(key(a.cells[column]), key(b.cells[column]), up));
      table.tBodies[0].append(...rows);
    });
  });
}

function key(cell) {
  const value = text(cell);
  return value === "" ? null : Number.isNaN(Number(value)) ? value : Number(value);
}

// What was not measured comes last, whichever way the rest is sorted.
function compare(a, b, up) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "number" && typeof b === "number"
    ? a - b : String(a).localeCompare(String(b));
  return up ? order : -order;
}

const text = (cell) => cell.dataset.v ?? cell.textContent.trim();

function filterable(table) {
  const bar = document.createElement("p");
  bar.className = "filters";
  const heads = [...table.tHead.rows[0].cells];
  const choices = heads.map((head, column) => {
    if (!("filter" in head.dataset)) return null;
    const values = [...new Set([...table.tBodies[0].rows].map((row) => text(row.cells[column])))];
    if (values.length < 2) return null;
    const label = document.createElement("label");
    const select = document.createElement("select");
    select.append(new Option("all", ""), ...values.map((value) => new Option(value, value)));
    label.append(head.textContent.trim() + " ", select);
    bar.append(label);
    return select;
  });
  if (!bar.childNodes.length) return;
  bar.addEventListener("change", () => {
    for (const row of table.tBodies[0].rows) {
      row.hidden = choices.some(
        (select, column) => select && select.value && text(row.cells[column]) !== select.value);
    }
  });
  table.parentElement.before(bar);
}

document.querySelectorAll("table.filterable").forEach(filterable);
document.querySelectorAll("table.sortable").forEach(sortable);
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
});
