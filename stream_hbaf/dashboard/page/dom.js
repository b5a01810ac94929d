/** Creates elements. Strings become text nodes, never markup: transcripts may contain anything. */

/** An HTML element: attributes, listeners (`onclick`), CSS variables (`--x`), then children. */
export function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element, likewise. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== ""));
  return element;
}

/** A button that submits no form. */
export function button(attributes, ...children) {
  return html("button", {type: "button", ...attributes}, ...children);
}

/** A table with a caption; rows are lists of cells, the first of each is the row's header. */
export function table(caption, heads, rows, attributes = {}) {
  return html(
    "table",
    attributes,
    html("caption", {}, caption),
    html(
      "thead",
      {},
      html(
        "tr",
        {},
        heads.map((head) => html("th", {scope: "col"}, head)),
      ),
    ),
    html(
      "tbody",
      {},
      rows.map(([head, ...cells]) =>
        html(
          "tr",
          {},
          html("th", {scope: "row"}, head),
          cells.map((cell) => html("td", {}, cell)),
        ),
      ),
    ),
  );
}
