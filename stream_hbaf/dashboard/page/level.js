/** How loud it is and was for half a minute, a strip for each source. */

import {make} from "./make.js";

const QUIETEST = -60; // dBFS
const LOUDEST = -6;
const SHOWN = 300; // levels
const HEIGHT = 56; // px
const strips = new Map(); // source -> {canvas, words}

/** Draw the levels of each source; with reduced motion the newest one only. */
export function drawLevels(place, levels) {
  for (const [source, heard] of levels) {
    if (!strips.has(source)) strips.set(source, addStrip(place, source));
    const {canvas, words} = strips.get(source);
    const newest = heard.at(-1);
    const loudness = `${Math.round(newest.dbfs)} dB`.replace("-", "−");
    const told = newest.speech ? `${loudness}, somebody speaks` : loudness;
    if (words.textContent !== told) words.textContent = told;
    paint(canvas, heard);
  }
}

function addStrip(place, source) {
  const canvas = make("canvas", {
    role: "img",
    "aria-label": `Loudness of ${source} in the last half minute`,
  });
  const words = make("span", {class: "soft"});
  place.append(
    make(
      "figure",
      {class: "level"},
      canvas,
      make("figcaption", {}, make("span", {}, `${source} `), words),
    ),
  );
  return {canvas, words};
}

function paint(canvas, heard) {
  const density = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  if (canvas.width !== Math.round(width * density)) {
    canvas.width = Math.round(width * density);
    canvas.height = HEIGHT * density;
  }
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const style = getComputedStyle(canvas);
  const brush = canvas.getContext("2d");
  brush.setTransform(density, 0, 0, density, 0, 0);
  brush.clearRect(0, 0, width, HEIGHT);
  const step = width / SHOWN;
  const shown = still ? heard.slice(-1) : heard;
  for (const [n, {dbfs, speech}] of shown.entries()) {
    const share = Math.min(1, Math.max(0, (dbfs - QUIETEST) / (LOUDEST - QUIETEST)));
    const high = Math.max(1, share * (HEIGHT - 8));
    const x = still ? 0 : width - (shown.length - n) * step;
    brush.fillStyle = style.getPropertyValue(speech ? "--voice" : "--quiet");
    brush.fillRect(x, (HEIGHT - 6 - high) / 2, still ? width : Math.max(1, step - 0.5), high);
    if (speech) brush.fillRect(x, HEIGHT - 3, still ? width : step, 3); // colour doesn't speak alone
  }
}
