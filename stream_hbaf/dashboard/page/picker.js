/** The choice of what is shown: this run, one of its dialogues, or a recording. */

import {make} from "./make.js";

/** Draw the choices into a `<select>`, and choose one of them. */
export function drawPicker(picker, {dialogues, recordings, value}) {
  if (document.activeElement === picker) return; // it may be open: nothing may move in it
  picker.replaceChildren(
    make("option", {value: ""}, "This run"),
    group("Dialogues of this run", dialogues.map(dialogueOption)),
    group("Recordings", recordings.map(recordingOption)),
  );
  picker.value = value;
}

/** What a choice means: {dialogue, recording}, both "" for this run. */
export function readChoice(value) {
  const [, kind, name] = value.match(/^(\w+) (.*)$/s) ?? [];
  return {
    dialogue: kind === "dialogue" ? name : "",
    recording: kind === "recording" ? name : "",
  };
}

function group(label, options) {
  return options.length ? make("optgroup", {label}, options) : "";
}

function dialogueOption({id, start, turns, speakers}) {
  return make("option", {value: `dialogue ${id}`}, told(start, turns, speakers));
}

function recordingOption({name, error, start_time, utterances, speakers}) {
  const text = error ?? told(start_time, utterances, speakers);
  return make("option", {value: `recording ${name}`, disabled: Boolean(error)}, text);
}

function told(start, turns, speakers) {
  const time = new Date(start).toLocaleString([], {dateStyle: "short", timeStyle: "short"});
  return [time, `${turns} utterances`, ...speakers].join(", ");
}
