/** The buttons for requests: microphones, switches, a new dialogue. */

import {button} from "./dom.js";
import {BrowserMicrophone} from "./microphone.js";

const SWITCHES = {listening: "Listening", transcribe: "Words", record: "Recording"};

const microphones = new Map(); // source -> BrowserMicrophone

/** Draw the controls.
 *
 * `server` says what may be requested, `switches` holds the state of each source's switches,
 * `request` sends a request and shows its result, and `onMicrophone` is called with a line when a
 * microphone changes its state.
 */
export function drawControls(place, {server, switches, request, onMicrophone}) {
  const buttons = server.microphones.map((source) =>
    microphoneButton(source, {several: server.microphones.length > 1, onMicrophone}),
  );
  if (server.control) {
    buttons.push(...switchButtons(switches, {recordings: server.recordings, request}));
    const reset = () => request("reset", {}, "A new dialogue begins.");
    buttons.push(button({id: "reset", onclick: reset}, "New dialogue"));
  }
  place.replaceChildren(...buttons);
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

function switchButtons(switches, {recordings, request}) {
  const buttons = [];
  for (const [source, states] of switches) {
    for (const [name, title] of Object.entries(SWITCHES)) {
      if (!states.has(name) && !(name === "record" && recordings)) continue;
      const on = states.get(name) ?? false;
      const flip = () => request("set_switch", {source, switch: name, on: !on});
      buttons.push(
        button(
          {role: "switch", id: `${name}-${source}`, "aria-checked": String(on), onclick: flip},
          switches.size > 1 ? `${title}, ${source}` : title,
        ),
      );
    }
  }
  return buttons;
}
