/** The page: what comes over the connection is kept in a story, and drawn at the next frame. */

import {Connection} from "./connection.js";
import {drawControls} from "./controls.js";
import {drawDetails} from "./details.js";
import {badge, labels, learn} from "./emotions.js";
import {drawLevels} from "./level.js";
import {make} from "./make.js";
import {drawPicker, readChoice} from "./picker.js";
import {Recording, listRecordings} from "./recordings.js";
import {Story} from "./story.js";
import {drawTable, drawTimeline, pointAt} from "./timeline.js";
import {announce, drawRunning, drawUtterances} from "./utterances.js";
import {drawVitals} from "./vitals.js";

const ASK_MS = 10000; // between two questions for health and recordings
const NOTICE_MS = 6000;
const SHOWN = 100; // utterances of a long run, until somebody wishes for older ones
const MORE = 400;

const place = (id) => document.getElementById(id);
const live = new Story();
const narrow = matchMedia("(max-width: 56rem)");

let hello = {info: {labels: []}, microphones: [], recordings: false, control: false};
let dialogue = ""; // of this run that is shown; "": all
let recording = null; // shown instead of this run
let recorded = []; // what can be chosen
let chosen = null; // the utterance whose details are shown; null: the newest
let shown = null; // the utterance whose details were drawn last
let moment = null; // of the recording that is heard now
let atMost = SHOWN;
const due = new Set(); // what is to be drawn at the next frame

const connection = new Connection({
  onEvent: take,
  onState(connected) {
    document.body.classList.toggle("offline", !connected);
    place("connection").textContent = connected
      ? "● Connected"
      : "○ Not connected. If it was started anew with a token, open the address that it printed.";
  },
});

function take(event) {
  if (event.event === "welcome") return welcome(event);
  const finished = live.take(event);
  if (finished && event.event === "utterance" && !recording)
    announce(place("announcements"), event);
  if (finished && event.event === "feedback") recording?.story.take(event);
  if (event.event === "info") meet({...hello, info: event});
  if (event.event === "level") return plan("levels");
  if (event.event === "switch") plan("controls");
  return plan(...(finished ? ["running", "said", "picker"] : ["running", "vitals"]));
}

function welcome(event) {
  live.clear();
  for (const past of event.history) live.take(past);
  meet(event);
  askForHealth();
  lookForRecordings();
}

function meet(event) {
  hello = event;
  if (!recording) learn(hello.info.labels);
  plan("running", "said", "picker", "controls", "vitals", "about");
}

async function askForHealth() {
  if (!hello.control || document.hidden) return;
  const answer = await connection.ask("get_state");
  if (answer.status === "ok" && answer.data.health)
    live.take({event: "health", ...answer.data.health});
  plan("vitals");
}
setInterval(askForHealth, ASK_MS);

async function lookForRecordings() {
  if (!hello.recordings || document.hidden) return;
  recorded = await listRecordings();
  plan("picker");
}
setInterval(lookForRecordings, ASK_MS);

const drawings = {
  levels: () => drawLevels(place("levels"), live.levels),
  running: () => drawRunning(place("running"), live.running()),
  vitals: () => drawVitals(place("vitals"), live),
  said: drawSaid,
  moment: () => pointAt(place("timeline"), moment),
  controls: () =>
    keepFocus(() =>
      drawControls(place("controls"), {hello, switches: live.switches, ask, onMicrophone}),
    ),
  picker: () =>
    drawPicker(place("picker"), {
      dialogues: live.dialogues(),
      recordings: recorded,
      value: recording ? `recording ${recording.name}` : dialogue && `dialogue ${dialogue}`,
    }),
  about: drawAbout,
};

function plan(...names) {
  if (!due.size) requestAnimationFrame(drawDue);
  for (const name of names) due.add(name);
}

function drawDue() {
  const names = [...due];
  due.clear();
  for (const name of names) drawings[name]();
}

function drawSaid() {
  const story = recording?.story ?? live;
  if (!live.finished(dialogue).length) dialogue = ""; // it was forgotten
  const all = story.finished(recording ? "" : dialogue);
  const said = recording ? all : all.slice(-atMost);
  // While somebody points at the details of the newest they mustn't become another's.
  const held = place("selected").matches(":hover, :focus-within") ? shown : null;
  const one = said.find(({id}) => id === (chosen ?? held)) ?? said.at(-1);
  shown = one?.id;
  const view = {said, story, selected: shown, onSelect: choose};
  place("older").hidden = said.length === all.length;
  place("nothing").hidden = said.length > 0;
  place("forget").hidden = !hello.control || !one;
  place("forget").onclick = () => forget(one.dialogue_id, story);
  drawLegend(all, story);
  drawTimeline(place("timeline"), place("lane-names"), view);
  pointAt(place("timeline"), moment);
  if (place("table").parentElement.open) drawTable(place("table"), view);
  drawUtterances(place("utterances"), view);
  placeDetails(one);
  drawChosen(one, story);
}

/** Redrawn only if something has changed: somebody may be about to click in it. */
function drawChosen(one, story) {
  const corrected = story.corrections.get(one?.id) ?? "";
  const version = [
    recording?.name,
    one?.id,
    one?.rev,
    corrected,
    hello.control,
    ...labels(),
  ].join();
  if (version === place("details").dataset.version) return;
  place("details").dataset.version = version;
  keepFocus(() =>
    drawDetails(place("details"), one, {
      corrected,
      onCorrect: hello.control ? (label) => correct(one, label) : null,
      onPlay: recording && one ? recording.player(one) : null,
    }),
  );
}

/** What is drawn anew keeps the focus, if it has a name. */
function keepFocus(drawAnew) {
  const focused = document.activeElement?.id;
  drawAnew();
  if (focused && document.activeElement?.id !== focused) place(focused)?.focus();
}

function drawLegend(said, story) {
  const counts = story.counts(said);
  const item = (name, mark) =>
    make("li", {class: counts.has(name) ? "" : "soft"}, mark, ` ${name} ${counts.get(name) ?? 0}`);
  place("legend").replaceChildren(
    ...labels().map((label) => item(label, badge(label))),
    item("unsure", badge("", {unsure: true})),
  );
}

/** On a phone the details of a chosen utterance open beneath it, else beside the list. */
function placeDetails(one) {
  const beneath = narrow.matches && chosen && one?.id === chosen;
  const item =
    beneath && [...place("utterances").children].find(({dataset}) => dataset.id === chosen);
  const home = item || place("aside");
  if (place("selected").parentElement !== home) {
    if (item) item.append(place("selected"));
    else home.prepend(place("selected"));
  }
  place("selected").hidden = narrow.matches && !chosen;
  place("selected-title").textContent = chosen ? "This utterance" : "Newest utterance";
}

function choose(id) {
  chosen = id === chosen ? null : id;
  plan("said");
}

async function correct(said, label) {
  const answer = await connection.ask("correct", {id: said.id, label, by: "page"});
  notify(answer.status === "ok" ? `Kept: this was ${label}.` : `Not kept: ${answer.error}`);
  if (answer.status === "ok" && recording)
    recording.story.take({event: "feedback", id: said.id, label});
  plan("said");
}

async function forget(dialogueId, story) {
  const count = story.finished(dialogueId).length;
  if (!confirm(`Erase this dialogue, its ${count} utterances and their sound, everywhere?`)) return;
  const answer = await connection.ask("forget", {dialogue_id: dialogueId});
  notify(answer.status === "ok" ? "Forgotten." : `Not forgotten: ${answer.error}`);
  if (recording) place("picker").dispatchEvent(new Event("change"));
}

async function ask(command, wish, done = "") {
  const answer = await connection.ask(command, wish);
  notify(answer.status === "ok" ? done : answer.error);
}

/** Show what was picked instead of what was shown. */
async function show({target}) {
  const choice = readChoice(target.value);
  recording?.stop();
  chosen = moment = recording = null;
  dialogue = choice.dialogue;
  atMost = SHOWN;
  if (choice.recording) await open(choice.recording);
  learn(recording?.labels ?? hello.info.labels);
  place("player").hidden = !recording;
  plan("said", "picker");
}

async function open(name) {
  const opened = new Recording(name, (source, now) => opened === recording && heard(source, now));
  try {
    await opened.load();
  } catch (error) {
    return notify(error.message);
  }
  if (readChoice(place("picker").value).recording !== name) return; // another was picked since
  recording = opened;
  recording.show(place("sounds"));
}

/** A recording is being heard: point at the moment, and show what is being said in it. */
function heard(source, now) {
  moment = now;
  const speaking = recording.story.saidAt(source, now);
  if (!speaking || speaking.id === chosen) return plan("moment");
  chosen = speaking.id;
  return plan("said");
}

function drawAbout() {
  const {info} = hello;
  const privacy = {
    full: "",
    no_text: " Words don't leave the recogniser.",
    label_only: " Only labels leave the recogniser.",
  };
  place("about").textContent =
    `stream-hbaf ${info.version ?? ""}, model ${info.model?.id ?? ""}. ` +
    `${info.licence ?? ""}.${privacy[info.privacy] ?? ""} ` +
    "Emotions are a model's guesses, not facts about people.";
}

let silence = 0;
function notify(line) {
  place("notice").textContent = line;
  clearTimeout(silence);
  silence = setTimeout(() => {
    place("notice").textContent = "";
  }, NOTICE_MS);
}

function onMicrophone(line) {
  if (line) notify(line);
  plan("controls");
}

for (const departure of ["pointerleave", "focusout"]) {
  place("selected").addEventListener(departure, () => plan("said"));
}
place("picker").addEventListener("change", show);
place("picker").addEventListener("blur", () => plan("picker"));
narrow.addEventListener("change", () => plan("said"));
place("older").addEventListener("click", () => {
  atMost += MORE;
  plan("said");
});
place("table").parentElement.addEventListener("toggle", () => plan("said"));
new ResizeObserver(() => plan("said", "levels")).observe(place("timeline"));
