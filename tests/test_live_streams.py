"""Many streams in one process: the same answers as alone, and what load costs."""

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from live_kit import EventLog, RandomChunks, assert_same
from numpy.typing import NDArray

from stream_hbaf.audio.source import AudioSource
from stream_hbaf.config import SourceConfig
from stream_hbaf.events import Health
from stream_hbaf.features.blocks import BlockFrontEnd
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.features.whisper_encoder import decoders
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.live.runtime import Recognition
from stream_hbaf.recognizer import Recognizer

Sound = NDArray[np.int16]


def recognise_streams(
    recognizer: Recognizer, sounds: Mapping[str, Sound], *, pace: float | None = None
) -> tuple[dict[str, list[Recognition]], Health]:
    """What was recognised of each stream, and the health after all."""
    log, found = EventLog(), list[Recognition]()
    pipeline = LivePipeline(recognizer, [log], on_recognition=found.append)
    sources: dict[SourceConfig, AudioSource] = {
        SourceConfig(name=name, where="test"): RandomChunks(sound, seed=n, pace=pace)
        for n, (name, sound) in enumerate(sounds.items())
    }
    asyncio.run(pipeline.run(sources, stop=asyncio.Event()))
    source_of = {end.id: end.source for end in log.ends()}
    assert len(source_of) == len(log.ends()) == len(found)
    by_source: dict[str, list[Recognition]] = {name: [] for name in sounds}
    for recognition in found:
        by_source[source_of[recognition.id]].append(recognition)
    return by_source, pipeline.health()


def test_a_stream_beside_fifteen_others_is_the_same_as_alone(
    recognizer: Recognizer, sentences: Sequence[Sound]
) -> None:
    """Segments, features and words; probabilities within 1e-5. No ``end`` of anybody is lost."""
    own = np.concatenate(sentences[1:3])
    alone, _ = recognise_streams(recognizer, {"own": own})
    others = {f"other{n}": sentences[n % len(sentences)] for n in range(15)}
    beside, health = recognise_streams(recognizer, {"own": own} | others)
    assert len(alone["own"]) == 2
    assert_same(beside["own"], alone["own"])
    assert all(len(found) == 1 for found in list(beside.values())[1:])
    for n in range(5, 15):
        assert_same(beside[f"other{n}"], beside[f"other{n % 5}"])
    assert health.queues["transcripts"] == 0


def test_load_costs_partials_first(recognizer: Recognizer, sentences: Sequence[Sound]) -> None:
    """Eight streams, ten times as fast as people speak: ``health`` says what was left out."""
    sounds = {f"stream{n}": sentences[n % len(sentences)] for n in range(8)}
    found, health = recognise_streams(recognizer, sounds, pace=10)
    assert all(len(each) == 1 and each[0].text for each in found.values())
    assert health.dropped["partial_transcripts"] >= health.dropped["speculative_transcripts"] > 0


def test_embeddings_and_transcripts_share_slots(
    recognizer: Recognizer, sentences: Sequence[Sound], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of both together at once than there are; each ``end`` has an embedding of the whole
    utterance."""
    assert recognizer.acoustic is not None
    load, transcribe = Load(), recognizer.transcriber.final

    def final(*arguments: Any, **named: Any) -> Transcript:
        with load:
            return transcribe(*arguments, **named)

    slow = Slow(load)
    monkeypatch.setattr(recognizer.transcriber, "final", final)
    monkeypatch.setattr(recognizer, "acoustic", BlockFrontEnd(recognizer.acoustic, [slow]))
    sounds = {f"stream{n}": sentences[n % len(sentences)] for n in range(6)}
    found, _ = recognise_streams(recognizer, sounds, pace=4)
    for each in found.values():
        (one,) = each
        assert one.acoustic is not None
        assert int(one.acoustic.blocks["slow"][0]) == one.finish.end - one.finish.start
    assert load.most == decoders()


class Load:
    """How many are inside at once, at most."""

    def __init__(self) -> None:
        self.most = 0
        self._inside = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1


class Slow:
    """A representation, the number of samples, that takes half a second."""

    name, version, width = "slow", "1", 1

    def __init__(self, load: Load) -> None:
        self._load = load

    def extract(self, samples: Sound) -> NDArray[np.float32]:
        with self._load:
            time.sleep(0.5)
        return np.array([len(samples)], np.float32)

    def close(self) -> None:
        pass
