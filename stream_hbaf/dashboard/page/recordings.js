/** Recorded sessions: their list, their events, and their audio. */

import {html} from "./dom.js";
import {EventStore} from "./store.js";

/** All sessions: [{name, start_time, utterances, speakers} or {name, error}], newest first. */
export async function listRecordings() {
  try {
    const answer = await fetch("recordings");
    return answer.ok ? await answer.json() : [];
  } catch {
    return []; // the connection is lost, which the page shows already
  }
}

/** One recording with its players. */
export class Recording {
  #players = new Map(); // source -> <audio>
  #stretches = new Map(); // source -> [{time, opened_ms, file_ms, length_ms}]
  #stopAt = null; // seconds in the file

  /** `onMoment` is called during playback with the source and the recorded Unix time (ms). */
  constructor(name, onMoment) {
    this.name = name;
    this.store = new EventStore();
    this.onMoment = onMoment;
  }

  /** Fetch the events; throws an Error with one line if that fails. */
  async load() {
    const answer = await fetch(`recordings/${encodeURIComponent(this.name)}`);
    if (!answer.ok) throw new Error((await answer.text()).trim());
    const {labels, events, sounds} = await answer.json();
    this.labels = labels;
    for (const event of events) this.store.add(event);
    for (const {source, stretches} of sounds) this.#addPlayer(source, stretches);
    return this;
  }

  #addPlayer(source, stretches) {
    const path = `recordings/${encodeURIComponent(this.name)}/${encodeURIComponent(source)}.flac`;
    const player = html("audio", {
      controls: true,
      preload: "metadata",
      src: path,
      "aria-label": `Audio of ${source}`,
    });
    player.ontimeupdate = () => this.#onTime(source, player);
    player.onseeking = () => {
      if (player.currentTime >= this.#stopAt) this.#stopAt = null;
    };
    this.#players.set(source, player);
    this.#stretches.set(source, stretches);
  }

  /** Draw the players, a line for each source. */
  drawPlayers(place) {
    place.replaceChildren(
      ...[...this.#players].map(([source, player]) =>
        html("figure", {class: "sound"}, html("figcaption", {}, source), player),
      ),
    );
  }

  /** A function that plays an utterance, or null if its audio is missing. */
  play(utterance) {
    const player = this.#players.get(utterance.source);
    const from = this.#positionInFile(utterance.source, utterance.audio_start_ms);
    if (!player || from == null) return null;
    return () => {
      for (const other of this.#players.values()) other.pause();
      player.currentTime = from / 1000;
      this.#stopAt = (from + utterance.audio_end_ms - utterance.audio_start_ms) / 1000;
      player.play();
    };
  }

  stop() {
    for (const player of this.#players.values()) player.pause();
  }

  #onTime(source, player) {
    if (this.#stopAt != null && player.currentTime >= this.#stopAt) {
      this.#stopAt = null;
      player.pause();
    }
    const position = player.currentTime * 1000;
    const stretch = this.#stretches.get(source).findLast(({file_ms}) => position >= file_ms);
    if (stretch) this.onMoment(source, Date.parse(stretch.time) + position - stretch.file_ms);
  }

  /** Pauses of the recording and lost audio are not in the file: positions there are not times. */
  #positionInFile(source, ms) {
    const stretch = this.#stretches
      .get(source)
      ?.find(({opened_ms, length_ms}) => ms >= opened_ms && ms < opened_ms + length_ms);
    return stretch ? stretch.file_ms + ms - stretch.opened_ms : null;
  }
}
