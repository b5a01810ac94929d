"""Settings: where they come from, and what is said when one is wrong."""

from pathlib import Path

import pytest

from stream_hbaf.config import load_config
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
