/** How an emotion looks: a colour of Okabe and Ito's palette, which colour-blind people can tell
 * apart, and always a letter with it, since no colour speaks alone. */

import {make, percent} from "./make.js";

const COLOURS = {
  anger: "#d55e00",
  disgust: "#009e73",
  fear: "#cc79a7",
  joy: "#f0e442",
  neutral: "#a8a8a8",
  sadness: "#0072b2",
  surprise: "#56b4e9",
};
// Other models' words for nearly the same, then whatever is left.
const KIN = {
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
const SPARE = ["#e69f00", "#d6cf9a", "#8cd0b8", "#e9b8d2", "#f4a57a"];
const WHITE_ON = new Set(["#0072b2"]);
const UNKNOWN = {colour: "#a8a8a8", letter: "–", ink: "#000"};

let looks = new Map();

/** Settle the looks of a model's labels; each gets a letter that no other has. */
export function learn(labels) {
  looks = new Map();
  const taken = new Set(),
    spare = [...SPARE],
    colours = new Set();
  for (const label of labels) {
    let colour = COLOURS[label] ?? COLOURS[KIN[label]];
    if (!colour || colours.has(colour)) colour = spare.shift() ?? UNKNOWN.colour;
    colours.add(colour);
    const letters = [...label.toUpperCase(), ..."ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"];
    const letter = letters.find((one) => !taken.has(one)) ?? "·";
    taken.add(letter);
    looks.set(label, {colour, letter, ink: WHITE_ON.has(colour) ? "#fff" : "#000"});
  }
}

export function labels() {
  return [...looks.keys()];
}

export function look(label) {
  return looks.get(label) ?? UNKNOWN;
}

/** The letter in its colour; with a dashed edge and a question mark where it is a mere guess. */
export function badge(label, {unsure = false} = {}) {
  const {colour, letter, ink} = look(label);
  return make(
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

/** What is felt, in honest words: a guess is called one. */
export function inWords(emotion) {
  if (!emotion) return "no emotion read";
  const score = emotion.score == null ? "" : ` ${percent(emotion.score)}`;
  return emotion.abstained
    ? `unsure, perhaps ${emotion.label}${score}`
    : `${emotion.label}${score}`;
}
