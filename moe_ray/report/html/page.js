// The page's only script, named in its Content-Security-Policy by hash. It sorts and filters tables, names the cells of maps, opens
// what a link leads to, and opens everything for printing. Without it the page shows the same numbers.
(() => {
  "use strict";
  const number = (text) => {
    const found = text.replace(/,/g, "").match(/^\s*[+−-]?\d+(\.\d+)?(e[+-]?\d+)?/i);
    return found ? parseFloat(found[0].replace("−", "-")) : null;
  };
  const compare = (one, other) => {
    const [a, b] = [number(one), number(other)];
    if (a !== null && b !== null) return a - b;
    if (a !== null || b !== null) return a !== null ? -1 : 1;
    return one.localeCompare(other, undefined, { numeric: true });
  };
  const sort = (table, column, head) => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].sort((a, b) => compare(a.cells[column].textContent, b.cells[column].textContent));
    body.append(...(descending ? rows.reverse() : rows));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, column, head));
    });
  }
  for (const field of document.querySelectorAll("input[data-filters]")) {
    field.hidden = false;
    const items = () => document.querySelectorAll(`#${field.dataset.filters} > *`);
    field.addEventListener("input", () => {
      const wanted = field.value.toLowerCase().split(/\s+/);
      for (const item of items()) item.hidden = !wanted.every((word) => item.textContent.toLowerCase().includes(word));
    });
  }
  for (const map of document.querySelectorAll("figure[data-values]")) {
    const [image, said] = [map.querySelector("svg image"), map.querySelector("output")];
    const [values, layers] = [map.dataset.values.split(" "), map.dataset.layers.split(" ")];
    const experts = values.length / layers.length;
    map.addEventListener("mousemove", (event) => {
      const box = image.getBoundingClientRect();
      const column = Math.floor(((event.clientX - box.left) / box.width) * experts);
      const row = Math.floor(((event.clientY - box.top) / box.height) * layers.length);
      const inside = column >= 0 && column < experts && row >= 0 && row < layers.length;
      said.textContent = inside
        ? `layer ${layers[row]}, expert ${column}: ${(values[row * experts + column] / 1e4).toFixed(4)}` : "";
    });
    map.addEventListener("mouseleave", () => { said.textContent = ""; });
  }
  const open = (element) => {
    for (let above = element; above; above = above.parentElement) if (above.tagName === "DETAILS") above.open = true;
  };
  const follow = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target) { open(target); target.scrollIntoView(); }
  };
  addEventListener("hashchange", follow);
  addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
  follow();
})();
