#!/usr/bin/env python3
"""Measure how well speakers are found: joined dialogues, emotions, enrolled voices, meetings.

    tools/measure_speakers.py SHARED [--split test] [--cache FOLDER] [--dialogues 60] [--only PART]
    tools/measure_speakers.py SHARED --emotions 1 2 3 4 [--seeds 0 1 2] [--cache FOLDER]

Prints Markdown tables. Clips are cut by the live segmenter and embedded as live; dialogues join
utterances of 2 to 4 people whom no setting was chosen on (split test). Found speakers are mapped
one to one to the true ones; "not sure" is wrong. "Live" is what was answered at once, the other
figure counts the revisions until the dialogue's end. Meetings go through the whole live path.
"""

import argparse
import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from speaker_clips import Corpus, Said, read_turns
from speaker_emotions import print_emotions

from stream_hbaf.audio.file import FileSource
from stream_hbaf.config import SAMPLE_RATE_HZ, SpeakersConfig, load_config
from stream_hbaf.evaluation.diarization import (
    DiarizationError,
    Turn,
    count_right,
    diarization_error,
)
from stream_hbaf.events import AnyEvent, Utterance
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.speech.diarizer import REMEMBERED_TURNS, Attributed, Diarizer

SEED = 16
PARTS = ("dialogues", "enrolled", "meetings", "others")
TURNS = 24  # of a joined RAVDESS dialogue
TURNS_OF_AN_EMOTION = 4  # of each speaker in each half of a dialogue across emotions
ENROLLED = 4  # voices that are enrolled, of whom half never speak
ENROLMENT_TURNS = 5  # utterances of a RAVDESS enrolment, all neutral or calm
MEETINGS = {"dev": ("trn01", "trn02", "trn03"), "test": ("dev00", "sample")}
CALM = ("01", "02")  # RAVDESS's emotions of an enrolment: neutral, calm

MIXTURES = 60  # of two readers at once
MIXED_LEVEL = 2000.0  # root mean square of each of them
REPEATS = 9  # of a measurement of time, of which the median counts

Float64 = NDArray[np.float64]


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
    parser.add_argument("--only", choices=PARTS, action="append", help="a table; all by default")
    parser.add_argument(
        "--emotions",
        type=int,
        nargs="+",
        default=[],
        metavar="SESSION",
        help="only emotions of IEMOCAP; for each session, a network is trained without it",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of these networks")
    arguments = parser.parse_args()
    if arguments.emotions:
        cache, seeds = arguments.cache or Path("cache"), arguments.seeds
        print_emotions(arguments.data, cache=cache, sessions=arguments.emotions, seeds=seeds)
        return
    split, number = arguments.split, arguments.dialogues
    wanted = arguments.only or PARTS
    corpus = Corpus(arguments.data, arguments.cache)
    if "dialogues" in wanted:
        print_dialogues(corpus.ravdess(split), corpus.libri(split), number)
    if "enrolled" in wanted:
        print(
            "\n| enrolled voices | right, of names | of all answers | answered | strangers named |"
        )
        print("| --- | --- | --- | --- | --- |")
        acted, read = corpus.ravdess(split), corpus.libri(split)
        print_enrolled("RAVDESS", acted, number, is_enrolment=lambda said: said.emotion in CALM)
        print_enrolled("LibriSpeech", read, number, is_enrolment=lambda said: said.start_s < 6.0)
    if "meetings" in wanted:
        print_meetings(corpus, split)
    if "others" in wanted:
        print_bad_input(corpus, corpus.libri(split), split)
        print_cost(corpus, corpus.libri(split))


def print_dialogues(acted: Sequence[Said], read: Sequence[Said], number: int) -> None:
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
    said = [one for one in said if one.embedding is not None]
    speakers = sorted({one.speaker for one in said if is_enrolment(one)})
    absent = ENROLLED - 2 if len(speakers) >= ENROLLED + 2 else 0
    right = names = answered = known = named = strange = 0
    for _ in range(number):
        people = random.choice(speakers, 4 + absent, replace=False).tolist()
        strangers, enrolled = people[:2], people[2:]
        voices, turns = {}, []
        for speaker in people:
            own = [one for one in said if one.speaker == speaker]
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
                known, answered = known + 1, answered + bool(speaker)
                names, right = names + (speaker in voices), right + (speaker == one.speaker)
    shares = (right / names, right / answered, answered / known, named / strange)
    print(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")


def centroid(said: Sequence[Said]) -> Float64:
    embeddings = [one.embedding for one in said if one.embedding is not None]
    mean: Float64 = np.mean(embeddings, axis=0, dtype=np.float64)
    return mean


def print_meetings(corpus: Corpus, split: str) -> None:
    """Pieces of meetings through the whole live path, as published at once and as revised."""
    folder = corpus.folder / "speech/meeting"
    reference = read_turns(folder)
    overrides = {"speakers.engine": "campplus", "source.name": "table"}
    total = {"at once": DiarizationError(), "revised": DiarizationError()}
    right: dict[str, list[bool]] = {kind: [] for kind in total}
    print("\n| meeting | DER | missed | false alarm | confused | right speaker |")
    print("| --- | --- | --- | --- | --- | --- |")
    with Recognizer(load_config(overrides=overrides)) as recognizer:
        for name in MEETINGS[split]:
            ends = published(recognizer, folder / f"{name}.flac")
            first = {end.id: end for end in reversed(ends)}
            for kind, chosen in (("at once", first), ("revised", {end.id: end for end in ends})):
                found = [turn_of(end) for end in chosen.values()]
                error = diarization_error(reference[name], found)
                true = [longest(reference[name], one) for one in found]
                own = count_right(true, [one.speaker for one in found])
                total[kind], right[kind] = total[kind] + error, [*right[kind], *own.tolist()]
                print_meeting(f"{name}, {kind}", error, own)
    for kind, error in total.items():
        print_meeting(f"all, {kind}", error, np.array(right[kind]))


class Ends:
    """A publisher that keeps every ``end``, revisions included."""

    def __init__(self) -> None:
        self.ends: list[Utterance] = []

    async def send(self, event: AnyEvent) -> None:
        if isinstance(event, Utterance) and event.type == "end":
            self.ends.append(event)

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        pass


def published(recognizer: Recognizer, path: Path) -> list[Utterance]:
    """The ``end`` events of a recording's utterances, in the order of their publication."""
    publisher = Ends()

    async def run() -> None:
        async with FileSource(path, speed=None, chunk_ms=100, on_status=lambda *_: None) as source:
            await LivePipeline(recognizer, [publisher]).run(source, stop=asyncio.Event())

    asyncio.run(run())
    return publisher.ends


def turn_of(end: Utterance) -> Turn:
    assert end.audio_end_ms is not None
    return Turn(end.audio_start_ms / 1000, end.audio_end_ms / 1000, end.speaker)


def print_meeting(name: str, error: DiarizationError, right: NDArray[np.bool_]) -> None:
    parts = (error.missed_s, error.false_alarm_s, error.confused_s)
    shares = " | ".join(f"{part / error.speech_s:.1%}" for part in parts)
    print(f"| {name} | {error.rate:.1%} | {shares} | {right.sum()} of {len(right)} |")


def longest(turns: Sequence[Turn], said: Turn) -> str:
    """Who speaks most of an utterance."""
    spoken: dict[str, float] = {"": 0.0}
    for turn in turns:
        shared = min(turn.end_s, said.end_s) - max(turn.start_s, said.start_s)
        spoken[turn.speaker] = spoken.get(turn.speaker, 0.0) + max(0.0, shared)
    return max(spoken, key=lambda speaker: spoken[speaker])


def print_bad_input(corpus: Corpus, said: Sequence[Said], split: str) -> None:
    """Sounds that are no voice, and two readers at once, with these and two others enrolled."""
    random = np.random.default_rng(SEED)
    embeddings = [corpus.encoder.embed(sound) for sound in corpus.sounds(split)]
    taken = np.mean([one is not None for one in embeddings])
    count = Counter(one.speaker for one in said if one.embedding is not None)
    speakers = sorted(speaker for speaker, utterances in count.items() if utterances > 1)
    found = {"one of them": 0, "somebody else": 0, "not named": 0}
    for _ in range(MIXTURES):
        people = random.choice(speakers, ENROLLED, replace=False).tolist()
        own = [[one for one in said if one.speaker == person] for person in people]
        voices = {person: centroid(one[:-1]) for person, one in zip(people, own, strict=True)}
        both = mix(*(corpus.audio(one[-1]) for one in own[:2]))
        diarizer = Diarizer(SpeakersConfig(), voices=voices)
        speaker = diarizer.add(0, corpus.encoder.embed(both), duration_s=3.0)[-1].speaker
        who = "one of them" if speaker in people[:2] else "somebody else"
        found[who if speaker in people else "not named"] += 1
    shares = ", ".join(f"{who} {number / MIXTURES:.1%}" for who, number in found.items())
    print(f"\nSounds that are no voice, taken for one: {taken:.1%} of {len(embeddings)}.")
    print(f"Two readers at once, named as: {shares}.")


def mix(one: NDArray[np.int16], other: NDArray[np.int16]) -> NDArray[np.int16]:
    """Both at once, equally loud, as long as the shorter one."""
    length = min(len(one), len(other))
    waves = [wave[:length] / max(1.0, float(wave.std())) for wave in (one, other)]
    mixed: NDArray[np.int16] = (
        ((waves[0] + waves[1]) * MIXED_LEVEL).clip(-32768, 32767).astype(np.int16)
    )
    return mixed


def print_cost(corpus: Corpus, said: Sequence[Said]) -> None:
    """CPU after the end of an utterance of 3 s, on one thread, and of a turn's attribution."""
    torch.set_num_threads(1)
    audio = np.resize(corpus.audio(said[0]), 3 * SAMPLE_RATE_HZ)
    finished = []
    for _ in range(REPEATS):
        stream = corpus.encoder.open()
        stream.feed(audio[:-160])
        began = time.process_time()
        stream.finish()
        finished.append(time.process_time() - began)
    turns = [one for one in said if one.embedding is not None][: REMEMBERED_TURNS + 1]
    diarizer = Diarizer(SpeakersConfig())
    diarize(diarizer, turns[:-1])
    began = time.process_time()
    diarizer.add(len(turns), turns[-1].embedding, duration_s=turns[-1].duration_s)
    spent = time.process_time() - began
    print(f"\nCPU after an utterance of 3 s: {1000 * np.median(finished):.0f} ms; ", end="")
    print(f"attribution of turn {len(turns)}: {1000 * spent:.0f} ms.")


if __name__ == "__main__":
    main()
