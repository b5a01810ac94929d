/** The details of one utterance: prediction, contributions, latency; and buttons to correct it. */

import {button, html, table} from "./dom.js";
import {appearance, badge, describe, labels} from "./emotions.js";
import {clock, milliseconds, percent} from "./format.js";
import {drawSpeakers, speakerInWords} from "./speakers.js";
import {transcript} from "./store.js";

const INPUTS = {audio: "the voice", text: "the words", context: "the dialogue before"};
const MODALITIES = {audio: "voice", text: "words"};
const STAGES = {
  vad: "silence that confirms the end",
  transcript: "then waiting for the words",
  acoustic: "acoustic features",
  text: "text features",
  classify: "prediction",
  publish: "handing over to publishers",
};

/** Draw an utterance's details; `onCorrect` is called with a label, `onSpeaker` with a speaker,
 * `onPlay` plays its audio. All may be null. */
export function drawDetails(place, utterance, {corrected, names, onCorrect, onSpeaker, onPlay}) {
  if (!utterance) {
    place.replaceChildren(html("p", {class: "soft"}, "No utterance yet."));
    return;
  }
  const {emotion} = utterance;
  place.replaceChildren(
    ...[
      headline(emotion, corrected),
      html("p", {class: "soft"}, origin(utterance)),
      html("blockquote", {}, transcript(utterance)),
      onPlay ? button({id: "play", onclick: onPlay}, "Play this") : null,
      certainty(emotion),
      utterance.conflict
        ? html("p", {class: "conflict"}, "≠ Voice alone and words alone contradict each other.")
        : null,
      probabilities(emotion),
      contributions(utterance),
      inferences(utterance.inferences),
      latency(utterance.latency_ms),
      utterance.degraded
        ? html("p", {class: "warning"}, `▲ Something failed: ${utterance.degraded}`)
        : null,
      onCorrect ? correction(corrected, onCorrect) : null,
      onSpeaker ? drawSpeakers(utterance, {names, onCorrect: onSpeaker}) : null,
    ].filter(Boolean),
  );
}

function headline(emotion, corrected) {
  const unsure = emotion?.abstained && !corrected;
  return html(
    "p",
    {class: "headline"},
    badge(corrected || emotion?.label, {unsure}),
    corrected
      ? ` ${corrected}, by correction; predicted ${describe(emotion)}`
      : ` ${describe(emotion)}`,
  );
}

function origin(utterance) {
  const inputs = utterance.modalities.map((one) => MODALITIES[one]).join(" and ");
  const time = `${speakerInWords(utterance)}, ${clock(utterance.start_time)}`;
  return inputs ? `${time}, predicted from ${inputs}` : time;
}

/** An abstention, and the prediction set. */
function certainty(emotion) {
  if (!emotion?.set.length && !emotion?.abstained) return null;
  const set =
    emotion.set.length > 1
      ? `It may be any of: ${emotion.set.join(", ")}.`
      : emotion.set.length
        ? `Nothing but ${emotion.set[0]} is likely.`
        : "";
  return html("p", {}, emotion.abstained ? "Too unsure to rely on. " : "", set);
}

function probabilities(emotion) {
  const shares = Object.entries(emotion?.probabilities ?? {});
  if (!shares.length) return null;
  shares.sort((one, other) => other[1] - one[1]);
  return table(
    "Probabilities",
    ["Emotion", "", "Share"],
    shares.map(([label, share]) => [
      html(
        "span",
        {class: emotion.set.includes(label) ? "in-set" : "soft"},
        badge(label),
        ` ${label}`,
      ),
      bar(share, appearance(label).colour),
      percent(share),
    ]),
  );
}

function bar(share, colour) {
  return html("span", {
    class: "bar",
    "--share": `${Math.max(0, Math.min(1, share)) * 100}%`,
    "--emotion": colour,
  });
}

function contributions(utterance) {
  if (!utterance.contributions) return null;
  return table(
    `What spoke for ${utterance.emotion.label}, and against`,
    ["Input", "", "Share"],
    Object.entries(INPUTS).map(([input, name]) => {
      const share = utterance.contributions[input];
      const sign = share > 0 ? "+" : share < 0 ? "−" : "";
      return [name, signedBar(share), `${sign}${percent(Math.abs(share)) || "0 %"}`];
    }),
  );
}

/** A bar from the middle: to the right for a positive share, hatched to the left for a negative. */
function signedBar(share) {
  const half = `${Math.min(1, Math.abs(share)) * 50}%`;
  return html("span", {class: share < 0 ? "balance against" : "balance for", "--share": half});
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
        "Inferred from the words",
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
    `${milliseconds(spent.total)} from the end of speech to the prediction`,
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
  const legend = html("legend", {}, "What was it really?");
  return html("fieldset", {class: "correction"}, legend, choices);
}
