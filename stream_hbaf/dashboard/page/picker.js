/** The choice of what is shown: this run, one of its dialogues, or a recording. */

import {html} from "./dom.js";

/** Fill a `<select>` with the choices, and select one of them. */
export function drawPicker(picker, {dialogues, recordings, value}) {
  if (document.activeElement === picker) return; // its list may be open
  picker.replaceChildren(
    html("option", {value: ""}, "This run"),
    group("Dialogues of this run", dialogues.map(dialogueOption)),
    group("Recordings", recordings.map(recordingOption)),
  );
  picker.value = value;
}

/** The meaning of an option's value: {dialogue, recording}, both "" for this run. */
export function readChoice(value) {
  const [, kind, name] = value.match(/^(\w+) (.*)$/s) ?? [];
  return {
    dialogue: kind === "dialogue" ? name : "",
    recording: kind === "recording" ? name : "",
  };
}

function group(label, options) {
  return options.length ? html("optgroup", {label}, options) : "";
}

function dialogueOption({id, start, turns, speakers}) {
  return html("option", {value: `dialogue ${id}`}, title(start, turns, speakers));
}

function recordingOption({name, error, start_time, utterances, speakers}) {
  const text = error ?? title(start_time, utterances, speakers);
  return html("option", {value: `recording ${name}`, disabled: Boolean(error)}, text);
}

function title(start, turns, speakers) {
  const time = new Date(start).toLocaleString([], {dateStyle: "short", timeStyle: "short"});
  return [time, `${turns} utterances`, ...speakers].join(", ");
}
