/** The events that the page knows: of this run, or of a recording. */

const MAX_LEVELS = 300; // half a minute
const SURE = 0.8; // probability of a speaker below which the name has a question mark
const MAX_UTTERANCES = 2000; // about as many as the server keeps

export class EventStore {
  constructor() {
    this.clear();
  }

  clear() {
    this.utterances = new Map(); // by id, in the order in which they began
    this.corrections = new Map(); // id -> label
    this.levels = new Map(); // source -> [{dbfs, speech}], the newest last
    this.states = new Map(); // source -> Map of stage -> {state, detail}
    this.switches = new Map(); // source -> Map of switch -> on
    this.health = null;
  }

  /** Add an event; returns whether it finishes or corrects an utterance. */
  add(event) {
    switch (event.event) {
      case "utterance":
        return this.#addUtterance(event);
      case "partial":
        return this.#addPartial(event);
      case "feedback":
        if (event.label) this.corrections.set(event.id, event.label);
        if (event.speaker) this.#correctSpeaker(event);
        return true;
      case "level": {
        const levels = getOrCreate(this.levels, event.source, () => []);
        levels.push(event);
        if (levels.length > MAX_LEVELS) levels.shift();
        return false;
      }
      case "status":
        getOrCreate(this.states, event.source, () => new Map()).set(event.stage, event);
        return false;
      case "switch":
        getOrCreate(this.switches, event.source, () => new Map()).set(event.switch, event.on);
        return false;
      case "health":
        this.health = event;
        return false;
      default:
        return false;
    }
  }

  #addUtterance(event) {
    const before = this.utterances.get(event.id);
    if (before && before.rev >= event.rev) return false;
    // An update without words must not erase the running transcript.
    const text = event.text || event.type === "end" ? event.text : before?.text;
    this.utterances.set(event.id, {...event, text: text ?? ""});
    if (this.utterances.size > MAX_UTTERANCES)
      this.utterances.delete(this.utterances.keys().next().value);
    return event.type === "end";
  }

  /** For a dialogue that is over, and for recordings: else a new `end` says so, and more. */
  #correctSpeaker({id, speaker}) {
    const one = this.utterances.get(id);
    if (!one || one.speaker_source === "corrected") return;
    this.utterances.set(id, {...one, speaker, speaker_source: "corrected", speaker_score: 1});
  }

  #addPartial(event) {
    const running = this.utterances.get(event.id);
    if (running && running.type !== "end") {
      this.utterances.set(event.id, {...running, text: event.text, emotion: event.emotion});
    }
    return false;
  }

  /** Finished utterances of a dialogue, or of all (""), in the order in which they began. */
  finished(dialogue = "") {
    return [...this.utterances.values()].filter(
      (one) => one.type === "end" && (!dialogue || one.dialogue_id === dialogue),
    );
  }

  /** The utterance of a source at a moment (Unix ms). */
  utteranceAt(source, moment) {
    return this.finished().find(
      (one) =>
        one.source === source &&
        Date.parse(one.start_time) <= moment &&
        moment < Date.parse(one.end_time),
    );
  }

  /** Utterances in progress. */
  running() {
    return [...this.utterances.values()].filter((one) => one.type !== "end");
  }

  /** Dialogues with finished utterances: [{id, start, turns, speakers}], the newest first. */
  dialogues() {
    const found = new Map();
    for (const one of this.finished()) {
      const dialogue = getOrCreate(found, one.dialogue_id, () => ({
        id: one.dialogue_id,
        start: one.start_time,
        turns: 0,
        speakers: new Set(),
      }));
      dialogue.turns += 1;
      dialogue.speakers.add(speakerName(one));
    }
    return [...found.values()].reverse();
  }

  /** An utterance's label: the correction if there is one, else the prediction. */
  label(utterance) {
    return this.corrections.get(utterance.id) ?? utterance.emotion?.label ?? "";
  }

  /** Whether the label is an abstention that nobody has corrected. */
  isUnsure(utterance) {
    return Boolean(utterance.emotion?.abstained) && !this.corrections.has(utterance.id);
  }

  /** The number of utterances by label; abstentions count as "unsure". */
  counts(utterances) {
    const found = new Map();
    for (const one of utterances) {
      const name = this.isUnsure(one) ? "unsure" : this.label(one) || "none";
      found.set(name, (found.get(name) ?? 0) + 1);
    }
    return found;
  }
}

/** The speaker; the source if nobody asks who it is. */
export function speakerName(utterance) {
  if (utterance.speaker) return utterance.speaker;
  return utterance.speaker_score == null ? utterance.source : "not sure who";
}

/** Whether the voice says who it is, but not surely. */
export function isSpeakerUnsure({speaker, speaker_score}) {
  return Boolean(speaker) && speaker_score != null && speaker_score < SURE;
}

/** The speakers of some utterances, in the order of their first one. */
export function speakersOf(utterances) {
  return [...new Set(utterances.map(({speaker}) => speaker).filter(Boolean))];
}

/** The transcript, or a remark why there is none. */
export function transcript(utterance) {
  return utterance.text || (utterance.language ? "(words are kept back)" : "(no words)");
}

function getOrCreate(map, key, create) {
  if (!map.has(key)) map.set(key, create());
  return map.get(key);
}
