"""Enrolled voices: one private file, read within limits; and recordings that are no enrolment."""

import json
import logging
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RECORDINGS
from damages import as_text, change, damage
from numpy.typing import NDArray

from stream_hbaf.audio.file import read_audio
from stream_hbaf.cli import main
from stream_hbaf.config import SAMPLE_RATE_HZ, Config, load_config
from stream_hbaf.errors import ConfigError
from stream_hbaf.features import speaker
from stream_hbaf.features.speaker import SpeakerEncoder, open_speaker_encoder
from stream_hbaf.features.voice_prints import (
    FILE_BYTES,
    MOST_VOICES,
    enrol,
    enrolled_voices,
    forget,
    read_voices,
    require_name,
    voices_file,
)
from stream_hbaf.live.enrolment import LEAST_SPEECH_S, loudness_gap, voice_print

needs_weights = pytest.mark.skipif(speaker.find_campplus() is None, reason=speaker.INSTALL)
BY_VOICE = load_config(overrides={"speakers.engine": "campplus"})


def unit(seed: int) -> NDArray[np.float32]:
    drawn = np.random.default_rng(seed).standard_normal(SpeakerEncoder.width)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_an_enrolled_voice_is_read_back(tmp_path: Path) -> None:
    """To seven digits; a name that is enrolled again has the new voice."""
    assert not enrol("Zoë", unit(1), speech_s=7.25)
    assert not enrol("Ann", unit(2), speech_s=9)
    assert enrol("Zoë", unit(3), speech_s=6)
    assert [(one.name, one.speech_s) for one in read_voices()] == [("Ann", 9.0), ("Zoë", 6.0)]
    voices = enrolled_voices(BY_VOICE)
    np.testing.assert_allclose(voices["Zoë"], unit(3), atol=1e-7)
    assert enrolled_voices(Config()) == {}


def test_voices_are_private_and_forgotten_wholly() -> None:
    """Nobody else may read them, and nothing of a forgotten one is left in the folder."""
    enrol("Ann", unit(1), speech_s=7)
    assert mode(voices_file()) == 0o600
    assert mode(voices_file().parent) == 0o700
    voices_file().with_name("voices.json.damaged").write_text("Ann's voice, perhaps")
    enrol("Ben", unit(2), speech_s=7)
    forget("Ann")
    left = b"".join(path.read_bytes() for path in voices_file().parent.iterdir())
    assert b"Ann" not in left
    forget("Ben")
    assert not voices_file().exists()
    with pytest.raises(ConfigError, match="no voice 'Ben' is enrolled; there is nobody"):
        forget("Ben")


@pytest.mark.parametrize("privacy", ["no_text", "label_only"])
def test_private_modes_name_nobody_unless_settings_say_so(privacy: str) -> None:
    enrol("Ann", unit(1), speech_s=7)
    private = {"speakers.engine": "campplus", "privacy": privacy}
    assert enrolled_voices(load_config(overrides=private)) == {}
    private["speakers.enrolled_in_private"] = "true"
    assert [*enrolled_voices(load_config(overrides=private))] == ["Ann"]


def written(**changes: Any) -> str:
    enrol("Ann", unit(1), speech_s=7)
    content = json.loads(voices_file().read_text(encoding="utf-8"))
    content["voices"][0] |= changes
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: "{", "EOF"),
        (lambda: "[]", "valid dictionary"),
        (lambda: '{"format": 9, "voices": []}', "format"),
        (lambda: written(embedding=[0.1] * 191), "at least 192 items"),
        (lambda: written(embedding=[0.1] * 193), "at most 192 items"),
        (lambda: written(embedding=[0.1] * 192), "isn't of unit length"),
        (lambda: written(embedding=[float("nan")] * 192), "NaN|expected value"),
        (lambda: written(embedding=[1e300] * 192), "a number out of all bounds"),
        (lambda: written(embedding=["1"] + [0.0] * 191 + ["x"]), "should be a valid number"),
        (lambda: written(name="\x1b[2J"), "a speaker's name"),
        (lambda: written(name="x" * 65), "at most 64"),
        (lambda: written(code="import os"), "extra"),
        (lambda: " " * (FILE_BYTES + 1), "more than 1,048,576 bytes"),
        (lambda: "[" * 100_000, "recursion|nested"),
    ],
)
def test_a_damaged_file_is_named_and_set_aside(
    content: Callable[[], str], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One line; the run goes on without enrolled voices, and enrolment begins a new file."""
    voices_file().parent.mkdir(parents=True, exist_ok=True)
    voices_file().write_text(content(), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert enrolled_voices(BY_VOICE) == {}
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{voices_file()}: is damaged (")
    assert "\n" not in message
    assert message.isprintable()
    assert any(part in message for part in reason.split("|")), message
    assert voices_file().with_name("voices.json.damaged").is_file()
    enrol("Ben", unit(2), speech_s=7)
    assert [*enrolled_voices(BY_VOICE)] == ["Ben"]


def test_damage_of_any_kind_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Wrong values, and bytes that were changed, cut out or put in."""
    tree = json.loads(written())
    for seed in range(120):
        content = damage(as_text(tree), seed) if seed % 3 == 0 else as_text(change(tree, seed))
        voices_file().write_bytes(content)
        caplog.clear()
        voices = enrolled_voices(BY_VOICE)
        assert len(voices) + len(caplog.records) >= 1 or b'"voices": []' in content, seed
        assert all(record.getMessage().isprintable() for record in caplog.records), seed
        for voice in voices.values():
            assert np.linalg.norm(voice) == pytest.approx(1, abs=1e-2)


def test_a_link_or_a_pipe_is_no_file_of_ours(tmp_path: Path) -> None:
    """What somebody places there leads nowhere, and blocks nothing."""
    enrol("Ann", unit(1), speech_s=7)
    elsewhere = tmp_path / "elsewhere.json"
    voices_file().rename(elsewhere)
    voices_file().symlink_to(elsewhere)
    assert read_voices() == ()
    assert elsewhere.is_file()
    assert not voices_file().is_symlink()


def test_voices_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(MOST_VOICES):
        enrol(f"voice {number}", unit(number), speech_s=7)
    assert voices_file().stat().st_size < FILE_BYTES
    with pytest.raises(ConfigError, match="100 voices are enrolled already; forget one first"):
        enrol("one more", unit(0), speech_s=7)
    assert enrol("voice 7", unit(0), speech_s=7)


@pytest.mark.parametrize("name", ["", " Ann", "Ann ", "a\tb", "a\u202eb", "x" * 65])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError, match="a speaker's name"):
        require_name(name)


# ---- recordings

SILENCE = np.zeros(SAMPLE_RATE_HZ // 2, np.int16)
JFK = read_audio(RECORDINGS / "jfk.flac")


@pytest.fixture(scope="module")
def encoder() -> SpeakerEncoder:
    return open_speaker_encoder()


@pytest.fixture(scope="module")
def reader(sentences: list[NDArray[np.int16]]) -> NDArray[np.int16]:
    """Nine seconds of one woman."""
    return np.concatenate([sentences[1], sentences[2]])


@needs_weights
def test_a_reader_can_be_enrolled(
    encoder: SpeakerEncoder, reader: NDArray[np.int16], sentences: list[NDArray[np.int16]]
) -> None:
    """The print is like her other sentences, and unlike somebody else's."""
    found = voice_print(encoder, reader, config=Config(), where="x")
    assert LEAST_SPEECH_S <= found.speech_s <= len(reader) / SAMPLE_RATE_HZ
    hers, his = encoder.embed(sentences[3]), encoder.embed(JFK)
    assert hers is not None
    assert his is not None
    assert found.embedding @ hers > 0.6
    assert found.embedding @ his < 0.3


@needs_weights
def test_what_cannot_be_enrolled(encoder: SpeakerEncoder, reader: NDArray[np.int16]) -> None:
    """Each in one line: too short, no speech at all, noise, and a second voice."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(len(reader)) * reader.astype(float).std()
    noisy = np.clip(reader + noise, -32768, 32767).astype(np.int16)
    both = np.concatenate([reader, SILENCE, JFK[: 4 * SAMPLE_RATE_HZ]])
    for recording, complaint in (
        (reader[: 3 * SAMPLE_RATE_HZ], r"x: \d.\d s of speech; at least 5 s are needed"),
        (np.zeros(0, np.int16), "x: 0.0 s of speech"),
        (np.zeros(10 * SAMPLE_RATE_HZ, np.int16), "x: 0.0 s of speech"),
        (noisy, "x: too noisy|x: \\d.\\d s of speech"),
        (both, "x: more than one voice, it seems"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            voice_print(encoder, recording, config=Config(), where="x")


def test_noise_closes_the_gap_between_loud_and_quiet(reader: NDArray[np.int16]) -> None:
    rng = np.random.default_rng(0)
    gaps = []
    for share in (0.0, 0.3, 1.0):
        noise = rng.standard_normal(len(reader)) * reader.astype(float).std() * share
        gaps.append(loudness_gap(np.clip(reader + noise, -32768, 32767).astype(np.int16)))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 20
    assert gaps[2] < 13


@needs_weights
def test_commands_enrol_list_and_forget(capsys: pytest.CaptureFixture[str]) -> None:
    """A voice by its file; a problem is one line and status 2, and then nothing is enrolled."""
    assert main(["speakers", "enrol", "John", "--file", str(RECORDINGS / "jfk.flac")]) == 0
    assert "John: enrolled from" in capsys.readouterr().out
    assert main(["speakers", "list"]) == 0
    assert capsys.readouterr().out.startswith("John  20")
    short = str(RECORDINGS / "espeak_no_no_no.flac")
    assert main(["speakers", "enrol", "Robot", "--file", short]) == 2
    assert capsys.readouterr().err.endswith("s of speech; at least 5 s are needed\n")
    assert main(["speakers", "forget", "John"]) == 0
    capsys.readouterr()
    assert main(["speakers", "list"]) == 0
    assert "nobody is enrolled" in capsys.readouterr().out
