/** Elements, made in one call. What others said is always text here, never markup. */

/** An HTML element: attributes, listeners (`onclick`), then children, which may be text. */
export function make(tag, attributes = {}, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function draw(tag, attributes = {}, ...children) {
  return furnish(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function furnish(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== ""));
  return element;
}

/** A button that does nothing but what it is told to. */
export function button(attributes, ...children) {
  return make("button", {type: "button", ...attributes}, ...children);
}

/** A table with a caption; rows are lists of cells, the first of each is the row's header. */
export function table(caption, heads, rows, attributes = {}) {
  return make(
    "table",
    attributes,
    make("caption", {}, caption),
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        heads.map((head) => make("th", {scope: "col"}, head)),
      ),
    ),
    make(
      "tbody",
      {},
      rows.map(([head, ...cells]) =>
        make(
          "tr",
          {},
          make("th", {scope: "row"}, head),
          cells.map((cell) => make("td", {}, cell)),
        ),
      ),
    ),
  );
}

export function percent(share) {
  if (share == null) return "";
  if (share > 0 && share < 0.005) return "<1\u00a0%";
  return `${Math.round(share * 100)}\u00a0%`;
}

export function milliseconds(ms) {
  return ms >= 10000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.round(ms)} ms`;
}

// Making a format takes longer than a hundred uses of it.
const CLOCK = new Intl.DateTimeFormat([], {hour: "2-digit", minute: "2-digit", second: "2-digit"});

export function clock(time) {
  return CLOCK.format(new Date(time));
}

/** A length of time for people: 42 s, 3 min, 2 h. */
export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}
