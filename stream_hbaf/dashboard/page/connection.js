/** The one WebSocket to the recogniser: events come, wishes go; lost, it is opened again. */

const SHORTEST_MS = 300; // between two attempts, which grows to
const LONGEST_MS = 5000;
const PATIENCE_MS = 60000; // for an answer: another model takes a while to load

export class Connection {
  #socket = null;
  #waiting = new Map(); // transaction -> {resolve, timer}
  #transactions = 0;
  #delay = SHORTEST_MS;

  /** `onEvent` gets each event, `onState` whether we are connected. */
  constructor({onEvent, onState}) {
    this.onEvent = onEvent;
    this.onState = onState;
    this.#open();
  }

  /** The answer to a wish: {status: "ok", data} or {status: "error", error}; never throws. */
  ask(command, wish = {}) {
    if (this.#socket.readyState !== WebSocket.OPEN) {
      return Promise.resolve({status: "error", error: "not connected to the recogniser now"});
    }
    const transaction = String(++this.#transactions);
    this.#socket.send(JSON.stringify({command, arguments: wish, transaction}));
    return new Promise((resolve) => {
      const timer = setTimeout(() => this.#settle(transaction, "no answer came"), PATIENCE_MS);
      this.#waiting.set(transaction, {resolve, timer});
    });
  }

  #open() {
    this.#socket = new WebSocket(socketAddress("events"));
    this.#socket.onmessage = ({data}) => this.#take(JSON.parse(data));
    this.#socket.onclose = () => {
      for (const transaction of [...this.#waiting.keys()])
        this.#settle(transaction, "the connection was lost");
      this.onState(false);
      setTimeout(() => this.#open(), this.#delay);
      this.#delay = Math.min(LONGEST_MS, this.#delay * 2);
    };
  }

  #take(event) {
    if (event.event === "response") return this.#settle(event.transaction, "", event);
    if (event.event === "welcome") {
      this.#delay = SHORTEST_MS;
      this.onState(true);
    }
    return this.onEvent(event);
  }

  #settle(transaction, error, answer = {status: "error", error}) {
    const waiting = this.#waiting.get(transaction);
    if (!waiting) return;
    clearTimeout(waiting.timer);
    this.#waiting.delete(transaction);
    waiting.resolve(answer);
  }
}

export function socketAddress(path) {
  return `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/${path}`;
}
