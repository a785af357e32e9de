"use strict";
// What the page does with a script: tables are sorted, layers filtered, and values shown. Without it
// the page has the same content: titles of shapes are then shown by the browser.

// --- tables that are sorted by their columns ---

const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);

function valueOf(cell) {
  const value = cell.dataset.value;
  return value === undefined ? cell.textContent : Number(value);
}

// Sorts the rows by a column; rows without a number come last, whichever the direction is.
function sortRows(body, column, direction) {
  const keyed = [...body.rows].map((row) => [valueOf(row.cells[column]), row]);
  const numeric = keyed.some(([value]) => typeof value === "number");
  keyed.sort(([a], [b]) => {
    if (numeric && typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return direction * compare(a, b);
  });
  body.append(...keyed.map(([, row]) => row));
  return numeric;
}

function makeSortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const numbers = table.tBodies[0].querySelector(`tr > :nth-child(${column + 1})[data-value]`);
      const now = head.getAttribute("aria-sort");
      const first = numbers ? "descending" : "ascending"; // large errors are looked for
      const other = numbers ? "ascending" : "descending";
      const next = now === first ? other : first;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", next);
      sortRows(table.tBodies[0], column, next === "ascending" ? 1 : -1);
    });
  });
  if (table.tBodies[0].rows.length > 20) addFilter(table);
}

function addFilter(table) {
  const label = document.createElement("label");
  const field = document.createElement("input");
  field.type = "search";
  label.className = "filter";
  label.append("Show layers with ", field);
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    for (const row of table.tBodies[0].rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
    }
  });
  table.closest(".scroll").before(label);
}

// --- values under the pointer, and on the arrow keys ---

const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;
document.body.append(tip);
const told = new WeakMap();
let shown = null;

function hide() {
  if (shown) shown.classList.remove("on");
  shown = null;
  tip.hidden = true;
}

function show(shape) {
  if (shape === shown) return;
  hide();
  shown = shape;
  shape.classList.add("on");
  tip.textContent = told.get(shape);
  tip.hidden = false;
  const at = shape.getBoundingClientRect();
  const left = at.left + at.width / 2 - tip.offsetWidth / 2;
  const above = at.top - tip.offsetHeight - 6;
  const widest = document.documentElement.clientWidth - tip.offsetWidth - 4;
  tip.style.left = `${Math.max(4, Math.min(left, widest))}px`;
  tip.style.top = `${above < 4 ? at.bottom + 6 : above}px`;
}

function makeTelling(chart) {
  const shapes = [];
  for (const title of chart.querySelectorAll("title")) {
    const shape = title.parentElement;
    told.set(shape, title.textContent);
    title.remove(); // the browser would show it a second time, and late
    if (shape.tagName !== "text") shapes.push(shape);
    shape.addEventListener("pointerenter", () => show(shape));
    shape.addEventListener("pointerleave", hide);
  }
  if (!shapes.length) return;
  chart.setAttribute("tabindex", "0");
  let place = -1;
  chart.addEventListener("keydown", (event) => {
    const last = shapes.length - 1;
    const next = {
      ArrowRight: Math.min(place + 1, last),
      ArrowLeft: Math.max(place - 1, 0),
      Home: 0,
      End: last,
    }[event.key];
    if (event.key === "Escape") hide();
    if (next === undefined) return;
    event.preventDefault();
    place = next;
    show(shapes[place]);
  });
  chart.addEventListener("blur", hide);
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
document.querySelectorAll("svg.chart").forEach(makeTelling);
addEventListener("scroll", hide, { passive: true });
document.documentElement.classList.add("scripted");
