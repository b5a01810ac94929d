/** Everything about one utterance: how sure, why, how fast; and the place to correct it. */

import {badge, inWords, labels, look} from "./emotions.js";
import {button, clock, make, milliseconds, percent, table} from "./make.js";
import {who, words} from "./story.js";

const PARTS = {audio: "the voice", text: "the words", context: "what came before"};
const STAGES = {
  vad: "silence, to be sure of the end",
  transcript: "then waiting for the words",
  acoustic: "features of the voice",
  text: "features of the words",
  classify: "reading the emotion",
  publish: "handing it over",
};

/** Draw an utterance's details; `onCorrect` gets a label, `onPlay` is null without a recording. */
export function drawDetails(place, said, {corrected, onCorrect, onPlay}) {
  if (!said) {
    place.replaceChildren(make("p", {class: "soft"}, "Nothing was said yet."));
    return;
  }
  place.replaceChildren(
    ...[
      headline(said, corrected),
      make("p", {class: "soft"}, `${who(said)}, ${clock(said.start_time)}${origin(said)}`),
      make("blockquote", {}, words(said)),
      onPlay ? button({id: "play", onclick: onPlay}, "Play this") : null,
      certainty(said.emotion),
      said.conflict
        ? make("p", {class: "conflict"}, "≠ Voice alone and words alone contradict each other.")
        : null,
      probabilities(said.emotion),
      contributions(said),
      inferences(said.inferences),
      latency(said.latency_ms),
      said.degraded ? make("p", {class: "warning"}, `▲ Something failed: ${said.degraded}`) : null,
      onCorrect ? correction(corrected, onCorrect) : null,
    ].filter(Boolean),
  );
}

function headline(said, corrected) {
  const unsure = said.emotion?.abstained && !corrected;
  return make(
    "p",
    {class: "headline"},
    badge(corrected || said.emotion?.label, {unsure}),
    corrected
      ? ` ${corrected}, by correction; read as ${inWords(said.emotion)}`
      : ` ${inWords(said.emotion)}`,
  );
}

function origin(said) {
  const parts = {audio: "voice", text: "words"};
  const heard = said.modalities.map((one) => parts[one]).join(" and ");
  return heard && `, read from ${heard}`;
}

/** What the answer is worth: an abstention is said first. */
function certainty(emotion) {
  if (!emotion?.set.length && !emotion?.abstained) return null;
  const set =
    emotion.set.length > 1
      ? `It may be any of: ${emotion.set.join(", ")}.`
      : emotion.set.length
        ? `Nothing but ${emotion.set[0]} is likely.`
        : "";
  return make("p", {}, emotion.abstained ? "Too unsure to be an answer. " : "", set);
}

function probabilities(emotion) {
  const shares = Object.entries(emotion?.probabilities ?? {});
  if (!shares.length) return null;
  shares.sort((one, other) => other[1] - one[1]);
  return table(
    "Probabilities",
    ["Emotion", "", "Share"],
    shares.map(([label, share]) => [
      make(
        "span",
        {class: emotion.set.includes(label) ? "in-set" : "soft"},
        badge(label),
        ` ${label}`,
      ),
      bar(share, look(label).colour),
      percent(share),
    ]),
  );
}

function bar(share, colour) {
  return make("span", {
    class: "bar",
    "--share": `${Math.max(0, Math.min(1, share)) * 100}%`,
    "--emotion": colour,
  });
}

function contributions(said) {
  if (!said.contributions) return null;
  const label = said.emotion.label;
  return table(
    `What spoke for ${label}, and against`,
    ["Part", "", "Share"],
    Object.entries(PARTS).map(([part, name]) => {
      const share = said.contributions[part];
      const sign = share > 0 ? "+" : share < 0 ? "−" : "";
      return [name, balance(share), `${sign}${percent(Math.abs(share)) || "0 %"}`];
    }),
  );
}

/** A bar from the middle: to the right for, to the left (hatched) against. */
function balance(share) {
  const half = `${Math.min(1, Math.abs(share)) * 50}%`;
  return make("span", {class: share < 0 ? "balance against" : "balance for", "--share": half});
}

function inferences(inferred) {
  if (!inferred) return null;
  const rows = [
    ["Others feel", inferred.external],
    ["The speaker feels", inferred.internal],
    ["The speaker wants", inferred.purpose],
  ].filter(([, phrases]) => phrases.length);
  return rows.length
    ? table(
        "What follows from the words",
        ["", "Perhaps"],
        rows.map(([head, phrases]) => [head, phrases.join(", ")]),
        {class: "phrases"},
      )
    : null;
}

function latency(spent) {
  if (!spent) return null;
  const rows = Object.entries(STAGES).map(([stage, name]) => [
    name,
    bar(spent[stage] / Math.max(1, spent.total), "var(--accent)"),
    milliseconds(spent[stage]),
  ]);
  return table(
    `${milliseconds(spent.total)} from the last sound to the answer`,
    ["Stage", "", "Time"],
    rows,
  );
}

function correction(corrected, onCorrect) {
  const choices = labels().map((label) =>
    button(
      {
        id: `correct-${label}`,
        "aria-pressed": String(label === corrected),
        onclick: () => onCorrect(label),
      },
      badge(label),
      ` ${label}`,
    ),
  );
  const legend = make("legend", {}, "What was it really?");
  return make("fieldset", {class: "correction"}, legend, choices);
}
