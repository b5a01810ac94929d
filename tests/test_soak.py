"""Promises of tools/soak.py, and in short what a day of it shows: nothing grows without a limit."""

import asyncio
import contextlib
import gc
import weakref
from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from mosquitto import free_port
from numpy.typing import NDArray
from soak import CHUNK, Report, soak, sound_of
from soak_sound import HOUR_S, Block, Kind, day

from stream_hbaf import dialogue
from stream_hbaf.config import SAMPLE_RATE_HZ, Config, DashboardConfig, MqttConfig
from stream_hbaf.dashboard import feed
from stream_hbaf.live import runtime, slots, speakers
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.running import with_broker
from stream_hbaf.sessions import writer

Sound = NDArray[np.int16]
FIRST, MORE = 4, 5  # utterances until all that is bounded is full, and in each round afterwards


class Unmeasured(Report):
    """Keeps no figures, which would grow."""

    def add(self, kind: Kind, samples: int, seconds: float) -> None:
        pass


async def played(
    recognizer: Recognizer, config: Config, sound: Iterator[tuple[Kind, Sound]], report: Report
) -> None:
    async with contextlib.AsyncExitStack() as opened:
        await soak(recognizer, await with_broker(config, opened), sound, report)


def containers() -> dict[int, tuple[int, str]]:
    """The length of every list, dictionary, set and queue that may have an item for each utterance.

    SQLite keeps up to two hundred dead references, which are none.
    """
    gc.collect()
    found = gc.get_referents(*gc.get_objects())  # the collector doesn't follow dictionaries of text
    return {
        id(one): (len(one), f"{type(one).__name__} of {str(next(iter(one)))[:80]}")
        for one in found
        if issubclass(type(one), list | dict | set | deque)  # proxies warn of their own class
        and len(one) >= FIRST
        and not isinstance(next(iter(one)), weakref.ref)
    }


def test_nothing_grows_by_the_utterance_or_the_chunk(
    recognizer: Recognizer, sentences: list[Sound], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dialogue, published, recorded and shown: what is kept of it is bounded, once and twice
    as many utterances later."""
    limits = [(runtime, "LATENCIES"), (writer, "MOST_IDS"), (speakers, "ENDS_KEPT")]
    for module, limit in (*limits, (dialogue, "TURNS_KEPT"), (slots, "WAITS")):
        monkeypatch.setattr(module, limit, FIRST)
    monkeypatch.setattr(feed, "MAX_EVENTS", 3 * FIRST)  # statuses and switches among them
    silence = np.zeros(SAMPLE_RATE_HZ, np.int16)
    sentence: Sound = np.concatenate([sentences[1][:SAMPLE_RATE_HZ], silence])
    sentence = np.pad(sentence, (0, -len(sentence) % CHUNK))
    piece: tuple[Kind, Sound] = ("dialogue", sentence)
    counted: list[dict[int, tuple[int, str]]] = []

    def sound() -> Iterator[tuple[Kind, Sound]]:
        for count in (FIRST, MORE, MORE):
            yield from [piece] * count
            counted.append(containers())

    config = recognizer.config.model_copy(
        update={
            "record": tmp_path / "sessions",
            "dashboard": DashboardConfig(port=0),
            "mqtt": MqttConfig(port=free_port()),
        }
    )
    report = Unmeasured(every_h=1.0, allocations=False)
    asyncio.run(played(recognizer, config, sound(), report))
    assert report.following.utterances == FIRST + 2 * MORE
    before, between, after = counted
    lengths = [
        (before[one], between[one], after[one]) for one in before if one in between and one in after
    ]
    grown = [each for each in lengths if all(b[0] - a[0] >= MORE for a, b in pairwise(each))]
    assert grown == []


def report_of(memory_mb: list[float], seconds: list[float]) -> Report:
    """A report of a day of ten samples an hour."""
    report = Report(every_h=1.0, allocations=False)
    report.memory = [(number / 10, megabytes) for number, megabytes in enumerate(memory_mb)]
    report.means["speech"] = seconds
    return report


def test_growth_and_slower_chunks_fail(capsys: pytest.CaptureFixture[str]) -> None:
    """The first hour's memory doesn't count; 1.2 MB an hour after it is too much, 0.8 is not."""
    start = [500.0 + 10 * number for number in range(10)]
    flat = [0.02] * 30
    assert report_of([*start, *(600 + 0.08 * n for n in range(230))], flat).passes()
    assert not report_of([*start, *(600 + 0.12 * n for n in range(230))], flat).passes()
    assert not report_of([600.0] * 240, [0.02] * 20 + [0.03] * 10).passes()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("+0.80 MB an hour (limit +1.00)")
    assert lines[-1] == "speech: a chunk took 20.0 ms at first, 30.0 ms at last"


def test_a_short_run_tells_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Less than an hour is no promise."""
    assert not report_of([600.0] * 9, [0.02] * 9).passes()
    assert "play some hours" in capsys.readouterr().out


def test_a_day_has_the_hours_that_were_asked_for() -> None:
    """A quarter of each hour is speech; one hour is a dialogue; a half hour has half of each."""
    blocks = list(day(2.5, speech=0.25, dialogue=1, seed=0))
    seconds = {kind: sum(b.seconds for b in blocks if b.kind == kind) for kind in ("speech",)}
    assert seconds == {"speech": pytest.approx(1.5 * HOUR_S / 4)}
    assert [block for block in blocks if block.kind == "dialogue"] == [Block("dialogue", HOUR_S)]
    assert sum(block.seconds for block in blocks) == pytest.approx(2.5 * HOUR_S)


def test_sound_is_whole_chunks_and_the_same_each_time(sentences: list[Sound]) -> None:
    """Each kind is what it is called; a piece of a day can be played again."""
    kinds: list[Kind] = ["silence", "noise", "music", "speech"]
    blocks = [Block(kind, 60.0) for kind in kinds]
    once, again = (list(sound_of(blocks, sentences, seed=3)) for _ in range(2))
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(once, again, strict=True))
    for kind in kinds:
        whole = np.concatenate([piece for its, piece in once if its == kind])
        assert len(whole) % CHUNK == 0
        assert len(whole) == pytest.approx(60 * SAMPLE_RATE_HZ, abs=CHUNK)
        loudness = np.sqrt(np.mean(np.square(whole, dtype=np.float64)))
        assert (loudness < 10) == (kind == "silence")
