/** What can be asked of the recogniser: microphones, switches, a new dialogue. */

import {button} from "./make.js";
import {BrowserMicrophone} from "./microphone.js";

const SWITCHES = {listening: "Listening", transcribe: "Words", record: "Recording"};

const microphones = new Map(); // source -> BrowserMicrophone

/** Draw the controls that there are.
 *
 * `hello` says what may be asked for, `switches` how each source's switches stand, `ask` asks
 * (and says what came of it), and `onMicrophone` gets a line if a microphone changes its state.
 */
export function drawControls(place, {hello, switches, ask, onMicrophone}) {
  const found = hello.microphones.map((source) =>
    microphoneButton(source, {several: hello.microphones.length > 1, onMicrophone}),
  );
  if (hello.control) {
    found.push(...switchButtons(switches, {recordings: hello.recordings, ask}));
    const begin = () => ask("reset", {}, "A new dialogue begins.");
    found.push(button({id: "reset", onclick: begin}, "New dialogue"));
  }
  place.replaceChildren(...found);
}

function microphoneButton(source, {several, onMicrophone}) {
  if (!microphones.has(source)) {
    microphones.set(source, new BrowserMicrophone(source, onMicrophone));
  }
  const microphone = microphones.get(source);
  return button(
    {
      id: `microphone-${source}`,
      "aria-pressed": String(microphone.on),
      onclick: () => microphone.toggle(),
    },
    microphone.on ? "Stop" : "Use",
    " this browser's microphone",
    several ? ` for ${source}` : "",
  );
}

function switchButtons(switches, {recordings, ask}) {
  const found = [];
  for (const [source, stands] of switches) {
    for (const [name, says] of Object.entries(SWITCHES)) {
      if (!stands.has(name) && !(name === "record" && recordings)) continue;
      const on = stands.get(name) ?? false;
      const flip = () => ask("set_switch", {source, switch: name, on: !on});
      found.push(
        button(
          {role: "switch", id: `${name}-${source}`, "aria-checked": String(on), onclick: flip},
          switches.size > 1 ? `${says}, ${source}` : says,
        ),
      );
    }
  }
  return found;
}
