/** The appearance of labels: a letter, and a colour of Okabe and Ito's palette, which colour-blind
 * people can distinguish. Colour is never the only mark. */

import {html} from "./dom.js";
import {percent} from "./format.js";

const COLOURS = {
  anger: "#d55e00",
  disgust: "#009e73",
  fear: "#cc79a7",
  joy: "#f0e442",
  neutral: "#a8a8a8",
  sadness: "#0072b2",
  surprise: "#56b4e9",
};
// Labels of other models that get the colour of a similar one.
const SIMILAR = {
  angry: "anger",
  frustrated: "anger",
  mad: "anger",
  disgusted: "disgust",
  fearful: "fear",
  scared: "fear",
  happy: "joy",
  happiness: "joy",
  joyful: "joy",
  excited: "surprise",
  calm: "neutral",
  sad: "sadness",
  surprised: "surprise",
};
const SPARE = ["#e69f00", "#d6cf9a", "#8cd0b8", "#e9b8d2", "#f4a57a"]; // for all other labels
const DARK = new Set(["#0072b2"]); // colours that need white text
const UNKNOWN = {colour: "#a8a8a8", letter: "–", ink: "#000"};

let appearances = new Map();

/** Set the model's labels; each gets a letter and a colour that no other label has. */
export function setLabels(labels) {
  appearances = new Map();
  const taken = new Set(),
    spare = [...SPARE],
    colours = new Set();
  for (const label of labels) {
    let colour = COLOURS[label] ?? COLOURS[SIMILAR[label]];
    if (!colour || colours.has(colour)) colour = spare.shift() ?? UNKNOWN.colour;
    colours.add(colour);
    const letters = [...label.toUpperCase(), ..."ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"];
    const letter = letters.find((one) => !taken.has(one)) ?? "·";
    taken.add(letter);
    appearances.set(label, {colour, letter, ink: DARK.has(colour) ? "#fff" : "#000"});
  }
}

export function labels() {
  return [...appearances.keys()];
}

/** {colour, letter, ink} of a label. */
export function appearance(label) {
  return appearances.get(label) ?? UNKNOWN;
}

/** The letter in its colour; an abstention has a dashed edge and a question mark. */
export function badge(label, {unsure = false} = {}) {
  const {colour, letter, ink} = appearance(label);
  return html(
    "span",
    {
      class: unsure ? "badge unsure" : "badge",
      "aria-hidden": "true",
      "--emotion": colour,
      "--on-emotion": ink,
    },
    unsure ? `${label && letter}?` : letter,
  );
}

/** An emotion as text; an abstention is called unsure. */
export function describe(emotion) {
  if (!emotion) return "no emotion";
  const score = emotion.score == null ? "" : ` ${percent(emotion.score)}`;
  return emotion.abstained
    ? `unsure, perhaps ${emotion.label}${score}`
    : `${emotion.label}${score}`;
}
