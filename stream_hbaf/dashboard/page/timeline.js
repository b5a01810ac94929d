/** Emotions over time, a lane for each speaker. Long silences are cut out and marked as such.
 *
 * A block is as wide as the utterance was long and as high as its label was probable. The list of
 * utterances and the table say the same to those who don't see it or use no mouse.
 */

import {inWords, look} from "./emotions.js";
import {clock, draw, duration, make, percent, table} from "./make.js";
import {who} from "./story.js";

const LANE = 52; // px, as all that follow
const BLOCK = 44;
const LOWEST = 18; // a letter fits into the smallest block
const NARROWEST = 15;
const TICKS = 20;
const MARGIN = 6;
const BREAK = 46; // for a long silence
const LONGEST_GAP_MS = 8000;
const SLOWEST = 12; // px a second
const FASTEST = 48;

let drawn = null; // the scale of what stands there now

/** Draw `said` into `place`, and the names of its lanes beside it, into `names`. */
export function drawTimeline(place, names, {said, story, selected, onSelect}) {
  const atEnd = place.scrollLeft + place.clientWidth >= place.scrollWidth - 2 * BREAK;
  drawn = null;
  const speakers = [...new Set(said.map(who))];
  names.replaceChildren(...speakers.map((name) => make("div", {class: "lane"}, name)));
  if (!said.length) {
    place.replaceChildren(make("p", {class: "soft"}, "No finished utterance yet."));
    return;
  }
  const spans = stretch(said);
  const scale = new Scale(spans, place.clientWidth);
  const height = speakers.length * LANE + TICKS;
  const picture = draw(
    "svg",
    {
      class: "timeline",
      role: "img",
      "aria-label": summary(said, {story, speakers}),
      width: scale.width,
      height,
      viewBox: `0 0 ${scale.width} ${height}`,
    },
    speakers.map((_, lane) => ground(lane, scale.width)),
    scale.breaks.map((one) => silence(one, height)),
    scale.ticks().map((tick) => timeMark(tick, height)),
    spans.map((span) =>
      block(span, {scale, lane: speakers.indexOf(who(span.one)), story, selected, onSelect}),
    ),
  );
  place.replaceChildren(picture);
  drawn = {scale, picture, height};
  if (atEnd) place.scrollLeft = place.scrollWidth;
}

/** Point at a moment (Unix ms) of what is drawn; null at none. */
export function pointAt(place, moment) {
  place.querySelector(".pointer")?.remove();
  if (!drawn || moment == null) return;
  const x = drawn.scale.x(moment);
  drawn.picture.append(
    draw("line", {class: "pointer", x1: x, x2: x, y1: 0, y2: drawn.height - TICKS}),
  );
  place.scrollLeft = x - place.clientWidth / 2;
}

/** The same as a table. */
export function drawTable(place, {said, story}) {
  place.replaceChildren(
    table(
      "Finished utterances, the oldest first",
      ["Time", "Speaker", "Emotion", "Voice and words", "Words"],
      said.map((one) => {
        const corrected = story.corrections.get(one.id);
        return [
          clock(one.start_time),
          who(one),
          corrected
            ? `${corrected} (corrected from ${one.emotion?.label ?? "nothing"})`
            : inWords(one.emotion),
          one.conflict == null ? "" : one.conflict ? "contradict" : "agree",
          one.text,
        ];
      }),
    ),
  );
}

/** Milliseconds of Unix time to pixels, with long silences squeezed to a fixed width. */
class Scale {
  constructor(spans, room) {
    const sorted = [...spans].sort((one, other) => one.from - other.from);
    this.pieces = []; // stretches without a long silence
    for (const {from, to} of sorted) {
      const last = this.pieces.at(-1);
      if (last && from - last.to <= LONGEST_GAP_MS) last.to = Math.max(last.to, to);
      else this.pieces.push({from, to});
    }
    const spoken = this.pieces.reduce((sum, {from, to}) => sum + to - from, 0) / 1000;
    const free = room - 2 * MARGIN - (this.pieces.length - 1) * BREAK;
    this.speed = Math.min(FASTEST, Math.max(SLOWEST, free / Math.max(1, spoken)));
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

  /** Where the time of day is written: at the beginning of each piece that has room for it. */
  ticks() {
    let free = 0;
    return this.pieces.flatMap(({x, from}) => {
      if (x < free) return [];
      free = x + 80;
      return [{x, text: clock(from)}];
    });
  }
}

function block({one, from, to}, {scale, lane, story, selected, onSelect}) {
  const label = story.label(one);
  const corrected = story.corrections.has(one.id);
  const {colour, letter, ink} = look(label);
  const unsure = story.isUnsure(one);
  const x = scale.x(from);
  const width = Math.max(NARROWEST, scale.x(to) - x - 1);
  const height = LOWEST + (BLOCK - LOWEST) * (corrected ? 1 : (one.emotion?.score ?? 0));
  const bottom = (lane + 1) * LANE - 3;
  const classes = ["block", unsure && "unsure", one.id === selected && "chosen"]
    .filter(Boolean)
    .join(" ");
  return draw(
    "g",
    {class: classes, onclick: () => onSelect(one.id), "--emotion": colour, "--on-emotion": ink},
    draw(
      "title",
      {},
      `${who(one)}, ${clock(one.start_time)}: ${inWords(one.emotion)}. ${one.text}`,
    ),
    draw("rect", {x, y: bottom - height, width, height, rx: 3}),
    draw(
      "text",
      {x: x + width / 2, y: bottom - 5, "text-anchor": "middle"},
      corrected ? `${letter}✓` : unsure ? `${letter}?` : letter,
    ),
    one.conflict
      ? draw(
          "text",
          {class: "conflict", x: x + width / 2, y: bottom - height - 2, "text-anchor": "middle"},
          "≠",
        )
      : null,
  );
}

function ground(lane, width) {
  return draw("line", {
    class: "ground",
    x1: 0,
    x2: width,
    y1: (lane + 1) * LANE - 2,
    y2: (lane + 1) * LANE - 2,
  });
}

function silence({x, seconds}, height) {
  return draw(
    "g",
    {class: "silence"},
    draw("line", {x1: x + BREAK / 2, x2: x + BREAK / 2, y1: 0, y2: height - TICKS - 16}),
    draw(
      "text",
      {x: x + BREAK / 2, y: height - TICKS - 4, "text-anchor": "middle"},
      duration(seconds),
    ),
  );
}

function timeMark({x, text}, height) {
  return draw("text", {class: "time", x, y: height - 5}, text);
}

/** When each was said. Sound that came faster than it was spoken is drawn as it was spoken. */
function stretch(said) {
  const ends = new Map(); // source -> end of its latest
  return said.map((one) => {
    const from = Math.max(Date.parse(one.start_time), ends.get(one.source) ?? 0);
    const to = from + one.audio_end_ms - one.audio_start_ms;
    ends.set(one.source, to);
    return {one, from, to};
  });
}

function summary(said, {story, speakers}) {
  const shares = [...story.counts(said)]
    .sort((one, other) => other[1] - one[1])
    .map(([name, count]) => `${name} ${percent(count / said.length)}`);
  return `${said.length} utterances of ${speakers.join(", ")}: ${shares.join(", ")}.`;
}
