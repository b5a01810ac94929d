#!/usr/bin/env python3
"""Measures how often turns are cut off, and how soon their ends are found, beside plain silence.

    tools/measure_endpoints.py CORPORA [--clips 60]

Sources are played through the live segmenter, and the turn model is asked where it asks:

reading     a passage by each of LibriSpeech's readers, who pause between sentences; LibriVox
sentences   clips of one speaker each (RAVDESS, SAVEE, ASED, nEMO, EmoSpeech-India), joined with the
            gaps between the turns of IEMOCAP's dialogues
commands    the same, two seconds apart
meetings    pieces of AMI, where a pause ends a turn if somebody else speaks after it

A pause inside a turn that ends the utterance is a false cut-off. The latency is the silence until a
turn's end is found; a turn is merged if speech goes on before that. The field's two operating
points, 300 ms of mean latency and 5 % of turns cut off, are chosen on the dev part.
"""

import argparse
import csv
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, EndpointConfig, SegmenterConfig, VadConfig
from stream_hbaf.features.turn_model import WINDOW_SAMPLES, TurnModel
from stream_hbaf.speech.endpointer import Evidence, is_over
from stream_hbaf.speech.segmenter import Begin, Consult, Finish, Segmenter
from stream_hbaf.speech.vad import SileroDetector

Sound = NDArray[np.int16]
FRAME = SileroDetector.frame_samples
FRAME_MS = 1000 * FRAME / SAMPLE_RATE_HZ
VAD = VadConfig()
LEAST_PAUSE = 5  # frames, 160 ms: the segmenter's shortest
LEAST_GAP_S, LONGEST_GAP_S = 0.16, 3.0  # of those between turns: shorter ones are no silence
APART_S = 2.0
NEAR_FRAMES = 9  # 0.3 s: RTTM's times, and the VAD in other company, are this exact
PARTS = ("dev", "test")
MEETINGS = {"dev": ("dev00", "trn01", "trn02"), "test": ("sample", "trn03")}
ACTORS = {"dev": range(1, 21), "test": range(21, 25)}
POLISH = {"dev": ("IC0", "KD0", "KS0", "SM0", "MP0"), "test": ("TP0",)}
SPEAKERS_CLIPS = 15
FAST_MS, FEW_CUT = 300, 5.0  # mean latency; percent of turns


@dataclass(frozen=True)
class Pause:
    first: int  # frame of silence
    length: int  # frames
    ends_turn: bool


@dataclass
class Source:
    """One source's sound, the speech score of each of its frames, and its pauses in order."""

    sound: Sound
    scores: list[float]
    pauses: list[Pause]
    probabilities: dict[tuple[int, int], float] = field(default_factory=dict)  # by samples


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
            probability = ask(source, model, begin=begin, end=asked.end)
            evidence = Evidence(asked.trigger, asked.habit, probability)
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


def score(sound: Sound) -> list[float]:
    return [float(value) for value in SileroDetector().feed(sound)]


def silences(scores: Iterable[float]) -> list[tuple[int, int]]:
    """First frame and end of each silence after speech, as the segmenter sees it."""
    silent, is_speech = [], False
    for value in scores:
        is_speech = value >= (VAD.release if is_speech else VAD.threshold)
        silent.append(not is_speech)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.array(silent, int), [0]))))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2) if first > 0]


def room(sound: Sound, seconds: float) -> Sound:
    """Noise as quiet as the quietest moments of a recording."""
    frames = sound[: len(sound) // 160 * 160].reshape(-1, 160).astype(np.float64)
    levels = np.sqrt(np.square(frames).mean(1))
    level = min(300.0, float(np.percentile(levels[levels > 0], 3))) if levels.any() else 3.0
    noise = np.random.default_rng(len(sound)).normal(0, level, round(seconds * SAMPLE_RATE_HZ))
    return noise.astype(np.int16)


def spoken(clip: Sound) -> Sound:
    """A clip without the silence around it."""
    found = silences([0.0, *score(np.concatenate([clip, room(clip, 0.3)]))])
    flags = np.array(score(clip)) >= VAD.threshold
    first = max(0, int(np.argmax(flags)) - 2) if flags.any() else 0
    return clip[first * FRAME : (found[-1][0] + 1) * FRAME] if found else clip[:0]


def join(clips: Sequence[Sound], gaps: Iterator[float]) -> Source:
    """One source that says clips one after another, so many seconds apart."""
    pieces: list[Sound] = [room(clips[0], 0.5)]
    ends = []  # frames in which a turn has ended
    for clip in filter(len, map(spoken, clips)):
        pieces.append(clip)
        ends.append(sum(map(len, pieces)) // FRAME)
        pieces.append(room(clip, next(gaps)))
    sound = np.concatenate([*pieces, room(clips[-1], APART_S)])
    scores = score(sound)
    found = silences(scores)
    nearest = {min((first for first, _ in found), key=lambda first: abs(first - at)) for at in ends}
    return Source(sound, scores, [Pause(a, b - a, ends_turn=a in nearest) for a, b in found])


def meeting(path: Path, turns: Sequence[tuple[float, float, str]]) -> Source:
    sound = read_audio(path)
    scores = score(sound)
    pauses = []
    slack = NEAR_FRAMES * FRAME_MS / 1000
    for first, end in silences(scores):
        begins_s, ends_s = first * FRAME_MS / 1000, end * FRAME_MS / 1000
        before = {who for start, stop, who in turns if start <= begins_s <= stop + slack}
        after = {who for start, stop, who in turns if start - slack <= ends_s < stop}
        if before and after:
            pauses.append(Pause(first, end - first, not before & after))
    return Source(sound, scores, pauses)


def speaker_turns(folder: Path) -> dict[str, list[tuple[float, float, str]]]:
    """Start, end and speaker of each turn, by recording."""
    turns = defaultdict(list)
    for path in folder.glob("*.rttm"):
        for line in path.read_text(encoding="utf-8").splitlines():
            _, recording, _, start, length, _, _, who, *_ = line.split()
            turns[recording].append((float(start), float(start) + float(length), who))
    return turns


def dialogue_gaps(table: Path) -> list[float]:
    """Seconds from the end of a turn to the next one's start, where they don't overlap."""
    dialogues = defaultdict(list)
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            dialogues[row["video_id"]].append((float(row["start_s"]), float(row["end_s"])))
    return [
        gap
        for turns in map(sorted, dialogues.values())
        for (_, end), (start, _) in pairwise(turns)
        if LEAST_GAP_S < (gap := start - end) < LONGEST_GAP_S
    ]


def clips_of(data: Path, part: str, count: int) -> Iterator[list[Path]]:
    """The clips of some speakers, at most ``count`` of a corpus and SPEAKERS_CLIPS of a speaker."""
    draw = random.Random(0)
    splits = {"train", "dev"} if part == "dev" else {"test"}
    by_corpus: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for corpus in ("savee", "ased", "emospeech-india"):
        with (data / corpus / "clips.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] in splits]
        by_corpus[corpus] = [(row["speaker"], data / corpus / row["file"]) for row in rows]
    for actor in ACTORS[part]:
        files = sorted(data.glob(f"ravdess/Actor_{actor:02d}/*.flac"))
        by_corpus["ravdess"] += [(str(actor), file) for file in files]
    for path in sorted(data.glob("nemo/**/*.flac")):
        if (who := path.name.split("_")[0]) in POLISH[part]:
            by_corpus["nemo"].append((who, path))
    for clips in by_corpus.values():
        speakers: dict[str, list[Path]] = defaultdict(list)
        for who, clip in draw.sample(clips, len(clips)):
            speakers[who].append(clip)
        for files in list(speakers.values())[: max(1, count // SPEAKERS_CLIPS)]:
            yield files[:SPEAKERS_CLIPS]


def gather(data: Path, part: str, count: int) -> dict[str, list[Source]]:
    draw = random.Random(1)
    gaps = dialogue_gaps(data / "iemocap/order.csv")
    apart = iter(lambda: APART_S, None)
    speakers = [[read_audio(file) for file in files] for files in clips_of(data, part, count)]
    with (data / "speech/libri/clips.csv").open(encoding="utf-8", newline="") as file:
        rows = [row["file"] for row in csv.DictReader(file) if row["split"] == part]
    reading = [join([read_audio(data / "speech/libri" / name)], apart) for name in rows]
    if part == "test":
        files = sorted(data.glob("speech/librivox/*.flac"))
        reading.append(join([read_audio(file) for file in files], apart))
    turns = speaker_turns(data / "speech/meeting")
    return {
        "commands": [join(clips, apart) for clips in speakers],
        "reading": reading,
        "sentences": [join(clips, iter(lambda: draw.choice(gaps), None)) for clips in speakers],
        "meetings": [
            meeting(data / f"speech/meeting/{name}.flac", turns[name]) for name in MEETINGS[part]
        ],
    }


def by_silence(ms: int) -> Rule:
    return Rule(f"silence {ms} ms", SegmenterConfig(min_silence_ms=ms))


def by_turns(**settings: float) -> Rule:
    given = ", ".join(f"{name} {value:g}" for name, value in settings.items())
    endpoint = EndpointConfig(engine="turn").model_copy(update=settings)
    return Rule(f"turn, {given}" if given else "turn", endpoint=endpoint)


SHOWN = [
    *map(by_silence, (300, 400, 600)),
    by_turns(),
    by_turns(max_resumed=1.0),
    by_turns(finished=0.0, unfinished=0.0),  # without the model: the source's habit alone
]
# What the operating points are chosen from.
SILENCES = [by_silence(ms) for ms in range(192, 1200, 64)]
TURNS = [
    by_turns(silence_ms=ms, finished=finished, unfinished=unfinished, max_resumed=resumed)
    for ms, finished, unfinished, resumed in product(
        (192, 256, 352), (0.3, 0.5, 0.8, 0.95), (0.05, 0.2), (0.2, 1.0)
    )
]


def operating_points(dev: list[Source], model: TurnModel) -> Iterator[tuple[str, Rule]]:
    """The best of each family on dev: fewest cut-offs when fast, and fastest with few cut-offs."""
    for family in (SILENCES, TURNS):
        found = [(measure(dev, rule, model), rule) for rule in family]
        fast = [(f.cut, f.latency, rule) for f, rule in found if f.latency <= FAST_MS]
        few = [(f.latency, f.cut, rule) for f, rule in found if f.cut <= FEW_CUT]
        for name, chosen in ((f"≤ {FAST_MS} ms", fast), (f"≤ {FEW_CUT:g} % cut", few)):
            if chosen:
                yield name, min(chosen, key=lambda one: one[:2])[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="CORPORA")
    parser.add_argument("--clips", type=int, default=60, help="of each corpus and part")
    options = parser.parse_args()
    model = TurnModel()
    parts = {part: gather(options.data, part, options.clips) for part in PARTS}
    header = ["turns cut off", "pauses cut off", "merged", "latency, ms: mean · median · 90 %"]
    for part, sounds in parts.items():
        print(f"\n| {part} | rule | " + " | ".join(header) + " |\n" + "| --- " * 6 + "|")
        sounds["all but commands"] = [
            source for name, sources in sounds.items() if name != "commands" for source in sources
        ]
        for name, sources in sounds.items():
            for rule in SHOWN:
                cells = measure(sources, rule, model).cells()
                print("| " + " | ".join([name, rule.name, *cells]) + " |", flush=True)
    print("\n| chosen on dev, sentences | rule | dev | test |\n" + "| --- " * 4 + "|")
    for name, rule in operating_points(parts["dev"]["sentences"], model):
        both = [measure(parts[part]["sentences"], rule, model) for part in PARTS]
        shown = [f"{one.cut:.1f} % cut, {one.latency:.0f} ms" for one in both]
        print("| " + " | ".join([name, rule.name, *shown]) + " |", flush=True)


if __name__ == "__main__":
    main()
