/** Level meters: a strip for each source with the last half minute. */

import {html} from "./dom.js";

const QUIETEST = -60; // dBFS
const LOUDEST = -6;
const SHOWN = 300; // levels
const HEIGHT = 56; // px
const meters = new Map(); // source -> {canvas, text}

/** Draw the levels of each source; with reduced motion only the newest. */
export function drawLevels(place, levels) {
  for (const [source, history] of levels) {
    if (!meters.has(source)) meters.set(source, addMeter(place, source));
    const {canvas, text} = meters.get(source);
    const newest = history.at(-1);
    const level = `${Math.round(newest.dbfs)} dB`.replace("-", "−");
    const line = newest.speech ? `${level}, somebody speaks` : level;
    if (text.textContent !== line) text.textContent = line;
    paint(canvas, history);
  }
}

function addMeter(place, source) {
  const canvas = html("canvas", {
    role: "img",
    "aria-label": `Level of ${source} in the last half minute`,
  });
  const text = html("span", {class: "soft"});
  place.append(
    html(
      "figure",
      {class: "level"},
      canvas,
      html("figcaption", {}, html("span", {}, `${source} `), text),
    ),
  );
  return {canvas, text};
}

function paint(canvas, history) {
  const density = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  if (canvas.width !== Math.round(width * density)) {
    canvas.width = Math.round(width * density);
    canvas.height = HEIGHT * density;
  }
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const style = getComputedStyle(canvas);
  const context = canvas.getContext("2d");
  context.setTransform(density, 0, 0, density, 0, 0);
  context.clearRect(0, 0, width, HEIGHT);
  const step = width / SHOWN;
  const shown = still ? history.slice(-1) : history;
  for (const [n, {dbfs, speech}] of shown.entries()) {
    const share = Math.min(1, Math.max(0, (dbfs - QUIETEST) / (LOUDEST - QUIETEST)));
    const height = Math.max(1, share * (HEIGHT - 8));
    const x = still ? 0 : width - (shown.length - n) * step;
    context.fillStyle = style.getPropertyValue(speech ? "--voice" : "--quiet");
    context.fillRect(x, (HEIGHT - 6 - height) / 2, still ? width : Math.max(1, step - 0.5), height);
    // A line below marks speech: colour is not the only mark.
    if (speech) context.fillRect(x, HEIGHT - 3, still ? width : step, 3);
  }
}
