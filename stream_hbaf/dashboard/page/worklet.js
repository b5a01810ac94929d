/** Runs beside the page: gathers 40 ms or so of sound, as 16-bit samples, and hands it over. */

const GATHERED = 2048; // samples

class Recorder extends AudioWorkletProcessor {
  #samples = new Int16Array(GATHERED);
  #count = 0;

  process([channels]) {
    for (const sample of channels[0] ?? []) {
      this.#samples[this.#count++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.#count === GATHERED) {
        this.port.postMessage(this.#samples.buffer, [this.#samples.buffer]);
        this.#samples = new Int16Array(GATHERED);
        this.#count = 0;
      }
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
