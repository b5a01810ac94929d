/** The timeline: a lane for each speaker, a block for each utterance; long silences are cut out.
 *
 * A block is as wide as the utterance was long and as high as its label was probable. The list of
 * utterances and the table have the same content for screen readers and the keyboard.
 */

import {html, svg, table} from "./dom.js";
import {appearance, describe} from "./emotions.js";
import {clock, duration, percent} from "./format.js";
import {speakerName} from "./store.js";

const LANE = 52; // px, as all that follow
const BLOCK = 44;
const LOWEST = 18; // a letter fits into the smallest block
const NARROWEST = 15;
const TICKS = 20;
const MARGIN = 6;
const BREAK = 46; // in place of a long silence
const LONGEST_GAP_MS = 8000;
const SLOWEST = 12; // px a second
const FASTEST = 48;

let drawn = null; // {scale, picture, height} of the present picture

/** Draw `utterances` into `place`, and the names of the lanes beside it, into `names`. */
export function drawTimeline(place, names, {utterances, store, selected, onSelect}) {
  const atEnd = place.scrollLeft + place.clientWidth >= place.scrollWidth - 2 * BREAK;
  drawn = null;
  const speakers = [...new Set(utterances.map(speakerName))];
  drawNames(names, speakers);
  if (!utterances.length) {
    place.replaceChildren(html("p", {class: "soft"}, "No finished utterance yet."));
    return;
  }
  const spans = timeSpans(utterances);
  const scale = new Scale(spans, place.clientWidth);
  const height = speakers.length * LANE + TICKS;
  const picture = svg(
    "svg",
    {
      class: "timeline",
      role: "img",
      "aria-label": summary(utterances, {store, speakers}),
      width: scale.width,
      height,
      viewBox: `0 0 ${scale.width} ${height}`,
    },
    speakers.map((_, lane) => groundLine(lane, scale.width)),
    scale.breaks.map((one) => silence(one, height)),
    scale.ticks().map((tick) => timeMark(tick, height)),
    spans.map((span) =>
      block(span, {
        scale,
        lane: speakers.indexOf(speakerName(span.one)),
        store,
        selected,
        onSelect,
      }),
    ),
  );
  place.replaceChildren(picture);
  drawn = {scale, picture, height};
  if (atEnd) place.scrollLeft = place.scrollWidth;
}

/** Drawn only if they have changed: the width of the timeline depends on them. */
function drawNames(place, speakers) {
  const shown = [...place.children].map((lane) => lane.textContent);
  if (shown.join("\n") === speakers.join("\n")) return;
  place.replaceChildren(...speakers.map((name) => html("div", {class: "lane"}, name)));
}

/** Mark a moment (Unix ms) in the picture; null removes the mark. */
export function markMoment(place, moment) {
  place.querySelector(".pointer")?.remove();
  if (!drawn || moment == null) return;
  const x = drawn.scale.x(moment);
  drawn.picture.append(
    svg("line", {class: "pointer", x1: x, x2: x, y1: 0, y2: drawn.height - TICKS}),
  );
  place.scrollLeft = x - place.clientWidth / 2;
}

/** Draw the same as a table. */
export function drawTable(place, {utterances, store}) {
  place.replaceChildren(
    table(
      "Finished utterances, oldest first",
      ["Time", "Speaker", "Emotion", "Voice and words", "Words"],
      utterances.map((one) => {
        const corrected = store.corrections.get(one.id);
        return [
          clock(one.start_time),
          speakerName(one),
          corrected
            ? `${corrected} (corrected from ${one.emotion?.label ?? "nothing"})`
            : describe(one.emotion),
          one.conflict == null ? "" : one.conflict ? "contradict" : "agree",
          one.text,
        ];
      }),
    ),
  );
}

/** Maps Unix time (ms) to pixels, with long silences reduced to a fixed width. */
class Scale {
  constructor(spans, room) {
    const sorted = [...spans].sort((one, other) => one.from - other.from);
    this.pieces = []; // stretches of time without a long silence
    for (const {from, to} of sorted) {
      const last = this.pieces.at(-1);
      if (last && from - last.to <= LONGEST_GAP_MS) last.to = Math.max(last.to, to);
      else this.pieces.push({from, to});
    }
    const seconds = this.pieces.reduce((sum, {from, to}) => sum + to - from, 0) / 1000;
    const free = room - 2 * MARGIN - (this.pieces.length - 1) * BREAK;
    this.speed = Math.min(FASTEST, Math.max(SLOWEST, free / Math.max(1, seconds)));
    let x = MARGIN;
    this.breaks = [];
    for (const [n, piece] of this.pieces.entries()) {
      if (n) {
        this.breaks.push({x, seconds: (piece.from - this.pieces[n - 1].to) / 1000});
        x += BREAK;
      }
      piece.x = x;
      x += Math.max(NARROWEST, ((piece.to - piece.from) / 1000) * this.speed);
    }
    this.width = Math.ceil(x + MARGIN);
  }

  x(moment) {
    const piece = this.pieces.findLast(({from}) => from <= moment) ?? this.pieces[0];
    return piece.x + (Math.max(0, Math.min(moment, piece.to) - piece.from) / 1000) * this.speed;
  }

  /** The marks with the time of day: at the beginning of each piece, if there is room. */
  ticks() {
    let free = 0;
    return this.pieces.flatMap(({x, from}) => {
      if (x < free) return [];
      free = x + 80;
      return [{x, text: clock(from)}];
    });
  }
}

function block({one, from, to}, {scale, lane, store, selected, onSelect}) {
  const corrected = store.corrections.has(one.id);
  const {colour, letter, ink} = appearance(store.label(one));
  const unsure = store.isUnsure(one);
  const x = scale.x(from);
  const width = Math.max(NARROWEST, scale.x(to) - x - 1);
  const height = LOWEST + (BLOCK - LOWEST) * (corrected ? 1 : (one.emotion?.score ?? 0));
  const bottom = (lane + 1) * LANE - 3;
  const classes = ["block", unsure && "unsure", one.id === selected && "chosen"]
    .filter(Boolean)
    .join(" ");
  return svg(
    "g",
    {class: classes, onclick: () => onSelect(one.id), "--emotion": colour, "--on-emotion": ink},
    svg(
      "title",
      {},
      `${speakerName(one)}, ${clock(one.start_time)}: ${describe(one.emotion)}. ${one.text}`,
    ),
    svg("rect", {x, y: bottom - height, width, height, rx: 3}),
    svg(
      "text",
      {x: x + width / 2, y: bottom - 5, "text-anchor": "middle"},
      corrected ? `${letter}✓` : unsure ? `${letter}?` : letter,
    ),
    one.conflict
      ? svg(
          "text",
          {class: "conflict", x: x + width / 2, y: bottom - height - 2, "text-anchor": "middle"},
          "≠",
        )
      : null,
  );
}

function groundLine(lane, width) {
  const y = (lane + 1) * LANE - 2;
  return svg("line", {class: "ground", x1: 0, x2: width, y1: y, y2: y});
}

function silence({x, seconds}, height) {
  const middle = x + BREAK / 2;
  return svg(
    "g",
    {class: "silence"},
    svg("line", {x1: middle, x2: middle, y1: 0, y2: height - TICKS - 16}),
    svg("text", {x: middle, y: height - TICKS - 4, "text-anchor": "middle"}, duration(seconds)),
  );
}

function timeMark({x, text}, height) {
  return svg("text", {class: "time", x, y: height - 5}, text);
}

/** The times of utterances. A recording that was read faster than real time is drawn in real time:
 * utterances of one source never overlap. */
function timeSpans(utterances) {
  const ends = new Map(); // source -> end of its latest utterance
  return utterances.map((one) => {
    const from = Math.max(Date.parse(one.start_time), ends.get(one.source) ?? 0);
    const to = from + one.audio_end_ms - one.audio_start_ms;
    ends.set(one.source, to);
    return {one, from, to};
  });
}

function summary(utterances, {store, speakers}) {
  const shares = [...store.counts(utterances)]
    .sort((one, other) => other[1] - one[1])
    .map(([name, count]) => `${name} ${percent(count / utterances.length)}`);
  return `${utterances.length} utterances of ${speakers.join(", ")}: ${shares.join(", ")}.`;
}
