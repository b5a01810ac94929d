#!/usr/bin/env python3
"""Measure how well speakers are found: joined dialogues, emotions, enrolled voices, meetings.

    tools/measure_speakers.py SHARED [--split test] [--cache FOLDER] [--dialogues 60]

Prints a Markdown table. Clips are cut by the live segmenter and embedded as live; dialogues join
utterances of 2 to 4 people whom no setting was chosen on (split test). Found speakers are mapped
one to one to the true ones; "not sure" is wrong. "Live" is what was answered at once, the other
figure counts the revisions until the dialogue's end.
"""

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, SegmenterConfig, SpeakersConfig, VadConfig
from stream_hbaf.evaluation.diarization import (
    DiarizationError,
    Turn,
    count_right,
    diarization_error,
)
from stream_hbaf.features.speaker import SpeakerEncoder, open_speaker_encoder
from stream_hbaf.speech.diarizer import Attributed, Diarizer
from stream_hbaf.speech.segmenter import Finish, Segmenter
from stream_hbaf.speech.vad import open_detector

SEED = 16
TURNS = 24  # of a joined RAVDESS dialogue
TURNS_OF_AN_EMOTION = 4  # of each speaker in each half of a dialogue across emotions
ENROLLED = 4  # voices that are enrolled, of whom half never speak
ENROLMENT_TURNS = 5  # utterances of a RAVDESS enrolment, all neutral or calm
TEST_ACTORS = range(21, 25)
MEETINGS = {"dev": ("trn01", "trn02", "trn03"), "test": ("dev00", "sample")}
CALM = ("01", "02")  # RAVDESS's emotions of an enrolment: neutral, calm
READ = SegmenterConfig(
    min_silence_ms=200, soft_limit_s=3, max_utterance_s=5
)  # reading has no turns
READ_S = 2.0  # pieces of reading are joined up to this length

Sound = NDArray[np.int16]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Said:
    """One utterance, as the live segmenter cuts it."""

    clip: str
    speaker: str
    emotion: str
    start_s: float
    end_s: float
    embedding: NDArray[np.float32] | None

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Answers:
    """A dialogue's true speakers, and those found at once and at last."""

    true: list[str]
    live: list[str]
    final: list[str]
    first: int = 0  # utterance that counts; all are mapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder that holds speech/ and ravdess/")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--cache", type=Path, help="folder for the embeddings")
    parser.add_argument("--dialogues", type=int, default=60, help="of each kind")
    arguments = parser.parse_args()
    split, number = arguments.split, arguments.dialogues
    corpus = Corpus(arguments.data, arguments.cache)
    acted, read = corpus.ravdess(split), corpus.libri(split)
    print("| | revised | live | not sure |\n| --- | --- | --- | --- |")
    kinds = {
        "RAVDESS, 2 to 4 actors": [answer(one) for one in joined(acted, number)],
        "LibriSpeech, 2 to 4 readers": [answer(one) for one in joined(read, number)],
        "RAVDESS, after a change of emotion": [
            answer(one, second_half=True) for one in across_emotions(acted, number)
        ],
    }
    for name, dialogues in kinds.items():
        print_right(name, dialogues)
    for name in list(kinds)[:2]:
        print_numbers(name, kinds[name])
    print("\n| enrolled voices | named, of those answered | answered | strangers named |")
    print("| --- | --- | --- | --- |")
    print_enrolled("RAVDESS", acted, number, is_enrolment=lambda said: said.emotion in CALM)
    print_enrolled("LibriSpeech", read, number, is_enrolment=lambda said: said.start_s < 6.0)
    print_meetings(corpus, split)


class Corpus:
    """Utterances of the data with their embeddings, each computed once if there is a cache."""

    def __init__(self, folder: Path, cache: Path | None) -> None:
        self.folder = folder
        self._cache = cache
        self._encoder: SpeakerEncoder | None = None

    def ravdess(self, split: str) -> list[Said]:
        paths = sorted((self.folder / "ravdess").glob("*/*.flac"))
        found = [said for path in paths for said in self.clip(path, SegmenterConfig())]
        said = [
            Said(one.clip, f"actor {one.clip[-2:]}", one.clip[6:8], *rest(one)) for one in found
        ]
        return [s for s in said if (int(s.clip[-2:]) in TEST_ACTORS) == (split == "test")]

    def libri(self, split: str) -> list[Said]:
        folder = self.folder / "speech/libri"
        with (folder / "clips.csv").open(encoding="utf-8") as file:
            rows = [
                row for row in csv.DictReader(file) if (row["split"] == "test") == (split == "test")
            ]
        return [
            Said(one.clip, f"reader {row['speaker']}", "", *rest(one))
            for row in rows
            for one in self.clip(folder / row["file"], READ)
        ]

    def clip(self, path: Path, config: SegmenterConfig) -> list[Said]:
        """The utterances of a recording; their speaker isn't known."""
        cached = None if self._cache is None else self._cache / f"{path.stem}.npz"
        if cached is not None and cached.is_file():
            with np.load(cached) as arrays:
                times, embeddings = arrays["times"], arrays["embeddings"]
        else:
            times, embeddings = self._embed(read_audio(path), config)
            if cached is not None:
                cached.parent.mkdir(parents=True, exist_ok=True)
                np.savez(cached, times=times, embeddings=embeddings)
        return [
            Said(path.stem, "", "", start, end, embedding if embedding.any() else None)
            for (start, end), embedding in zip(times.tolist(), embeddings, strict=True)
        ]

    def _embed(self, audio: Sound, config: SegmenterConfig) -> tuple[Float64, Float64]:
        if self._encoder is None:
            self._encoder = open_speaker_encoder()
        pieces = cut(audio, config)
        found = [self._encoder.embed(audio[start:end]) for start, end in pieces]
        width = self._encoder.width
        embeddings = [np.zeros(width) if one is None else one for one in found]
        return (
            np.array(pieces, float).reshape(-1, 2) / SAMPLE_RATE_HZ,
            np.array(embeddings, float).reshape(-1, width),
        )


def rest(said: Said) -> tuple[float, float, NDArray[np.float32] | None]:
    return said.start_s, said.end_s, said.embedding


def cut(audio: Sound, config: SegmenterConfig) -> list[tuple[int, int]]:
    """Start and end of each utterance; pieces of reading are joined until they are long enough."""
    detector = open_detector("silero")
    segmenter = Segmenter(config, VadConfig(), frame_samples=detector.frame_samples)
    actions = [action for score in detector.feed(audio) for action in segmenter.feed(float(score))]
    ends = [one for one in [*actions, *segmenter.flush()] if isinstance(one, Finish)]
    pieces: list[tuple[int, int]] = []
    for end in ends:
        piece = (end.start, min(end.end, len(audio)))
        is_short = pieces and pieces[-1][1] - pieces[-1][0] < READ_S * SAMPLE_RATE_HZ
        if config is READ and is_short:
            piece = (pieces.pop()[0], piece[1])
        pieces.append(piece)
    return pieces


def joined(said: Sequence[Said], number: int) -> Iterator[list[Said]]:
    """Dialogues of 2, 3 and 4 speakers in turn, their utterances in random order."""
    random = np.random.default_rng(SEED)
    speakers = sorted({one.speaker for one in said})
    for n in range(number):
        count = 2 + n % 3
        turns = []
        for speaker in random.choice(speakers, count, replace=False):
            own = [one for one in said if one.speaker == speaker]
            most = min(len(own), TURNS // count)
            turns += [own[i] for i in random.choice(len(own), most, replace=False)]
        yield [turns[i] for i in random.permutation(len(turns))]


def across_emotions(said: Sequence[Said], number: int) -> Iterator[list[Said]]:
    """Each actor speaks in one emotion in the first half, and in another one in the second."""
    random = np.random.default_rng(SEED)
    speakers = sorted({one.speaker for one in said})
    emotions = sorted({one.emotion for one in said})
    for n in range(number):
        halves: tuple[list[Said], list[Said]] = ([], [])
        for speaker in random.choice(speakers, 2 + n % 3, replace=False):
            for half, emotion in zip(
                halves, random.choice(emotions, 2, replace=False), strict=True
            ):
                own = [one for one in said if (one.speaker, one.emotion) == (speaker, emotion)]
                most = min(len(own), TURNS_OF_AN_EMOTION)
                half += [own[i] for i in random.choice(len(own), most, replace=False)]
        yield [half[i] for half in halves for i in random.permutation(len(half))]


def answer(dialogue: Sequence[Said], *, second_half: bool = False) -> Answers:
    live, final = diarize(Diarizer(SpeakersConfig()), dialogue)
    first = len(dialogue) // 2 if second_half else 0
    return Answers([one.speaker for one in dialogue], live, final, first)


def diarize(diarizer: Diarizer, dialogue: Sequence[Said]) -> tuple[list[str], list[str]]:
    """The speakers as answered at once, and at last."""
    live, final = [], dict[int, Attributed]()
    for turn, one in enumerate(dialogue):
        changed = diarizer.add(turn, one.embedding, duration_s=one.duration_s)
        final |= {attributed.turn: attributed for attributed in changed}
        live.append(changed[-1].speaker)
    return live, [final[turn].speaker for turn in range(len(dialogue))]


def print_right(name: str, dialogues: Sequence[Answers]) -> None:
    final = np.concatenate([count_right(d.true, d.final)[d.first :] for d in dialogues])
    live = np.concatenate([count_right(d.true, d.live)[d.first :] for d in dialogues])
    unsure = np.mean([not found for d in dialogues for found in d.final[d.first :]])
    print(f"| {name}: right speaker | {final.mean():.1%} | {live.mean():.1%} | {unsure:.1%} |")


def print_numbers(name: str, dialogues: Sequence[Answers]) -> None:
    off = np.array([len(set(d.final) - {""}) - len(set(d.true)) for d in dialogues])
    near, exact = (np.abs(off) <= 1).mean(), (off == 0).mean()
    print(f"| {name}: speakers off by at most 1; exact | {near:.1%}; {exact:.1%} | | |")


def print_enrolled(
    name: str, said: Sequence[Said], number: int, *, is_enrolment: Callable[[Said], bool]
) -> None:
    """Dialogues of two enrolled people and two strangers; two more enrolled ones don't speak."""
    random = np.random.default_rng(SEED)
    speakers = sorted({one.speaker for one in said})
    absent = ENROLLED - 2 if len(speakers) >= ENROLLED + 2 else 0
    right = answered = known = named = strange = 0
    for _ in range(number):
        people = random.choice(speakers, 4 + absent, replace=False).tolist()
        strangers, enrolled = people[:2], people[2:]
        voices, turns = {}, []
        for speaker in people:
            own = [one for one in said if one.speaker == speaker and one.embedding is not None]
            first = [one for one in own if is_enrolment(one)][:ENROLMENT_TURNS]
            if speaker in enrolled:
                voices[speaker] = centroid(first)
            if speaker in people[:4]:
                later = [one for one in own if one not in first]
                most = min(len(later), TURNS // 4)
                turns += [later[i] for i in random.choice(len(later), most, replace=False)]
        turns = [turns[i] for i in random.permutation(len(turns))]
        _, found = diarize(Diarizer(SpeakersConfig(), voices=voices), turns)
        for one, speaker in zip(turns, found, strict=True):
            if one.speaker in strangers:
                strange, named = strange + 1, named + (speaker in voices)
            else:
                known += 1
                answered, right = answered + bool(speaker), right + (speaker == one.speaker)
    print(f"| {name} | {right / answered:.1%} | {answered / known:.1%} | {named / strange:.1%} |")


def centroid(said: Sequence[Said]) -> Float64:
    embeddings = [one.embedding for one in said if one.embedding is not None]
    mean: Float64 = np.mean(embeddings, axis=0, dtype=np.float64)
    return mean


def print_meetings(corpus: Corpus, split: str) -> None:
    folder = corpus.folder / "speech/meeting"
    reference = read_turns(folder)
    total, right = DiarizationError(), list[bool]()
    print("\n| meeting | DER | missed | false alarm | confused | right speaker |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in MEETINGS[split]:
        said = corpus.clip(folder / f"{name}.flac", SegmenterConfig())
        live, _ = diarize(Diarizer(SpeakersConfig()), said)
        found = [
            Turn(one.start_s, one.end_s, speaker) for one, speaker in zip(said, live, strict=True)
        ]
        error = diarization_error(reference[name], found)
        true = [longest(reference[name], one) for one in said]
        own = count_right(true, live)
        total, right = total + error, [*right, *own.tolist()]
        print_meeting(name, error, own)
    print_meeting("all", total, np.array(right))


def print_meeting(name: str, error: DiarizationError, right: NDArray[np.bool_]) -> None:
    parts = (error.missed_s, error.false_alarm_s, error.confused_s)
    shares = " | ".join(f"{part / error.speech_s:.1%}" for part in parts)
    print(f"| {name} | {error.rate:.1%} | {shares} | {right.sum()} of {len(right)} |")


def longest(turns: Sequence[Turn], said: Said) -> str:
    """Who speaks most of an utterance."""
    spoken: dict[str, float] = {"": 0.0}
    for turn in turns:
        shared = min(turn.end_s, said.end_s) - max(turn.start_s, said.start_s)
        spoken[turn.speaker] = spoken.get(turn.speaker, 0.0) + max(0.0, shared)
    return max(spoken, key=lambda speaker: spoken[speaker])


def read_turns(folder: Path) -> dict[str, list[Turn]]:
    """The true turns of each meeting, from its RTTM file."""
    turns: dict[str, list[Turn]] = {}
    for path in folder.glob("*.rttm"):
        for line in path.read_text(encoding="utf-8").splitlines():
            _, name, _, start, length, _, _, speaker, *_ = line.split()
            turn = Turn(float(start), float(start) + float(length), speaker)
            turns.setdefault(name, []).append(turn)
    return turns


if __name__ == "__main__":
    main()
