"""Services that are killed: what the next one goes on with, and what is in the files."""

import asyncio
import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import full_disk
from serve_kit import Sound, ends, ends_of, next_end, next_event, open_client, pieces, serving
from websockets.asyncio.client import ClientConnection

from stream_hbaf.config import SourceConfig
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import Utterance
from stream_hbaf.features.text import EMPTY_WINDOW, TurnWindow
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.serve.checkpoints import Checkpoints
from stream_hbaf.stream_client import stream

ID = "abcdefgh"


async def say(connection: ClientConnection, sound: Sound) -> dict[str, Any]:
    """Send a sentence; its ``end``."""
    async for piece in pieces(sound):
        await connection.send(piece)
    return await next_end(connection)


async def broken_off(
    recognizer: Recognizer, sound: Sound, folder: Path, **settings: Any
) -> Utterance:
    """Have a service recognise a sentence; ``folder`` is then as if it had been killed.

    Returns the ``end``, which the client hasn't got.
    """
    own = folder.with_name("of the first service")
    async with serving(recognizer, checkpoints=own, **settings) as service:
        connection = await open_client(service, f"id={ID}&source=ann")
        await connection.send('{"rate": 16000}')
        async for piece in pieces(sound):
            await connection.send(piece)
        assert (await next_event(connection, "utterance"))["type"] == "new"
        connection.transport.abort()
        await service.until(lambda: any(own.glob("*.dialogue")))
        (kept,), (dialogue,) = own.glob("*.stream"), own.glob("*.dialogue")
        await service.until(lambda: b'end\\"' in kept.read_bytes())
        await service.until(lambda: kept.stat().st_mtime_ns < dialogue.stat().st_mtime_ns)
        shutil.copytree(own, folder)
        async with open_client(service, f"id={ID}"):
            pass
        await service.until_gone("ann")
    assert [path.name for path in own.iterdir()] == [".lock"]  # the client has said goodbye
    (end,) = service.log.ends()
    return end


def test_the_next_service_goes_on(
    recognizer: Recognizer, sentences: list[Sound], tmp_path: Path
) -> None:
    """The same dialogue, the next turn, and emotions as if nothing had happened."""

    async def scene() -> None:
        # The next service detects speech anew, as a second stream of a dialogue does.
        async with serving(recognizer) as service, open_client(service, "dialogue=table"):
            unbroken = [
                *await ends_of(service, sentences[1], source="ann", dialogue="table"),
                *await ends_of(service, sentences[2], source="ann", dialogue="table"),
            ]
        first = await broken_off(recognizer, sentences[1], tmp_path / "kept")
        async with (
            serving(recognizer, checkpoints=tmp_path / "kept") as service,
            open_client(service, f"id={ID}") as connection,
        ):
            connected = await next_event(connection, "connected")
            assert (connected["source"], connected["resumed"]) == ("ann", True)
            missed = await next_end(connection)
            assert (missed["id"], missed["rev"]) == (first.id, first.rev)
            await connection.send('{"rate": 16000}')
            second = await say(connection, sentences[2])
            summary = await next_event(connection, "dialoguesummary")
        assert (second["dialogue_id"], second["turn"]) == (first.dialogue_id, 2)
        assert summary["turns"] == 2
        assert [one.text for one in unbroken] == [first.text, second["text"]]
        for one, other in zip(unbroken, (missed, second), strict=True):
            assert one.emotion is not None
            assert other["emotion"]["probabilities"] == pytest.approx(
                one.emotion.probabilities, abs=1e-5
            )

    asyncio.run(scene())


def test_files_are_private_and_hold_no_words_in_private_modes(
    recognizer: Recognizer,
    sentences: list[Sound],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor is the id, with which anybody could go on, in a file's name."""
    folder, source = tmp_path / "kept", SourceConfig(name="ann", where="serve")
    shown = recognizer.config
    monkeypatch.setattr(recognizer, "config", shown.model_copy(update={"privacy": "no_text"}))
    asyncio.run(broken_off(recognizer, sentences[1], folder))
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert ID not in path.name
        assert b"young" not in path.read_bytes()
    checkpoints = Checkpoints(folder)
    found = checkpoints.load_dialogue(ID, source, recognizer)
    assert found is not None
    words = TurnWindow(((101, 7, 102),))  # as of encoders that read a dialogue's earlier text
    spoken = replace(found[0], dialogue=replace(found[0].dialogue, window=words))
    windows = []
    for privacy in ("no_text", "full"):
        monkeypatch.setattr(recognizer, "config", shown.model_copy(update={"privacy": privacy}))
        checkpoints.save_dialogue(ID, source, spoken, recognizer)
        again = checkpoints.load_dialogue(ID, source, recognizer)
        assert again is not None
        windows.append(again[0].dialogue.window)
    assert windows == [EMPTY_WINDOW, words]


def test_a_full_disk_costs_the_checkpoint_alone(
    recognizer: Recognizer, sentences: list[Sound], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line a minute; streams go on."""

    async def scene() -> None:
        async with serving(recognizer, checkpoints=tmp_path / "kept") as service:
            with full_disk():
                events = [e async for e in stream(service.server.url, pieces(sentences[1]))]
            assert len(ends(events)) == 1

    caplog.set_level(logging.WARNING)
    asyncio.run(scene())
    (line,) = [r.message for r in caplog.records if r.name == "stream_hbaf.serve.checkpoints"]
    assert "disk full" in line
    assert "make room" in line


@pytest.mark.parametrize("kind", ["damaged", "of another kind", "of other models"])
def test_what_cannot_be_read_begins_a_new_dialogue(
    kind: str,
    recognizer: Recognizer,
    sentences: list[Sound],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line; a file that would run code when it is unpickled is not."""

    async def scene() -> None:
        folder = tmp_path / "kept"
        before = await broken_off(recognizer, sentences[1], folder)
        (path,) = folder.glob("*.dialogue")
        if kind == "damaged":
            path.write_bytes(path.read_bytes()[:1000])
        elif kind == "of another kind":
            torch.save({"dialogue": _Harmful(tmp_path / "done")}, path)
        else:
            torch.save({"model": "0" * 64}, path)
        async with (
            serving(recognizer, checkpoints=folder) as service,
            open_client(service, f"id={ID}") as connection,
        ):
            await connection.send('{"rate": 16000}')
            assert (await next_end(connection))["id"] == before.id
            end = await say(connection, sentences[2])
            assert end["dialogue_id"] != before.dialogue_id

    asyncio.run(scene())
    assert not (tmp_path / "done").exists()
    (line,) = [r.message for r in caplog.records if r.name == "stream_hbaf.serve.checkpoints"]
    assert "begins" in line


class _Harmful:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def test_harm_would_be_done_otherwise(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Harmful(tmp_path / "done")))
    assert (tmp_path / "done").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"serve\.checkpoints: .*correct the folder"):
        Checkpoints(tmp_path / "file" / "kept")


def test_a_folder_of_two_services_is_refused(recognizer: Recognizer, tmp_path: Path) -> None:
    """They would both go on with the same dialogue; one that has ended leaves the folder."""

    async def scene() -> None:
        async with serving(recognizer, checkpoints=tmp_path):
            with pytest.raises(ConfigError, match=rf"^serve\.checkpoints: another .* {tmp_path};"):
                Checkpoints(tmp_path)
        Checkpoints(tmp_path).close()

    asyncio.run(scene())
