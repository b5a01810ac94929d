/** The state of the recogniser: stages, latencies, memory, queues, losses. */

import {html, table} from "./dom.js";
import {duration, milliseconds} from "./format.js";

const MARKS = {online: "●", offline: "○", degraded: "▲"}; // so that colour is not the only mark

export function drawHealth(place, {health, states}) {
  place.replaceChildren(
    ...[...states].map(([source, stages]) => stageList(source, stages)),
    ...(health ? figures(health) : [html("p", {class: "soft"}, "No figures yet.")]),
  );
}

function stageList(source, stages) {
  return html(
    "div",
    {},
    html("h3", {}, source),
    html(
      "ul",
      {class: "stages"},
      [...stages].map(([stage, {state, detail}]) =>
        html(
          "li",
          {class: state},
          html("span", {"aria-hidden": "true"}, `${MARKS[state]} `),
          `${stage} ${state}`,
          detail ? html("span", {class: "soft"}, ` ${detail}`) : null,
        ),
      ),
    ),
  );
}

function figures(health) {
  const facts = [
    ["Running for", duration(health.uptime_s)],
    ["Utterances", health.utterances],
    ["Memory", `${Math.round(health.memory_mb)} MB`],
    ...Object.entries(health.queues).map(([name, count]) => [`Queued, ${name}`, count]),
    ...Object.entries(health.dropped).map(([name, count]) => [`Dropped, ${name}`, count]),
  ];
  const rows = Object.entries(health.latency_ms).map(([stage, {p50, p95}]) => [
    stage,
    milliseconds(p50),
    milliseconds(p95),
  ]);
  return [
    ...(health.hints ?? []).map((hint) => html("p", {}, `▲ ${hint}`)),
    html(
      "dl",
      {},
      facts.flatMap(([name, value]) => [html("dt", {}, name), html("dd", {}, String(value))]),
    ),
    rows.length
      ? table("Latency of the last hundred utterances", ["Stage", "Median", "95 %"], rows)
      : "",
  ];
}
