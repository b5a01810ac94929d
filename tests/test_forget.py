"""Erasing a dialogue: everything that was ever written of it, or an error that can be repeated."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_disk import full_disk
from session_samples import RECORDING, Samples, chunk, header, summary, utterance

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, MqttConfig
from stream_hbaf.errors import ConfigError, CorpusError
from stream_hbaf.events import Feedback, Info, Model, Request
from stream_hbaf.live.control import Controls, DialogueStore
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.publish.messages import Message
from stream_hbaf.publish.outbox import LeftOutboxes, Outbox
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.sessions.erasing import erase_dialogue
from stream_hbaf.sessions.recorder import SessionRecorder
from stream_hbaf.sessions.session import Session
from stream_hbaf.sessions.writer import SessionWriter

SECOND = SAMPLE_RATE_HZ


@pytest.fixture(scope="module")
def speech() -> Samples:
    """Eleven seconds of a speech."""
    return read_audio(RECORDING)


def session(folder: Path, speech: Samples, *, name: str = "s", dialogue: str = "d1") -> Session:
    """Three seconds of sound, in which an utterance lasts from second 1 to 2."""
    writer = SessionWriter(folder, header=header(name))
    writer.write_audio("a", chunk(speech, 0, 3 * SECOND))
    for kind in ("new", "end"):
        writer.write_event(utterance(kind, dialogue=dialogue))
    writer.write_event(summary().model_copy(update={"dialogue_id": dialogue}))
    writer.write_event(Feedback(id=f"{dialogue}-1", label="joy"))
    writer.close()
    return Session(writer.folder)


def silenced(speech: Samples) -> Samples:
    expected = speech[: 3 * SECOND].copy()
    expected[SECOND : 2 * SECOND] = 0
    return expected


def lines(of: Session) -> bytes:
    return (of.folder / "events.jsonl").read_bytes()


def test_a_full_disk_leaves_the_lines_until_the_sound_is_gone(
    speech: Samples, tmp_path: Path
) -> None:
    """The first attempt is an error and changes nothing; the second erases all."""
    kept = session(tmp_path, speech)
    before = {path.name: path.read_bytes() for path in kept.folder.iterdir()}
    with full_disk(), pytest.raises(OSError, match="File too large"):
        erase_dialogue(kept, "d1")
    assert {path.name: path.read_bytes() for path in kept.folder.iterdir()} == before
    assert erase_dialogue(Session(kept.folder), "d1") == 1
    assert np.array_equal(read_audio(kept.audio_file("a")), silenced(speech))
    assert lines(kept) == b""
    assert erase_dialogue(Session(kept.folder), "d1") == 0


def test_sound_around_a_gap_in_an_utterance_is_silenced(speech: Samples, tmp_path: Path) -> None:
    """What was lost in its midst must not keep the rest of the voice."""
    writer = SessionWriter(tmp_path, header=header())
    writer.write_audio("a", chunk(speech, 0, SECOND * 3 // 2))
    writer.write_audio("a", chunk(speech, SECOND * 7 // 4, 3 * SECOND), after_loss=True)
    writer.write_event(utterance("end"))
    writer.close()
    kept = Session(writer.folder)
    assert kept.clip(utterance("end")) is None
    assert erase_dialogue(kept, "d1") == 1
    expected = np.delete(silenced(speech), np.s_[SECOND * 3 // 2 : SECOND * 7 // 4])
    assert np.array_equal(read_audio(kept.audio_file("a")), expected)


def test_an_utterance_without_an_end_lasts_to_the_next(speech: Samples, tmp_path: Path) -> None:
    """Another dialogue's words behind it stay."""
    writer = SessionWriter(tmp_path, header=header())
    writer.write_audio("a", chunk(speech, 0, 3 * SECOND))
    writer.write_event(utterance("new"))
    writer.write_event(utterance("new", dialogue="d2", start_ms=2000))
    writer.close()
    kept = Session(writer.folder)
    assert erase_dialogue(kept, "d1") == 1
    assert np.array_equal(read_audio(kept.audio_file("a")), silenced(speech))
    assert b'"d2-1"' in lines(kept)


def test_what_a_killed_writer_left_goes_too(speech: Samples, tmp_path: Path) -> None:
    """It may be a copy of the sound."""
    kept = session(tmp_path, speech)
    left = kept.folder / ".a.flac.1-00000000.part"
    left.write_bytes(b"voice")
    assert erase_dialogue(kept, "other") == 0
    assert left.exists()
    assert erase_dialogue(kept, "d1") == 1
    assert not left.exists()


def test_lines_that_cannot_be_read_stay_as_they_are(speech: Samples, tmp_path: Path) -> None:
    """A damaged line of another dialogue, and one of a later version, keep their bytes."""
    kept = session(tmp_path, speech)
    others = b'{"schema":"stream_hbaf/later/9","x":1}\n{"half\n'
    (kept.folder / "events.jsonl").write_bytes(lines(kept) + others + b'{"d1-half')
    assert erase_dialogue(kept, "d1") == 1
    assert lines(kept) == others


def test_a_damaged_line_that_names_the_dialogue_is_reported(
    speech: Samples, tmp_path: Path
) -> None:
    """Its sound can't be found: all else is erased, and each attempt says what is left."""
    kept = session(tmp_path, speech)
    damaged = b'{"id":"d1-2","dialogue_id":"d1","text":"wo\n'
    (kept.folder / "events.jsonl").write_bytes(damaged + lines(kept))
    for _ in range(2):
        with pytest.raises(CorpusError, match=r"events\.jsonl:1: can't be read, and names the"):
            erase_dialogue(Session(kept.folder), "d1")
        assert lines(kept) == damaged
    assert np.array_equal(read_audio(kept.audio_file("a")), silenced(speech))


def test_a_line_of_extreme_length_is_no_obstacle(speech: Samples, tmp_path: Path) -> None:
    """It keeps its bytes, unless it names the dialogue: then it is reported."""
    kept = session(tmp_path, speech)
    endless = b'{"x":"' + b"y" * 2_500_000
    (kept.folder / "events.jsonl").write_bytes(endless + b'"}\n' + lines(kept) + endless)
    assert erase_dialogue(kept, "d1") == 1
    assert lines(kept) == endless + b'"}\n' + endless
    (kept.folder / "events.jsonl").write_bytes(endless + b"d1\n")
    with pytest.raises(CorpusError, match=r"events\.jsonl:1: can't be read, and names the"):
        erase_dialogue(Session(kept.folder), "d1")


def test_one_session_that_fails_keeps_no_other(
    recognizer: Recognizer, speech: Samples, tmp_path: Path
) -> None:
    """Damaged headers don't matter; what is being recorded elsewhere is named; the rest goes."""
    first, second = (session(tmp_path, speech, name=name) for name in ("a", "b"))
    (first.folder / "session.json").write_bytes(b'{"format":')
    elsewhere = SessionWriter(tmp_path, header=header("c"))
    elsewhere.write_event(utterance("end"))

    async def main() -> None:
        recorder = SessionRecorder(tmp_path, config=recognizer.config, recognizer=recognizer)
        with pytest.raises(ConfigError, match=r"not all was erased: .*/c is being recorded"):
            await recorder.forget("d1")
        elsewhere.close()
        assert await recorder.forget("d1") == 1
        assert await recorder.forget("d1") == 0
        await recorder.close(5.0)

    asyncio.run(main())
    for one in (first, second):
        assert lines(one) == b""
        assert np.array_equal(read_audio(one.audio_file("a")), silenced(speech))


# ---- outboxes


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The state directory of this test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "stream_hbaf"


def content(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


async def filled(host: str, *words: str) -> Outbox:
    """An outbox for a broker, with messages of the dialogue d1."""
    config = MqttConfig(url=f"mqtt://{host}", prefix="p", node="n")
    outbox = Outbox(config, on_report=lambda line: None)
    await outbox.open()
    found = [
        Message("p/n/m/utterance", f'{{"text":"{w}"}}'.encode(), dialogue_id="d1") for w in words
    ]
    other = Message("p/n/m/utterance", b'{"text":"public"}', dialogue_id="d2")
    await outbox.put([*found, other], broker_away=True)
    return outbox


def test_outboxes_for_other_brokers_and_damaged_files_are_erased(state: Path) -> None:
    """Also by a run that has no broker."""

    async def main() -> None:
        for host in ("one", "two"):
            await (await filled(host, "secret")).close()
        (state / "outbox-n-0.damaged").write_bytes(b"secret in pieces")
        assert await LeftOutboxes().forget("d1") == 2
        assert b"secret" not in content(state)
        assert content(state).count(b"public") == 2
        outbox = await filled("one", "secret")
        await (await filled("two", "secret")).close()
        assert await outbox.forget("d1") == 2
        assert b"secret" not in content(state)
        await outbox.close()

    asyncio.run(main())


def test_an_outbox_in_use_is_named(state: Path) -> None:
    """Its recogniser holds the messages in memory as well, and would write them again."""

    async def main() -> None:
        theirs = await filled("theirs", "secret")
        with pytest.raises(ConfigError, match=r"a recogniser that runs has outbox-n-\w+-0\.sqlite"):
            await LeftOutboxes().forget("d1")
        assert await LeftOutboxes().forget("nothing") == 0
        await theirs.close()
        assert await LeftOutboxes().forget("d1") == 1

    asyncio.run(main())


def test_an_outbox_on_a_full_disk_can_be_erased_later(state: Path) -> None:
    """The first attempt says so; the second still finds the messages."""

    async def main() -> None:
        outbox = await filled("one", *("secret" * 500 for _ in range(3)))
        with full_disk(), pytest.raises(ConfigError, match="forget: not all was erased: outbox"):
            await outbox.forget("d1")
        assert await outbox.forget("d1") == 3
        assert b"secret" not in content(state)
        await outbox.close()

    asyncio.run(main())


def test_nothing_was_ever_published(state: Path) -> None:
    """Without a state directory there is nothing to erase, and none is made."""
    assert asyncio.run(LeftOutboxes().forget("d1")) == 0
    assert not state.exists()


# ---- all of them


class Store:
    """Refuses as often as it is told."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.asked = 0

    async def forget(self, dialogue_id: str) -> int:
        self.asked += 1
        if self.asked <= self.refusals:
            raise ConfigError("forget: not all was erased: no room; then ask again")
        return 1


def test_every_store_is_asked_whatever_one_answers(recognizer: Recognizer) -> None:
    """The answer is an error as long as anything is left."""
    stores: Sequence[Store] = (Store(1), Store(0))
    info = Info(version="0", model=Model(id="x", sha256=""), labels=[], licence="", sources=[])

    def every() -> Sequence[DialogueStore]:
        return stores

    async def main() -> list[Any]:
        pipeline = LivePipeline(recognizer, [])
        controls = Controls(pipeline, info=lambda: info, recording=None, stores=every)
        request = Request(command="forget", arguments={"dialogue_id": "d1"})
        return [await controls.answer(request) for _ in range(2)]

    first, second = asyncio.run(main())
    assert (first.status, first.error) == (
        "error",
        "forget: not all was erased: no room; then ask again",
    )
    assert (second.status, second.content) == ("ok", {"erased": 2})
    assert [store.asked for store in stores] == [2, 2]
