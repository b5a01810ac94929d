// Prints speaker, emotion and words of each utterance: node examples/listen.js mqtt://localhost
// Needs the package mqtt: npm install mqtt
const client = require("mqtt").connect(process.argv[2]);
const revisions = new Map(); // the highest one of each id, to skip repeated messages

client.on("connect", () => client.subscribe("stream_hbaf/+/+/utterance", { qos: 1 }));
client.on("message", (topic, payload) => {
  const { id, rev, type, speaker, emotion, text } = JSON.parse(payload);
  if (rev <= (revisions.get(id) ?? 0)) return;
  revisions.set(id, rev);
  if (type === "end" && emotion) console.log([speaker, emotion.label, text].join("\t"));
});
