/** The list of utterances, newest first: one button each, which opens the details. */

import {button, html} from "./dom.js";
import {badge, describe} from "./emotions.js";
import {clock} from "./format.js";
import {isSpeakerUnsure, speakerName, transcript} from "./store.js";

/** Draw `utterances` into the list `place`; items that haven't changed keep the focus. */
export function drawUtterances(place, {utterances, store, selected, onSelect}) {
  const kept = new Map([...place.children].map((item) => [item.dataset.id, item]));
  const items = [...utterances].reverse().map((one) => {
    const corrected = store.corrections.get(one.id) ?? "";
    const version = [one.rev, one.speaker, corrected].join();
    const old = kept.get(one.id);
    const item =
      old?.dataset.version === version
        ? old
        : drawItem(old, one, {version, corrected, store, onSelect});
    item.firstChild.setAttribute("aria-pressed", String(one.id === selected));
    kept.delete(one.id);
    return item;
  });
  for (const gone of kept.values()) gone.remove();
  for (const [n, item] of items.entries()) {
    if (place.children[n] !== item) place.insertBefore(item, place.children[n] ?? null);
  }
}

function drawItem(old, one, {version, corrected, store, onSelect}) {
  const content = button(
    {class: "utterance", onclick: () => onSelect(one.id)},
    badge(store.label(one), {unsure: store.isUnsure(one)}),
    html(
      "span",
      {},
      html("span", {class: "emotion"}, corrected ? `${corrected} ` : describe(one.emotion)),
      corrected
        ? html("span", {class: "soft"}, `✓ corrected, predicted ${describe(one.emotion)}`)
        : null,
      one.conflict ? html("span", {class: "conflict"}, " ≠ voice and words contradict") : null,
    ),
    html(
      "span",
      {class: "when soft"},
      `${speakerName(one)}${isSpeakerUnsure(one) ? "?" : ""}, ${clock(one.start_time)}`,
    ),
    html("span", {class: "words"}, transcript(one)),
  );
  const item = old ?? html("li");
  if (old) old.firstChild.replaceWith(content);
  else item.append(content);
  item.dataset.id = one.id;
  item.dataset.version = version;
  return item;
}

/** Draw the running transcripts, a line for each utterance in progress. */
export function drawRunning(place, running) {
  place.replaceChildren(
    ...running.map((one) =>
      html(
        "p",
        {class: "running"},
        html("span", {class: "soft"}, `${speakerName(one)} `),
        one.emotion ? badge(one.emotion.label, {unsure: true}) : null,
        one.emotion ? html("span", {class: "emotion"}, ` perhaps ${one.emotion.label}: `) : null,
        html("span", {class: "words"}, one.text || "…"),
      ),
    ),
  );
}

/** Announce a finished utterance to screen readers: `place` is an ARIA live region. */
export function announce(place, one) {
  const emotion = describe(one.emotion) + (one.conflict ? ", voice and words contradict" : "");
  place.append(html("p", {}, `${speakerName(one)}, ${emotion}: ${transcript(one)}`));
  while (place.children.length > 3) place.firstChild.remove();
}
