/** What has happened, as far as the page was told: of this run, or of a recording. */

const LEVELS = 300; // half a minute
const LONGEST = 2000; // utterances; the server remembers about as many

export class Story {
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

  /** Take one event in; true if a finished utterance came or changed. */
  take(event) {
    switch (event.event) {
      case "utterance":
        return this.#takeUtterance(event);
      case "partial":
        return this.#takePartial(event);
      case "feedback":
        this.corrections.set(event.id, event.label);
        return true;
      case "level": {
        const levels = getOrMake(this.levels, event.source, () => []);
        levels.push(event);
        if (levels.length > LEVELS) levels.shift();
        return false;
      }
      case "status":
        getOrMake(this.states, event.source, () => new Map()).set(event.stage, event);
        return false;
      case "switch":
        getOrMake(this.switches, event.source, () => new Map()).set(event.switch, event.on);
        return false;
      case "health":
        this.health = event;
        return false;
      default:
        return false;
    }
  }

  #takeUtterance(event) {
    const before = this.utterances.get(event.id);
    if (before && before.rev >= event.rev) return false;
    // A pause without words must not wipe out the words that ran so far.
    const words = event.text || event.type === "end" ? event.text : before?.text;
    this.utterances.set(event.id, {...event, text: words ?? ""});
    if (this.utterances.size > LONGEST) this.utterances.delete(this.utterances.keys().next().value);
    return event.type === "end";
  }

  #takePartial(event) {
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

  /** What a source's speaker was saying at a moment (Unix ms). */
  saidAt(source, moment) {
    return this.finished().find(
      (said) =>
        said.source === source &&
        Date.parse(said.start_time) <= moment &&
        moment < Date.parse(said.end_time),
    );
  }

  /** What is being said now. */
  running() {
    return [...this.utterances.values()].filter((one) => one.type !== "end");
  }

  /** Dialogues with finished utterances: [{id, start, turns, speakers}], the newest first. */
  dialogues() {
    const found = new Map();
    for (const said of this.finished()) {
      const dialogue = getOrMake(found, said.dialogue_id, () => ({
        id: said.dialogue_id,
        start: said.start_time,
        turns: 0,
        speakers: new Set(),
      }));
      dialogue.turns += 1;
      dialogue.speakers.add(who(said));
    }
    return [...found.values()].reverse();
  }

  /** What counts as an utterance's emotion: somebody's correction, else what was read. */
  label(said) {
    return this.corrections.get(said.id) ?? said.emotion?.label ?? "";
  }

  /** Whether that is a mere guess. */
  isUnsure(said) {
    return Boolean(said.emotion?.abstained) && !this.corrections.has(said.id);
  }

  /** How often each emotion was heard; guesses are counted under "unsure". */
  counts(said) {
    const found = new Map();
    for (const one of said) {
      const name = this.isUnsure(one) ? "unsure" : this.label(one) || "none";
      found.set(name, (found.get(name) ?? 0) + 1);
    }
    return found;
  }
}

export function who(said) {
  return said.speaker || said.source;
}

/** What was said; where it was understood but may not be shown, that. */
export function words(said) {
  return said.text || (said.language ? "(words are kept back)" : "(no words)");
}

function getOrMake(map, key, fresh) {
  if (!map.has(key)) map.set(key, fresh());
  return map.get(key);
}
