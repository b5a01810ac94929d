/** The WebSocket to the recogniser: receives events, sends requests, and reconnects. */

const SHORTEST_MS = 300; // before the first attempt to reconnect; the delay grows up to
const LONGEST_MS = 5000;
const TIMEOUT_MS = 60000; // of a request: loading another model takes a while

export class Connection {
  #socket = null;
  #pending = new Map(); // transaction -> {resolve, timer}
  #transactions = 0;
  #delay = SHORTEST_MS;

  /** `onEvent` is called with each event, `onState` with whether the connection is open. */
  constructor({onEvent, onState}) {
    this.onEvent = onEvent;
    this.onState = onState;
    this.#open();
  }

  /** The response: {status: "ok", data} or {status: "error", error}. Never rejects. */
  request(command, parameters = {}) {
    if (this.#socket.readyState !== WebSocket.OPEN) {
      return Promise.resolve({status: "error", error: "not connected to the recogniser now"});
    }
    const transaction = String(++this.#transactions);
    this.#socket.send(JSON.stringify({command, arguments: parameters, transaction}));
    return new Promise((resolve) => {
      const timer = setTimeout(() => this.#settle(transaction, "no answer came"), TIMEOUT_MS);
      this.#pending.set(transaction, {resolve, timer});
    });
  }

  #open() {
    this.#socket = new WebSocket(socketAddress("events"));
    this.#socket.onmessage = ({data}) => this.#receive(JSON.parse(data));
    this.#socket.onclose = () => {
      for (const transaction of [...this.#pending.keys()])
        this.#settle(transaction, "the connection was lost");
      this.onState(false);
      setTimeout(() => this.#open(), this.#delay);
      this.#delay = Math.min(LONGEST_MS, this.#delay * 2);
    };
  }

  #receive(event) {
    if (event.event === "response") return this.#settle(event.transaction, "", event);
    if (event.event === "snapshot") {
      this.#delay = SHORTEST_MS;
      this.onState(true);
    }
    return this.onEvent(event);
  }

  #settle(transaction, error, response = {status: "error", error}) {
    const pending = this.#pending.get(transaction);
    if (!pending) return;
    clearTimeout(pending.timer);
    this.#pending.delete(transaction);
    pending.resolve(response);
  }
}

export function socketAddress(path) {
  return `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/${path}`;
}
