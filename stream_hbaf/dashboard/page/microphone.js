/** This browser's microphone as an audio source of the recogniser. */

import {socketAddress} from "./connection.js";

const MAX_BUFFERED = 1 << 19; // bytes that wait for a slow network; beyond it audio is dropped

export class BrowserMicrophone {
  #release = null;

  /** `onState` is called with a line that says what went wrong, empty if nothing did. */
  constructor(source, onState) {
    this.source = source;
    this.onState = onState;
  }

  get on() {
    return this.#release !== null;
  }

  async toggle() {
    if (this.on) return this.stop("");
    if (!navigator.mediaDevices) {
      return this.onState("Browsers give their microphone to https pages and localhost only.");
    }
    try {
      // The browser's voice processing would remove traces of emotion.
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
    const releaseAudio = () => {
      for (const track of stream.getTracks()) track.stop();
      context.close();
    };
    this.#release = releaseAudio;
    stream.getTracks()[0].onended = () => this.stop("The microphone has been disconnected.");
    await context.audioWorklet.addModule("worklet.js");
    const recorder = new AudioWorkletNode(context, "recorder", {numberOfOutputs: 0});
    const socket = this.#open(context.sampleRate);
    recorder.port.onmessage = ({data}) => {
      if (socket.readyState === WebSocket.OPEN && socket.bufferedAmount < MAX_BUFFERED)
        socket.send(data);
    };
    context.createMediaStreamSource(stream).connect(recorder);
    this.#release = () => {
      socket.onclose = null;
      socket.close();
      releaseAudio();
    };
  }

  #open(rate) {
    const socket = new WebSocket(socketAddress(`microphone/${encodeURIComponent(this.source)}`));
    socket.onopen = () => {
      socket.send(JSON.stringify({rate, channels: 1, format: "s16le"}));
      this.onState("");
    };
    socket.onclose = ({reason}) => this.stop(reason || "The recogniser accepts no more audio.");
    return socket;
  }

  stop(reason) {
    this.#release?.();
    this.#release = null;
    this.onState(reason);
  }
}
