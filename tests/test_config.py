"""Settings: where they come from, and what is said when one is wrong."""

from pathlib import Path

import pytest
from damages import YAML, as_text, change, complaint, damage

from stream_hbaf.config import Config, load_config
from stream_hbaf.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    file = folder / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_settings_later_sources_override_earlier_ones(tmp_path: Path) -> None:
    """Defaults < file < environment < command line."""
    file = write(tmp_path, "source: {speaker: file}\nvad: {threshold: 0.6}\nmodel: from-file\n")
    environ = {"STREAM_HBAF_SOURCE__SPEAKER": "environment", "STREAM_HBAF_VAD__THRESHOLD": "0.7"}
    config = load_config(file=file, environ=environ, overrides={"source.speaker": "command line"})
    assert config.source.speaker == "command line"
    assert config.vad.threshold == 0.7
    assert config.model == "from-file"
    assert config.segmenter.min_silence_ms == 600


@pytest.mark.parametrize(
    ("environ", "overrides", "wanted"),
    [
        ({}, {}, False),
        ({"STREAM_HBAF_INFERENCES": "true"}, {}, True),
        ({"STREAM_HBAF_INFERENCES": "true"}, {"inferences": "no"}, False),
    ],
)
def test_inferences_are_wanted_only_if_somebody_says_so(
    environ: dict[str, str], overrides: dict[str, str], wanted: bool
) -> None:
    """Off, unless a setting turns them on."""
    assert load_config(environ=environ, overrides=overrides).inferences is wanted


def test_unknown_setting_says_which_one_was_meant(tmp_path: Path) -> None:
    """A misspelt key names itself, its place and the nearest known key."""
    file = write(tmp_path, "segmenter: {min_silense_ms: 400}\n")
    with pytest.raises(ConfigError) as error:
        load_config(file=file)
    assert str(error.value) == (
        f"{file}: unknown setting 'segmenter.min_silense_ms'; "
        "did you mean 'segmenter.min_silence_ms'?"
    )


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"vad.engine": "cobra"}, "--set vad.engine: 'vad.engine' must be 'silero' or 'webrtc'"),
        ({"segmenter.pause_ms": "soon"}, "'segmenter.pause_ms' must be a valid integer"),
        ({"source.name": "a/b"}, "'source.name' "),
        ({"vad": "webrtc"}, "--set vad: 'vad' "),
    ],
)
def test_wrong_value_names_the_setting_and_its_source(
    overrides: dict[str, str], complaint: str
) -> None:
    """A value of the wrong type or range is refused in one line."""
    with pytest.raises(ConfigError) as error:
        load_config(overrides=overrides)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_password_on_the_command_line_is_refused_and_not_repeated() -> None:
    """A password comes from the file or the environment only."""
    with pytest.raises(ConfigError, match="STREAM_HBAF_MQTT__PASSWORD") as error:
        load_config(overrides={"mqtt.password": "hunter2"})
    assert "hunter2" not in str(error.value)
    config = load_config(environ={"STREAM_HBAF_MQTT__PASSWORD": "hunter2"})
    assert config.mqtt.password is not None
    assert config.mqtt.password.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(config)


def test_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    """YAML that can't be read is an error with file and line."""
    file = write(tmp_path, "model: live-en\nvad: [\n")
    with pytest.raises(ConfigError, match=r"settings\.yaml:\d+: not valid YAML"):
        load_config(file=file)
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(file=tmp_path / "absent.yaml")


def test_a_file_of_another_size_is_refused() -> None:
    """A device, which has no end, is named after a moment."""
    with pytest.raises(ConfigError, match=r"/dev/zero: not valid YAML \(it has more than 262,144"):
        load_config(file=Path("/dev/zero"))


@pytest.mark.parametrize("number", range(len(YAML)))
def test_hostile_settings_are_one_line(tmp_path: Path, number: int) -> None:
    """Bombs, endless nesting and the like: read, or one line, never a traceback."""
    assert complaint(lambda: load_config(file=write(tmp_path, YAML[number]))).isprintable()


@pytest.mark.parametrize("seed", range(60))
def test_damaged_settings_are_one_line(tmp_path: Path, seed: int) -> None:
    """Wrong values at every place, and damaged text: one printable line that isn't long."""
    base = Config().model_dump(mode="json", exclude={"record"})
    base |= {"sources": [{"name": "a", "where": "mic"}], "dashboard": {"port": 1}}
    file = tmp_path / "settings.yaml"
    file.write_bytes(damage(as_text(base), seed) if seed % 3 == 0 else as_text(change(base, seed)))
    said = complaint(lambda: load_config(file=file))
    assert said.isprintable()
    assert len(said) < 600


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mqtt.outbox", "1000000000000"),
        ("segmenter.max_utterance_s", "100000"),
        ("source.chunk_ms", "1000000000"),
        ("source.channel", "1000000"),
        ("transcript.min_avg_logprob", "nan"),
    ],
)
def test_every_number_has_a_limit(key: str, value: str) -> None:
    """A number beyond all use is refused, before it takes memory."""
    with pytest.raises(ConfigError, match=f"--set {key}"):
        load_config(overrides={key: value})


def test_a_list_in_the_place_of_a_section_is_not_repeated(tmp_path: Path) -> None:
    """It may hold a password."""
    with pytest.raises(ConfigError) as raised:
        load_config(file=write(tmp_path, "mqtt: [{password: hunter2}]\n"))
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("key", ["source.speaker", "mqtt.username", "mqtt.node", "source.name"])
def test_names_are_utf_8(key: str) -> None:
    """They are published; bytes of the command line that are none would fail on the way."""
    with pytest.raises(ConfigError, match=f"--set {key}: '{key}'"):
        load_config(overrides={key: "caf\udce9"})


def test_paths_may_be_in_any_encoding() -> None:
    """File systems know bytes only; a NUL is in none of their names."""
    assert load_config(overrides={"source.where": "caf\udce9.wav"}).source.where == "caf\udce9.wav"
    with pytest.raises(ConfigError, match="'record': holds a NUL character"):
        load_config(overrides={"record": "a\0b"})
