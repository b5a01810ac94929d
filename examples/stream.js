// Sends sound to a service, and prints what comes back. In a browser the same class takes a
// microphone's samples; stream.html is such a page. Node 22, or node --experimental-websocket:
//   ffmpeg -v error -i talk.mp3 -f s16le -ac 1 -ar 16000 - | node examples/stream.js ws://localhost:8772
class EmotionStream {
  // `format` is {rate, channels, format}; `onEvent` gets each event, each `end` once.
  constructor(url, format, onEvent) {
    this.url = new URL(url);
    this.url.searchParams.set("id", crypto.randomUUID()); // the stream goes on if it is lost
    this.format = format;
    this.onEvent = onEvent;
    this.revisions = new Map(); // the highest one of each utterance: some come again
    this.done = new Promise((resolve, reject) => Object.assign(this, { resolve, reject }));
    this.connect();
  }

  connect() {
    this.socket = new WebSocket(this.url);
    this.socket.onopen = () => {
      this.socket.send(JSON.stringify(this.format));
      if (this.ending) this.end();
    };
    this.socket.onmessage = ({ data }) => {
      const event = JSON.parse(data);
      if (event.event === "utterance") {
        if (event.rev <= (this.revisions.get(event.id) ?? 0)) return;
        this.revisions.set(event.id, event.rev);
      }
      this.connected = true;
      this.onEvent(event);
    };
    let over = false;
    this.socket.onclose = ({ code, reason }) => {
      if (over) return;
      over = true;
      if (code === 1000) this.resolve();
      else if (!this.connected || code === 1008 || code === 1009 || code === 4000)
        this.reject(new Error(reason || "can't be reached, or refuses"));
      else setTimeout(() => this.connect(), 1000);
    };
    this.socket.onerror = () => setTimeout(this.socket.onclose, 100, {}); // Node 20 closes nothing
  }

  // Sound that comes while there is no connection is lost.
  send(chunk) {
    if (this.socket.readyState === 1) this.socket.send(chunk);
  }

  // No more sound follows; `done` is resolved behind the last event.
  end() {
    this.ending = true;
    if (this.socket.readyState === 1) this.socket.send('{"end": true}');
  }
}

async function main(url) {
  const stream = new EmotionStream(url, { rate: 16000 }, ({ type, emotion, text }) => {
    if (type === "end" && emotion) console.log(`${emotion.label}\t${text}`);
  });
  (async () => {
    for await (const chunk of process.stdin) {
      while (stream.socket.readyState === 0 || stream.socket.bufferedAmount > 1e6)
        await new Promise((resolve) => setTimeout(resolve, 20));
      for (let at = 0; at < chunk.length; at += 3200) stream.send(chunk.subarray(at, at + 3200));
    }
    stream.end();
  })();
  await stream.done;
}

if (typeof process !== "undefined")
  main(process.argv[2]).catch((error) => {
    console.error(error.message);
    process.exitCode = 2;
  });
