/** How the recogniser bears up: stages, latencies, memory, queues, losses. */

import {duration, make, milliseconds, table} from "./make.js";

const MARKS = {online: "●", offline: "○", degraded: "▲"}; // shapes, since no colour speaks alone

export function drawVitals(place, {health, states}) {
  place.replaceChildren(
    ...[...states].map(([source, stages]) => stageList(source, stages)),
    ...(health ? figures(health) : [make("p", {class: "soft"}, "No figures yet.")]),
  );
}

function stageList(source, stages) {
  return make(
    "div",
    {},
    make("h3", {}, source),
    make(
      "ul",
      {class: "stages"},
      [...stages].map(([stage, {state, detail}]) =>
        make(
          "li",
          {class: state},
          make("span", {"aria-hidden": "true"}, `${MARKS[state]} `),
          `${stage} ${state}`,
          detail ? make("span", {class: "soft"}, ` ${detail}`) : null,
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
    ...Object.entries(health.queues).map(([name, count]) => [`Waiting, ${name}`, count]),
    ...Object.entries(health.dropped).map(([name, count]) => [`Let go, ${name}`, count]),
  ];
  const rows = Object.entries(health.latency_ms).map(([stage, {p50, p95}]) => [
    stage,
    milliseconds(p50),
    milliseconds(p95),
  ]);
  return [
    make(
      "dl",
      {},
      facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]),
    ),
    rows.length
      ? table("Latency of the newest hundred utterances", ["Stage", "Median", "95 %"], rows)
      : "",
  ];
}
