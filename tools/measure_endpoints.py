#!/usr/bin/env python3
"""Measures how often turns are cut off, and how soon their ends are found, beside plain silence.

    tools/measure_endpoints.py CORPORA [--clips 60] [--part dev|test]

The sources of ``endpoint_sounds.py`` are played through the live segmenter, and the turn model is
asked where it asks. A pause inside a turn that ends the utterance is a false cut-off. The latency
is the silence until a turn's end is found; a turn is merged if speech goes on before that. The
field's two operating points, 300 ms of mean latency and 5 % of turns cut off, are chosen on dev.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
from endpoint_sounds import FRAME, FRAME_MS, VAD, Source, gather

from stream_hbaf.config import EndpointConfig, SegmenterConfig
from stream_hbaf.features.turn_model import WINDOW_SAMPLES, TurnModel
from stream_hbaf.speech.endpointer import Evidence, is_over
from stream_hbaf.speech.segmenter import Begin, Consult, Finish, Segmenter

PARTS = ("dev", "test")
LEAST_PAUSE = 5  # frames, 160 ms: the segmenter's shortest
FAST_MS, FEW_CUT = 300, 5.0  # mean latency; percent of turns


@dataclass(frozen=True)
class Rule:
    """A way to find the ends of turns."""

    name: str
    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    endpoint: EndpointConfig | None = None


@dataclass
class Figures:
    """What a rule does to some sources."""

    turns: int = 0
    turns_cut: int = 0
    inner: int = 0  # pauses inside turns
    inner_cut: int = 0
    merged: int = 0
    latencies: list[float] = field(default_factory=list)

    @property
    def cut(self) -> float:
        """Percent of turns that were cut off."""
        return 100 * self.turns_cut / max(1, self.turns)

    @property
    def latency(self) -> float:
        """The mean, in ms."""
        return float(np.mean(self.latencies)) if self.latencies else np.inf

    def cells(self) -> list[str]:
        p50, p90 = np.quantile(self.latencies or [np.nan], (0.5, 0.9))
        return [
            f"{self.turns_cut} of {self.turns}, {self.cut:.1f} %",
            f"{self.inner_cut} of {self.inner}, {100 * self.inner_cut / max(1, self.inner):.1f} %",
            f"{100 * self.merged / max(1, len(self.latencies) + self.merged):.1f} %",
            f"{self.latency:.0f} · {p50:.0f} · {p90:.0f}",
        ]


def measure(sources: Iterable[Source], rule: Rule, model: TurnModel) -> Figures:
    figures = Figures()
    for source in sources:
        ended = play(source, rule, model)
        was_cut = False
        for pause in source.pauses:
            silence = ended.get(pause.first)
            if pause.ends_turn:
                figures.turns += 1
                figures.turns_cut += was_cut
                was_cut = False
                figures.merged += silence is None
                figures.latencies += [] if silence is None else [silence * FRAME_MS]
            elif pause.length >= LEAST_PAUSE:
                figures.inner += 1
                figures.inner_cut += silence is not None
                was_cut |= silence is not None
    return figures


def play(source: Source, rule: Rule, model: TurnModel) -> dict[int, int]:
    """Frames of silence after which utterances were ended, by the first frame of the pause."""
    segmenter = Segmenter(rule.segmenter, VAD, frame_samples=FRAME, endpoint=rule.endpoint)
    ended: dict[int, int] = {}
    begin = 0
    for score in source.scores:
        actions = segmenter.feed(score)
        if actions and isinstance(asked := actions[-1], Consult):
            assert rule.endpoint is not None
            with_model = rule.endpoint.engine == "turn"
            probability = ask(source, model, begin=begin, end=asked.end) if with_model else None
            evidence = Evidence(asked.trigger, asked.habit, asked.score, probability)
            actions += segmenter.answer(is_over=is_over(evidence, config=rule.endpoint))
        for action in actions:
            if isinstance(action, Begin):
                begin = action.start
            elif isinstance(action, Finish):
                last = action.speech_end // FRAME
                ended[last] = action.confirmed_at // FRAME - last
    return ended


def ask(source: Source, model: TurnModel, *, begin: int, end: int) -> float:
    key = (max(begin, end - WINDOW_SAMPLES), end)
    if key not in source.probabilities:
        source.probabilities[key] = model.probability(source.sound[slice(*key)])
    return source.probabilities[key]


def by_silence(ms: int) -> Rule:
    return Rule(f"silence {ms} ms", SegmenterConfig(min_silence_ms=ms))


def by(engine: str, **settings: float) -> Rule:
    given = "".join(f", {name} {value:g}" for name, value in settings.items())
    endpoint = EndpointConfig.model_validate({"engine": engine, **settings})
    return Rule(engine + given, endpoint=endpoint)


SHOWN = [
    *map(by_silence, (300, 400, 600)),
    by("pause"),
    by("pause", max_resumed=1.0),
    by("pause", still=1.0),  # the source's habit alone
    by("turn"),
]
# What the operating points are chosen from.
SILENCES = [by_silence(ms) for ms in range(192, 1200, 64)]
PAUSES = [
    by("pause", silence_ms=ms, still=still, max_resumed=resumed)
    for ms, still, resumed in product(
        (192, 256, 320, 352), (0.05, 0.085, 0.12, 0.2, 1.0), (0.5, 1.0)
    )
]
TURNS = [
    by("turn", silence_ms=ms, still=still, finished=sure, unfinished=0.05, max_resumed=1.0)
    for ms, still, sure in product((192, 256, 352), (0.085, 0.2, 1.0), (0.3, 0.5, 0.8))
]


def operating_points(dev: list[Source], model: TurnModel) -> Iterator[tuple[str, Rule]]:
    """The best of each family on dev: fewest cut-offs when fast, and fastest with few cut-offs."""
    for family in (SILENCES, PAUSES, TURNS):
        found = [(measure(dev, rule, model), rule) for rule in family]
        fast = [(f.cut, f.latency, rule) for f, rule in found if f.latency <= FAST_MS]
        few = [(f.latency, f.cut, rule) for f, rule in found if f.cut <= FEW_CUT]
        for name, chosen in ((f"≤ {FAST_MS} ms", fast), (f"≤ {FEW_CUT:g} % cut", few)):
            if chosen:
                yield name, min(chosen, key=lambda one: one[:2])[2]


def print_part(part: str, sounds: dict[str, list[Source]], model: TurnModel) -> None:
    header = ["turns cut off", "pauses cut off", "merged", "latency, ms: mean · median · 90 %"]
    print(f"\n| {part} | rule | " + " | ".join(header) + " |\n" + "| --- " * 6 + "|")
    natural = [source for sources in sounds.values() for source in sources]
    for name, sources in {**sounds, "all": natural}.items():
        for rule in SHOWN:
            cells = measure(sources, rule, model).cells()
            print("| " + " | ".join([name, rule.name, *cells]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="CORPORA")
    parser.add_argument("--clips", type=int, default=60, help="of each corpus and part")
    parser.add_argument("--part", choices=PARTS, action="append", help="both by default")
    options = parser.parse_args()
    model = TurnModel()
    wanted = options.part or PARTS
    parts = {part: gather(options.data, part, options.clips) for part in wanted}
    for part, sounds in parts.items():
        print_part(part, sounds, model)
    if set(parts) != set(PARTS):
        return
    print("\n| chosen on dev, recordings | rule | dev | test |\n" + "| --- " * 4 + "|")
    for name, rule in operating_points(parts["dev"]["recordings"], model):
        both = [measure(parts[part]["recordings"], rule, model) for part in PARTS]
        shown = [f"{one.cut:.1f} % cut, {one.latency:.0f} ms" for one in both]
        print("| " + " | ".join([name, rule.name, *shown]) + " |", flush=True)


if __name__ == "__main__":
    main()
