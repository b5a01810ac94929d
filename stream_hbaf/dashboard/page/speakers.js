/** Who spoke: the name with its certainty, and the form that puts it right. */

import {button, html} from "./dom.js";
import {percent} from "./format.js";
import {speakerName} from "./store.js";

const SOURCES = {
  source: "named in the settings",
  voice: "by voice",
  enrolled: "by an enrolled voice",
  corrected: "by correction",
};

/** The speaker, and where the voice decides, how surely. */
export function speakerInWords(utterance) {
  const {speaker_score: score, speaker_source: source} = utterance;
  if (source === "corrected") return `${speakerName(utterance)} (${SOURCES.corrected})`;
  if (score == null) return speakerName(utterance);
  return `${speakerName(utterance)} (${SOURCES[source] ?? "by voice"}, ${percent(score)})`;
}

/** A form for the speaker of `utterance`: one click for one of `names`, or a new name.
 *
 * `onCorrect` is called with a name, and whether all utterances of the present speaker are meant.
 */
export function drawSpeakers(utterance, {names, onCorrect}) {
  const present = utterance.speaker;
  const all = html("input", {type: "checkbox", id: "speaker-all"});
  const isAll = () => all.checked;
  const field = html("input", {
    id: "speaker-name",
    maxlength: 64,
    autocomplete: "off",
    placeholder: "Somebody else",
    "aria-label": "Another name",
  });
  const give = () => field.value.trim() && onCorrect(field.value.trim(), isAll());
  const mayBeAll = present && ["voice", "enrolled", "corrected"].includes(utterance.speaker_source);
  return html(
    "fieldset",
    {class: "correction"},
    html("legend", {}, "Who was it?"),
    names.map((name) =>
      button(
        {
          id: `speaker-${name}`,
          "aria-pressed": String(name === present),
          onclick: () => onCorrect(name, isAll()),
        },
        name,
      ),
    ),
    html(
      "span",
      {class: "other"},
      field,
      button({id: "speaker-give", onclick: give}, "Name"),
    ),
    mayBeAll && names.length
      ? html("label", {class: "soft"}, all, ` all utterances of ${present} here`)
      : null,
  );
}
