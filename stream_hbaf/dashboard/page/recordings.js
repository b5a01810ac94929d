/** Sessions that were recorded: their list, their events, and their sound, which can be played. */

import {make} from "./make.js";
import {Story} from "./story.js";

/** What there is: [{name, start_time, utterances, speakers} or {name, error}], the newest first. */
export async function listRecordings() {
  try {
    const answer = await fetch("recordings");
    return answer.ok ? await answer.json() : [];
  } catch {
    return []; // the connection has gone, which the page says already
  }
}

/** One recording, ready to be shown and played. */
export class Recording {
  #audio = new Map(); // source -> <audio>
  #stretches = new Map(); // source -> [{time, opened_ms, file_ms, length_ms}]
  #stopAt = null; // seconds in the file

  /** `onMoment` gets the source and the Unix time (ms) that is heard now. */
  constructor(name, onMoment) {
    this.name = name;
    this.story = new Story();
    this.onMoment = onMoment;
  }

  /** Fetch it; throws an Error with one line if that fails. */
  async load() {
    const answer = await fetch(`recordings/${encodeURIComponent(this.name)}`);
    if (!answer.ok) throw new Error((await answer.text()).trim());
    const {labels, events, sounds} = await answer.json();
    this.labels = labels;
    for (const event of events) this.story.take(event);
    for (const {source, stretches} of sounds) this.#add(source, stretches);
    return this;
  }

  #add(source, stretches) {
    const path = `recordings/${encodeURIComponent(this.name)}/${encodeURIComponent(source)}.flac`;
    const audio = make("audio", {
      controls: true,
      preload: "metadata",
      src: path,
      "aria-label": `Sound of ${source}`,
    });
    audio.ontimeupdate = () => this.#moved(source, audio);
    audio.onseeking = () => {
      if (audio.currentTime >= this.#stopAt) this.#stopAt = null;
    };
    this.#audio.set(source, audio);
    this.#stretches.set(source, stretches);
  }

  /** The players, a line for each source. */
  show(place) {
    place.replaceChildren(
      ...[...this.#audio].map(([source, audio]) =>
        make("figure", {class: "sound"}, make("figcaption", {}, source), audio),
      ),
    );
  }

  /** What plays an utterance, or null if it has no sound. */
  player(said) {
    const audio = this.#audio.get(said.source);
    const from = this.#inFile(said.source, said.audio_start_ms);
    if (!audio || from == null) return null;
    return () => {
      for (const other of this.#audio.values()) other.pause();
      audio.currentTime = from / 1000;
      this.#stopAt = (from + said.audio_end_ms - said.audio_start_ms) / 1000;
      audio.play();
    };
  }

  stop() {
    for (const audio of this.#audio.values()) audio.pause();
  }

  #moved(source, audio) {
    if (this.#stopAt != null && audio.currentTime >= this.#stopAt) {
      this.#stopAt = null;
      audio.pause();
    }
    const place = audio.currentTime * 1000;
    const stretch = this.#stretches.get(source).findLast(({file_ms}) => place >= file_ms);
    if (stretch) this.onMoment(source, Date.parse(stretch.time) + place - stretch.file_ms);
  }

  /** Pauses of the recording and lost sound aren't in the file: places there differ from times. */
  #inFile(source, ms) {
    const stretch = this.#stretches
      .get(source)
      ?.find(({opened_ms, length_ms}) => ms >= opened_ms && ms < opened_ms + length_ms);
    return stretch ? stretch.file_ms + ms - stretch.opened_ms : null;
  }
}
