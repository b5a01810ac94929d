/** The page: events go to a store, and what they change is drawn at the next animation frame. */

import {Connection} from "./connection.js";
import {drawControls} from "./controls.js";
import {drawDetails} from "./details.js";
import {html} from "./dom.js";
import {badge, labels, setLabels} from "./emotions.js";
import {drawHealth} from "./health.js";
import {drawLevels} from "./level.js";
import {drawPicker, readChoice} from "./picker.js";
import {Recording, listRecordings} from "./recordings.js";
import {EventStore, speakersOf} from "./store.js";
import {drawTable, drawTimeline, markMoment} from "./timeline.js";
import {announce, drawRunning, drawUtterances} from "./utterances.js";

const REFRESH_MS = 10000; // of health and the list of recordings
const NOTICE_MS = 6000;
const SHOWN = 100; // utterances of a long run, until older ones are requested
const MORE = 400;

const byId = (id) => document.getElementById(id);
const live = new EventStore();
const narrow = matchMedia("(max-width: 56rem)");

let server = {info: {labels: []}, microphones: [], recordings: false, control: false};
let dialogue = ""; // of this run that is shown; "": all
let recording = null; // shown instead of this run
let recordings = []; // that can be chosen
let chosen = null; // id of the utterance whose details are shown; null: the newest
let detailed = null; // id of the utterance whose details were drawn last
let moment = null; // of the recording that is played now
let limit = SHOWN;
const due = new Set(); // parts to draw at the next animation frame

const connection = new Connection({
  onEvent: receive,
  onState(connected) {
    document.body.classList.toggle("offline", !connected);
    byId("connection").textContent = connected
      ? "● Connected"
      : "○ Not connected. If it was started anew with a token, open the address that it printed.";
  },
});

function receive(event) {
  if (event.event === "snapshot") return receiveSnapshot(event);
  const finished = live.add(event);
  if (finished && event.event === "utterance" && !event.revision && !recording)
    announce(byId("announcements"), event);
  if (finished && event.event === "feedback") recording?.store.add(event);
  if (event.event === "info") setServer({...server, info: event});
  if (event.event === "level") return plan("levels");
  if (event.event === "switch") plan("controls");
  return plan(...(finished ? ["running", "utterances", "picker"] : ["running", "health"]));
}

function receiveSnapshot(event) {
  live.clear();
  for (const past of event.history) live.add(past);
  setServer(event);
  refreshHealth();
  refreshRecordings();
}

function setServer(description) {
  server = description;
  if (!recording) setLabels(server.info.labels);
  plan("running", "utterances", "picker", "controls", "health", "about");
}

async function refreshHealth() {
  if (!server.control || document.hidden) return;
  const response = await connection.request("get_state");
  if (response.status === "ok" && response.data.health)
    live.add({event: "health", ...response.data.health});
  plan("health");
}
setInterval(refreshHealth, REFRESH_MS);

async function refreshRecordings() {
  if (!server.recordings || document.hidden) return;
  recordings = await listRecordings();
  plan("picker");
}
setInterval(refreshRecordings, REFRESH_MS);

const drawings = {
  levels: () => drawLevels(byId("levels"), live.levels),
  running: () => drawRunning(byId("running"), live.running()),
  health: () => drawHealth(byId("figures"), live),
  utterances: drawView,
  moment: () => markMoment(byId("timeline"), moment),
  controls: () =>
    keepFocus(() =>
      drawControls(byId("controls"), {server, switches: live.switches, request, onMicrophone}),
    ),
  picker: () =>
    drawPicker(byId("picker"), {
      dialogues: live.dialogues(),
      recordings,
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

/** Timeline, list and details of the run, dialogue or recording that is shown. */
function drawView() {
  const store = recording?.store ?? live;
  if (!live.finished(dialogue).length) dialogue = ""; // it has been erased
  const all = store.finished(recording ? "" : dialogue);
  const utterances = recording ? all : all.slice(-limit);
  // While the pointer or the focus is in the details they must not change to another utterance.
  const held = byId("selected").matches(":hover, :focus-within") ? detailed : null;
  const one = utterances.find(({id}) => id === (chosen ?? held)) ?? utterances.at(-1);
  detailed = one?.id;
  const view = {utterances, store, selected: detailed, onSelect: choose};
  byId("older").hidden = utterances.length === all.length;
  byId("nothing").hidden = utterances.length > 0;
  byId("forget").hidden = !server.control || !one;
  byId("forget").onclick = () => forget(one.dialogue_id, store);
  drawLegend(all, store);
  drawTimeline(byId("timeline"), byId("lane-names"), view);
  markMoment(byId("timeline"), moment);
  if (byId("table").parentElement.open) drawTable(byId("table"), view);
  drawUtterances(byId("utterances"), view);
  placeDetails(one);
  drawSelected(one, store);
}

/** Draw the details if they have changed: new buttons would swallow a click in progress. */
function drawSelected(one, store) {
  const corrected = store.corrections.get(one?.id) ?? "";
  const said = speakersOf(store.finished(one?.dialogue_id));
  const names = [...new Set([...said, ...(server.info.speakers ?? [])])];
  const version = [
    recording?.name,
    one?.id,
    one?.rev,
    one?.speaker,
    corrected,
    ...names,
    server.control,
    ...labels(),
  ].join();
  if (version === byId("details").dataset.version) return;
  byId("details").dataset.version = version;
  keepFocus(() =>
    drawDetails(byId("details"), one, {
      corrected,
      names,
      onCorrect: server.control ? (label) => correct(one, label) : null,
      onSpeaker: server.control ? (name, all) => correctSpeaker(one, name, all) : null,
      onPlay: recording && one ? recording.play(one) : null,
    }),
  );
}

/** Draw, then give the focus back to the new element with the same id. */
function keepFocus(drawAnew) {
  const focused = document.activeElement?.id;
  drawAnew();
  if (focused && document.activeElement?.id !== focused) byId(focused)?.focus();
}

function drawLegend(utterances, store) {
  const counts = store.counts(utterances);
  const item = (name, mark) =>
    html("li", {class: counts.has(name) ? "" : "soft"}, mark, ` ${name} ${counts.get(name) ?? 0}`);
  byId("legend").replaceChildren(
    ...labels().map((label) => item(label, badge(label))),
    item("unsure", badge("", {unsure: true})),
  );
}

/** On a phone the details of a chosen utterance open below it, else beside the list. */
function placeDetails(one) {
  const below = narrow.matches && chosen && one?.id === chosen;
  const item =
    below && [...byId("utterances").children].find(({dataset}) => dataset.id === chosen);
  const home = item || byId("aside");
  if (byId("selected").parentElement !== home) {
    if (item) item.append(byId("selected"));
    else home.prepend(byId("selected"));
  }
  byId("selected").hidden = narrow.matches && !chosen;
  byId("selected-title").textContent = chosen ? "This utterance" : "Newest utterance";
}

function choose(id) {
  chosen = id === chosen ? null : id;
  plan("utterances");
}

async function correct(utterance, label) {
  const response = await connection.request("correct", {id: utterance.id, label, by: "page"});
  notify(response.status === "ok" ? `Saved: this was ${label}.` : `Not saved: ${response.error}`);
  if (response.status === "ok" && recording)
    recording.store.add({event: "feedback", id: utterance.id, label});
  plan("utterances");
}

/** Say who spoke an utterance, or with `all`, who the speaker of several is. */
async function correctSpeaker(one, name, all) {
  const known = speakersOf((recording?.store ?? live).finished(one.dialogue_id));
  const one_is = {speaker: one.speaker, dialogue_id: one.dialogue_id};
  const response = await (!all
    ? connection.request("correct", {id: one.id, speaker: name, by: "page"})
    : known.includes(name)
      ? connection.request("merge_speakers", {...one_is, into: name})
      : connection.request("rename_speaker", {...one_is, name}));
  notify(response.status === "ok" ? `Saved: this was ${name}.` : `Not saved: ${response.error}`);
  if (response.status === "ok" && recording && !all)
    recording.store.add({event: "feedback", id: one.id, speaker: name});
  plan("utterances");
}

async function forget(dialogueId, store) {
  const count = store.finished(dialogueId).length;
  if (!confirm(`Erase this dialogue, its ${count} utterances and their audio, everywhere?`)) return;
  const response = await connection.request("forget", {dialogue_id: dialogueId});
  notify(response.status === "ok" ? "Erased." : `Not erased: ${response.error}`);
  if (recording) byId("picker").dispatchEvent(new Event("change"));
}

async function request(command, parameters, success = "") {
  const response = await connection.request(command, parameters);
  notify(response.status === "ok" ? success : response.error);
}

/** Show the choice of the picker. */
async function showChoice({target}) {
  const choice = readChoice(target.value);
  recording?.stop();
  chosen = moment = recording = null;
  dialogue = choice.dialogue;
  limit = SHOWN;
  if (choice.recording) await openRecording(choice.recording);
  setLabels(recording?.labels ?? server.info.labels);
  byId("player").hidden = !recording;
  plan("utterances", "picker");
}

async function openRecording(name) {
  const opened = new Recording(name, (source, now) => {
    if (opened === recording) onPlayed(source, now);
  });
  try {
    await opened.load();
  } catch (error) {
    return notify(error.message);
  }
  if (readChoice(byId("picker").value).recording !== name) return; // another was chosen meanwhile
  recording = opened;
  recording.drawPlayers(byId("sounds"));
}

/** During playback: mark the moment, and show the utterance that is heard. */
function onPlayed(source, now) {
  moment = now;
  const utterance = recording.store.utteranceAt(source, now);
  if (!utterance || utterance.id === chosen) return plan("moment");
  chosen = utterance.id;
  return plan("utterances");
}

function drawAbout() {
  const {info} = server;
  const privacy = {
    full: "",
    no_text: " Transcripts don't leave the recogniser.",
    label_only: " Only labels leave the recogniser.",
  };
  byId("about").textContent =
    `stream-hbaf ${info.version ?? ""}, model ${info.model?.id ?? ""}. ` +
    `${info.licence ?? ""}.${privacy[info.privacy] ?? ""} ` +
    "Emotions are a model's guesses, not facts about people.";
}

let hiding = 0; // timer of the notice
function notify(line) {
  byId("notice").textContent = line;
  clearTimeout(hiding);
  hiding = setTimeout(() => {
    byId("notice").textContent = "";
  }, NOTICE_MS);
}

function onMicrophone(line) {
  if (line) notify(line);
  plan("controls");
}

for (const departure of ["pointerleave", "focusout"]) {
  byId("selected").addEventListener(departure, () => plan("utterances"));
}
byId("picker").addEventListener("change", showChoice);
byId("picker").addEventListener("blur", () => plan("picker"));
narrow.addEventListener("change", () => plan("utterances"));
byId("older").addEventListener("click", () => {
  limit += MORE;
  plan("utterances");
});
byId("table").parentElement.addEventListener("toggle", () => plan("utterances"));
new ResizeObserver(() => plan("utterances", "levels")).observe(byId("timeline"));
