"""The live pipeline on real sound: live equals replay, events, failures, bounds."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_kit import PATIENCE_S, EventLog, RandomChunks, assert_same, recognise
from numpy.typing import NDArray

from stream_hbaf.audio.file import FileSource
from stream_hbaf.audio.source import Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.errors import ModelError
from stream_hbaf.events import AnyEvent, DialogueSummary, Level, Partial, Speech, Status, Utterance
from stream_hbaf.features.blocks import BlockFrontEnd
from stream_hbaf.features.commonsense import Inferences
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.live.source import CHUNKS_WAITING
from stream_hbaf.recognizer import Recognizer

Sound = NDArray[np.int16]

PATIENT_MS = 4_000  # of silence end an utterance; a busy machine has measured it before


def test_chunks_of_any_size_give_the_same_utterances(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """Promise 1, for the whole path: how the sound is cut into chunks changes nothing."""
    sound = np.concatenate(sentences[1:3])
    first = recognise(recognizer, RandomChunks(sound, seed=1))
    second = recognise(recognizer, RandomChunks(sound, seed=2, pace=4))
    assert len(first) >= 2
    assert_same(first, second)


class WaitsForPartials(RandomChunks):
    """Goes on after 1.5 s, and after 2.75 s, once a partial transcript has been published.

    So the number of partials doesn't depend on how busy the machine is.
    """

    def __init__(self, sound: Sound, *, seed: int) -> None:
        super().__init__(sound, seed=seed, pace=1)
        self.read_partial = asyncio.Semaphore(0)

    async def chunks(self) -> AsyncIterator[Chunk]:
        stops = [3 * SAMPLE_RATE_HZ // 2, 11 * SAMPLE_RATE_HZ // 4]
        async for chunk in super().chunks():
            yield chunk
            if stops and chunk.start + len(chunk.samples) >= stops[0]:
                stops.pop(0)
                async with asyncio.timeout(PATIENCE_S):
                    await self.read_partial.acquire()


def test_utterance_is_published_from_new_to_end(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """One id, rising revs, new first and end last, a partial a second, then the whole event."""
    source = WaitsForPartials(sentences[1], seed=3)

    class Releasing(EventLog):
        async def send(self, event: AnyEvent) -> None:
            await super().send(event)
            if isinstance(event, Partial):
                source.read_partial.release()

    log = Releasing()
    recognise(recognizer, source, [log])
    events = [e for e in log.events if isinstance(e, Utterance)]
    assert len({e.id for e in events}) == 1
    assert [e.rev for e in events] == list(range(1, len(events) + 1))
    assert [events[0].type, events[-1].type] == ["new", "end"]
    assert {e.type for e in events[1:-1]} <= {"update"}
    partials = log.partials()
    assert len(partials) >= 2
    assert partials[-1].id == events[0].id
    assert "was not" in partials[-1].text
    speech = [e.on for e in log.events if isinstance(e, Speech)]
    assert speech == [True, False]
    assert any(isinstance(e, Level) and e.dbfs > -40 for e in log.events)

    end = events[-1]
    assert "young man" in end.text
    assert end.speaker == "reader"
    assert end.trigger == "silence"
    assert end.modalities == ["audio", "text"]
    assert end.emotion is not None
    assert sum(end.emotion.probabilities.values()) == pytest.approx(1)
    assert end.emotion.score == max(end.emotion.probabilities.values())
    assert end.emotion.label in end.emotion.set
    assert end.contributions is not None
    assert end.contributions.context == 0.0  # a dialogue's first
    assert end.contributions.audio != 0.0 != end.contributions.text
    assert end.conflict is not None
    assert all(e.contributions is None for e in events[:-1])
    assert end.latency_ms is not None
    assert end.latency_ms.total >= end.latency_ms.vad > 300
    assert end.degraded == ""
    assert end.model is not None
    assert end.model == recognizer.model


def is_of(sentence: Sound, samples: Sound) -> bool:
    """Whether an utterance, whole or up to a pause, is cut out of this sentence."""
    return samples[:SAMPLE_RATE_HZ].tobytes() in sentence.tobytes()


def test_failing_transcript_degrades_one_utterance_only(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Whisper that fails once costs that utterance its text; other parts of the sound remain."""
    real, failed = recognizer.transcriber.final, threading.Event()

    def failing_first(samples: Sound, **named: Any) -> Any:
        if is_of(sentences[1], samples):
            failed.set()
            raise ModelError("out of memory; close other programs")
        failed.wait(10)  # else the second may be transcribed before the first has failed
        return real(samples, **named)

    monkeypatch.setattr(recognizer.transcriber, "final", failing_first)
    log = EventLog()
    recognise(recognizer, RandomChunks(np.concatenate(sentences[1:3]), seed=4), [log])
    first, *others = log.ends()
    assert first.degraded == "transcript: out of memory; close other programs"
    assert first.modalities == ["audio"]
    assert first.emotion is not None
    assert others
    assert all(end.degraded == "" and end.text for end in others)
    states = [e.state for e in log.events if isinstance(e, Status) and e.stage == "transcript"]
    assert states == ["online", "degraded", "online"]


def test_inferences_are_published_at_the_end_and_only_of_text(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ``end`` with text has its inferences; one without text, or an earlier event, has none."""
    width = recognizer.bundle.config.network.commonsense_width

    def encode(phrases: Sequence[str]) -> NDArray[np.float32]:
        draw = np.random.default_rng(len(phrases))
        return draw.normal(size=(len(phrases), width)).astype(np.float32)

    written = {"external": ["sad"], "internal": ["ill", "glad"], "purpose": ["to a", "to b"]}
    known = Inferences.choose(
        {relation: dict.fromkeys(phrases, 1) for relation, phrases in written.items()},
        encode_phrases=encode,
        temperature=0.07,
    )
    monkeypatch.setattr(recognizer, "bundle", replace(recognizer.bundle, inferences=known))
    wanted = recognizer.config.model_copy(update={"inferences": True})
    monkeypatch.setattr(recognizer, "config", wanted)
    real = recognizer.transcriber.final

    def silent_first(samples: Sound, **named: Any) -> Any:
        found = real(samples, **named)
        return replace(found, text="") if is_of(sentences[1], samples) else found

    monkeypatch.setattr(recognizer.transcriber, "final", silent_first)
    log = EventLog()
    found = recognise(recognizer, RandomChunks(np.concatenate(sentences[1:3]), seed=4), [log])
    silent, *others = log.ends()
    assert (silent.text, silent.inferences) == ("", None)
    assert others
    for end, recognition in zip(others, found[1:], strict=True):
        assert recognition.text is not None
        assert recognition.text.commonsense is not None
        assert end.inferences is not None
        phrases_of = end.inferences.model_dump()
        assert phrases_of == known.nearest(recognition.text.commonsense)
        assert {relation: sorted(phrases) for relation, phrases in phrases_of.items()} == {
            relation: sorted(phrases) for relation, phrases in written.items()
        }
    earlier = [e for e in log.events if isinstance(e, Utterance) and e.type != "end"]
    assert all(e.inferences is None for e in earlier)


def test_other_language_is_logged_only_of_final_transcripts(
    recognizer: Recognizer,
    sentences: list[Sound],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A partial or discarded transcript in another language loses no text; a final one does."""
    monkeypatch.setattr(recognizer, "_warned_of_other_language", False)
    transcriber, spanish = recognizer.transcriber, Transcript("", "es", 0.0, 1.0)
    monkeypatch.setattr(transcriber, "partial", lambda *_, **__: spanish)
    source = WaitsForPartials(sentences[1], seed=3)

    class Releasing(EventLog):
        async def send(self, event: AnyEvent) -> None:
            await super().send(event)
            if isinstance(event, Partial):
                source.read_partial.release()

    log = Releasing()
    recognise(recognizer, source, [log])
    assert len(log.partials()) >= 2
    assert all(end.text for end in log.ends())
    assert caplog.messages == []
    monkeypatch.setattr(transcriber, "final", lambda *_, **__: spanish)
    finals = EventLog()
    recognise(recognizer, RandomChunks(np.concatenate(sentences[1:3]), seed=4), [finals])
    assert [end.text for end in finals.ends()] == [""] * len(finals.ends())
    assert len(finals.ends()) >= 2
    assert caplog.messages == [
        "that sounded like language 'es', not 'en': its words are left out; "
        "--language es writes them down"
    ]


def test_models_never_run_on_the_event_loop(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise 5: each model is called in threads of its own and in no other."""
    threads: dict[str, set[str]] = {}

    def watch(owner: Any, name: str, stage: str) -> None:
        real = getattr(owner, name)

        def called(*arguments: Any, **named: Any) -> Any:
            threads.setdefault(stage, set()).add(threading.current_thread().name)
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, called)

    watch(recognizer.transcriber, "final", "transcript")
    watch(recognizer.transcriber, "partial", "transcript")
    watch(recognizer.acoustic, "open", "acoustic")
    watch(recognizer, "encode_text", "classifier")
    watch(recognizer, "classify", "classifier")
    recognise(recognizer, RandomChunks(sentences[1], seed=5))
    assert threads.keys() == {"transcript", "acoustic", "classifier"}
    assert all(name.startswith(f"{stage}_") for stage, names in threads.items() for name in names)


def test_slow_publisher_holds_the_source_back_and_loses_nothing(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """Promise 6: queues are bounded; finished utterances wait, and are published in order."""
    gate = asyncio.Event()

    class Stuck(EventLog):
        async def send(self, event: AnyEvent) -> None:
            if isinstance(event, Utterance) and event.type == "end":
                await gate.wait()
            await super().send(event)

    stuck = Stuck()
    source = RandomChunks(np.tile(sentences[4], 20), seed=6)

    async def open_gate(_: LivePipeline) -> None:
        before = -1
        while source.taken != before:  # until nothing moves any more
            before = source.taken
            await asyncio.sleep(3)
        begun = len([e for e in stuck.events if isinstance(e, Utterance) and e.type == "new"])
        assert begun <= 8
        assert source.taken * 2000 < 9 * len(sentences[4]) + CHUNKS_WAITING * 4000
        gate.set()

    recognise(recognizer, source, [stuck], meanwhile=open_gate)
    ends = stuck.ends()
    assert [end.turn for end in ends] == list(range(1, 21))


def test_utterance_ends_when_the_device_is_lost(
    recognizer: Recognizer, sentences: list[Sound]
) -> None:
    """The utterance before a microphone is lost is published at once, not when it is back."""

    log = EventLog()
    pipelines: list[LivePipeline] = []

    class Unplugged(RandomChunks):
        async def chunks(self) -> AsyncIterator[Chunk]:
            async for chunk in super().chunks():
                yield chunk
            pipelines[0].report_capture("offline", "unplugged")
            await log.until(lambda: bool(log.ends()))

    async def know(pipeline: LivePipeline) -> None:
        pipelines.append(pipeline)

    half = sentences[1][: 3 * SAMPLE_RATE_HZ // 2]
    recognise(recognizer, Unplugged(half, seed=9), [log], meanwhile=know)
    (end,) = log.ends()
    assert end.text
    assert end.trigger == "end_of_input"
    states = [e.state for e in log.events if isinstance(e, Status) and e.stage == "capture"]
    assert states == ["online", "offline"]


class SlowAtTheSecondEnd(EventLog):
    """Takes the second ``end`` only when a third utterance has begun."""

    async def send(self, event: AnyEvent) -> None:
        await super().send(event)
        if len(self.ends()) == 2 and event is self.ends()[-1]:
            await self.until(lambda: self.begun() == 3)

    def begun(self) -> int:
        return sum(isinstance(one, Utterance) and one.type == "new" for one in self.events)


def test_long_silence_begins_a_new_dialogue(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After dialogue.gap_s the state is forgotten: a new dialogue id, turn 1.

    The summary of the first counts its last utterance, which was published later than that.
    """
    config = recognizer.config.model_copy(
        update={"dialogue": recognizer.config.dialogue.model_copy(update={"gap_s": 3})}
    )
    monkeypatch.setattr(recognizer, "config", config)
    silence = np.zeros(4 * SAMPLE_RATE_HZ, np.int16)
    sound = np.concatenate([sentences[1], sentences[4], silence, sentences[4]])
    log = SlowAtTheSecondEnd()
    recognise(recognizer, RandomChunks(sound, seed=7), [log])
    ends = log.ends()
    assert [end.turn for end in ends] == [1, 2, 1]
    assert ends[0].dialogue_id == ends[1].dialogue_id != ends[2].dialogue_id
    summaries = [event for event in log.events if isinstance(event, DialogueSummary)]
    assert [(one.dialogue_id, one.turns) for one in summaries] == [
        (end.dialogue_id, end.turn) for end in ends
    ]


def test_recording_replayed_from_a_file_equals_live(
    recognizer: Recognizer, sentences: list[Sound], tmp_path: Path
) -> None:
    """Promise 2, file against paced chunks: same segments, features, words, probabilities."""
    import wave

    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
        file.writeframes(sentences[2].tobytes())
    replayed = recognise(
        recognizer, FileSource(path, speed=None, chunk_ms=320, on_status=lambda *_: None)
    )
    assert_same(recognise(recognizer, RandomChunks(sentences[2], seed=8, pace=4)), replayed)


class Watched:
    """A representation that notes, of each utterance it is given, how many had ended by then."""

    name, version, width = "watched", "1", 1

    def __init__(self, log: EventLog) -> None:
        self.given: list[tuple[int, int]] = []  # samples, utterances that had ended
        self._log = log

    def extract(self, samples: Sound) -> NDArray[np.float32]:
        ended = sum(isinstance(one, Speech) and not one.on for one in self._log.events)
        self.given.append((len(samples), ended))
        return np.array([len(samples)], np.float32)

    def close(self) -> None:
        pass


def test_what_needs_the_whole_utterance_is_there_when_it_ends(
    recognizer: Recognizer, sentences: list[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are computed at the pause, before the endpoint is confirmed, and not once more."""
    assert recognizer.acoustic is not None
    log = EventLog()
    watched = Watched(log)
    monkeypatch.setattr(recognizer, "acoustic", BlockFrontEnd(recognizer.acoustic, [watched]))
    patient = recognizer.config.segmenter.model_copy(update={"min_silence_ms": PATIENT_MS})
    monkeypatch.setattr(
        recognizer, "config", recognizer.config.model_copy(update={"segmenter": patient})
    )
    silence = np.zeros(PATIENT_MS * SAMPLE_RATE_HZ // 1000, np.int16)
    sound = np.concatenate([sentences[4], silence])
    found = recognise(recognizer, RandomChunks(sound, seed=8, pace=1), [log])
    assert found
    for number, one in enumerate(found):
        assert one.acoustic is not None
        length = int(one.acoustic.blocks["watched"][0])
        assert [ended for samples, ended in watched.given if samples == length] == [number]
