/** An audio worklet: collects samples, as 16-bit integers, and posts them in blocks. */

const BLOCK = 2048; // samples; 43 ms at 48 kHz

class Recorder extends AudioWorkletProcessor {
  #samples = new Int16Array(BLOCK);
  #count = 0;

  process([channels]) {
    for (const sample of channels[0] ?? []) {
      this.#samples[this.#count++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.#count === BLOCK) {
        this.port.postMessage(this.#samples.buffer, [this.#samples.buffer]);
        this.#samples = new Int16Array(BLOCK);
        this.#count = 0;
      }
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
