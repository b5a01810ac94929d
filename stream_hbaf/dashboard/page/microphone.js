/** This browser's microphone as a source: sound goes to the recogniser as it is captured. */

import {socketAddress} from "./connection.js";

const MOST_BEHIND = 1 << 19; // bytes that wait for a slow network; beyond it sound is let go

export class BrowserMicrophone {
  #stop = null;

  /** `onState` gets a line that says what went wrong, empty if nothing did. */
  constructor(source, onState) {
    this.source = source;
    this.onState = onState;
  }

  get on() {
    return this.#stop !== null;
  }

  async toggle() {
    if (this.on) return this.stop("");
    if (!navigator.mediaDevices) {
      return this.onState(
        "off",
        "Browsers lend their microphone to https pages and localhost only.",
      );
    }
    try {
      // What a browser does to make voices pleasant takes emotion out of them.
      const plain = {echoCancellation: false, noiseSuppression: false, autoGainControl: false};
      const stream = await navigator.mediaDevices.getUserMedia({
        audio: {channelCount: 1, ...plain},
      });
      await this.#send(stream);
    } catch (error) {
      this.stop(`No microphone: ${error.message}`);
    }
  }

  async #send(stream) {
    const context = new AudioContext();
    this.#stop = () => {
      for (const track of stream.getTracks()) track.stop();
      context.close();
    };
    stream.getTracks()[0].onended = () => this.stop("The microphone has gone.");
    await context.audioWorklet.addModule("worklet.js");
    const recorder = new AudioWorkletNode(context, "recorder", {numberOfOutputs: 0});
    const socket = this.#open(context.sampleRate);
    recorder.port.onmessage = ({data}) => {
      if (socket.readyState === WebSocket.OPEN && socket.bufferedAmount < MOST_BEHIND)
        socket.send(data);
    };
    context.createMediaStreamSource(stream).connect(recorder);
    const release = this.#stop;
    this.#stop = () => {
      socket.onclose = null;
      socket.close();
      release();
    };
  }

  #open(rate) {
    const socket = new WebSocket(socketAddress(`microphone/${encodeURIComponent(this.source)}`));
    socket.onopen = () => {
      socket.send(JSON.stringify({rate, channels: 1, format: "s16le"}));
      this.onState("");
    };
    socket.onclose = ({reason}) => this.stop(reason || "The recogniser takes no more sound.");
    return socket;
  }

  stop(why) {
    this.#stop?.();
    this.#stop = null;
    this.onState(why);
  }
}
