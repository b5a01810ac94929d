/** What was said, the newest first: one button an utterance, which opens its details. */

import {badge, inWords} from "./emotions.js";
import {button, clock, make} from "./make.js";
import {who, words} from "./story.js";

/** Draw `said` into the list `place`; items that haven't changed stay, and keep the focus. */
export function drawUtterances(place, {said, story, selected, onSelect}) {
  const kept = new Map([...place.children].map((item) => [item.dataset.id, item]));
  const items = [...said].reverse().map((one) => {
    const corrected = story.corrections.get(one.id) ?? "";
    const version = [one.rev, corrected].join();
    const old = kept.get(one.id);
    const item =
      old?.dataset.version === version
        ? old
        : renew(old, one, {version, corrected, story, onSelect});
    item.firstChild.setAttribute("aria-pressed", String(one.id === selected));
    kept.delete(one.id);
    return item;
  });
  for (const gone of kept.values()) gone.remove();
  for (const [n, item] of items.entries()) {
    if (place.children[n] !== item) place.insertBefore(item, place.children[n] ?? null);
  }
}

function renew(old, one, {version, corrected, story, onSelect}) {
  const whole = button(
    {class: "utterance", onclick: () => onSelect(one.id)},
    badge(story.label(one), {unsure: story.isUnsure(one)}),
    make(
      "span",
      {class: "gist"},
      make("span", {class: "felt"}, corrected ? `${corrected} ` : inWords(one.emotion)),
      corrected
        ? make("span", {class: "soft"}, `✓ corrected, read as ${inWords(one.emotion)}`)
        : null,
      one.conflict ? make("span", {class: "conflict"}, " ≠ voice and words contradict") : null,
    ),
    make("span", {class: "when soft"}, `${who(one)}, ${clock(one.start_time)}`),
    make("span", {class: "words"}, words(one)),
  );
  const item = old ?? make("li");
  if (old) old.firstChild.replaceWith(whole);
  else item.append(whole);
  item.dataset.id = one.id;
  item.dataset.version = version;
  return item;
}

/** What is being said now, a line for each source. */
export function drawRunning(place, running) {
  place.replaceChildren(
    ...running.map((one) =>
      make(
        "p",
        {class: "running"},
        make("span", {class: "soft"}, `${who(one)} `),
        one.emotion ? badge(one.emotion.label, {unsure: true}) : null,
        one.emotion ? make("span", {class: "felt"}, ` perhaps ${one.emotion.label}: `) : null,
        make("span", {class: "words"}, one.text || "…"),
      ),
    ),
  );
}

/** Say a finished utterance to those who listen to the page. */
export function announce(place, one) {
  const felt = inWords(one.emotion) + (one.conflict ? ", voice and words contradict" : "");
  place.append(make("p", {}, `${who(one)}, ${felt}: ${words(one)}`));
  while (place.children.length > 3) place.firstChild.remove();
}
