"""Options that several commands have, and the settings that they become."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from stream_hbaf.errors import ConfigError

if TYPE_CHECKING:
    from stream_hbaf.config import Config

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# Those of corpora/open_corpus.py, which imports numpy.
CORPORA = "emorynlp, goemotions, iemocap, meld, nemo, ravdess, tess, or a manifest .csv"
# Options that are settings by another name.
KEYS = {
    "--file": "source.where",
    "--privacy": "privacy",
    "--record": "record",
    "--mqtt": "mqtt.url",
    "--model": "model",
    "--asr": "transcript.model",
    "--language": "transcript.language",
    "--device": "device",
    "--speaker": "source.speaker",
    "--inferences": "inferences",
}


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], *, help: str
) -> argparse.ArgumentParser:
    """Add a command, which ``run`` carries out; returns its parser, for its options."""
    parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    parser.set_defaults(run=run)
    add_verbose(parser)
    return parser


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Add -v, which may stand before or after a command's name."""
    parser.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=argparse.SUPPRESS,  # else a command's default would replace what stood before it
        help="log to stderr what happens; -vv in detail",
    )


def add_settings(parser: argparse.ArgumentParser, *, listening: bool = True) -> None:
    """Add the options that are settings: all of them for ``listening``, else the broker's."""
    parser.add_argument(
        "--mqtt", metavar="URL|embedded|none", help="the broker (default: embedded)"
    )
    if listening:
        parser.add_argument("--model", metavar="BUNDLE", help="a bundle's name or folder")
        parser.add_argument(
            "--asr",
            metavar="MODEL",
            help="a Whisper model (default: base; tiny.en halves the CPU time of transcripts, and "
            "needs 0.1 GB more with live-en, which uses base's encoder for the audio)",
        )
        parser.add_argument("--language", metavar="CODE", help="what is spoken (default: en)")
        parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="for the models")
        parser.add_argument("--speaker", metavar="NAME", help="who is speaking")
        parser.add_argument(
            "--privacy",
            choices=("full", "no_text", "label_only"),
            help="what leaves the process (default: full)",
        )
        parser.add_argument(
            "--dashboard",
            nargs="?",
            const="",
            metavar="HOST:PORT",
            help="show it on a page (default: 127.0.0.1:8770)",
        )
        parser.add_argument(
            "--record", type=Path, metavar="DIR", help="write a session: sound and events"
        )
        parser.add_argument(
            "--inferences",
            action="store_true",
            default=None,  # not given: the file or the environment decides
            help="say what others and the speaker may feel, and what the speaker wants",
        )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, no more")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="any setting, such as vad.engine=webrtc",
    )


def read_config(options: argparse.Namespace) -> "Config":
    """The configuration from --config, the environment, --set and the other options.

    Raises ConfigError naming the setting that is wrong, or that two options set.
    """
    from stream_hbaf.config import load_config

    overrides = _read_settings(options.settings)
    origins = {key: f"--set {key}" for key in overrides}
    for option, key, value in _named_settings(options):
        if key in overrides:
            raise ConfigError(f"{option}: {origins[key]} is the same setting; leave one out")
        overrides[key], origins[key] = value, option
    if "source.where" in overrides:
        overrides.setdefault("sources", [])  # instead of those in the file
    config = load_config(file=options.config, environ=os.environ, overrides=overrides)
    for key in overrides:
        if config.sources and key.startswith("source."):
            raise ConfigError(
                f"{origins[key]}: is for one source, but there are several; give each its own, "
                "such as --source a=mic,speaker=Ann"
            )
    return config


def _named_settings(options: argparse.Namespace) -> Iterator[tuple[str, str, Any]]:
    """(option, key, value) of each option that is a setting by another name."""
    for option, key in KEYS.items():
        value = getattr(options, option.replace("--", ""), None)
        if value is not None:
            yield option, key, str(value) if isinstance(value, Path) else value
    if getattr(options, "mic", None) is not None:
        yield "--mic", "source.where", f"mic:{options.mic}" if options.mic else "mic"
    if getattr(options, "source", None):
        yield "--source", "sources", [_source(text) for text in options.source]
    if getattr(options, "dashboard", None) is not None:
        yield "--dashboard", "dashboard", {}  # there, with its defaults
        for name, value in _address(options.dashboard).items():
            yield "--dashboard", f"dashboard.{name}", value


def _read_settings(settings: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` of each --set, the last of a key."""
    overrides = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write it as KEY=VALUE")
        overrides[key.strip()] = value.strip()
    return overrides


def _address(text: str) -> dict[str, str]:
    """``HOST:PORT``, ``HOST`` or ``:PORT`` as settings of the dashboard."""
    parts = re.fullmatch(r"(\[.+\]|[^:/\s]*)(?::(\d+))?", text)
    if parts is None:
        raise ConfigError(f"--dashboard {text}: write it as HOST:PORT, such as 127.0.0.1:8770")
    host, port = parts[1], parts[2]
    found = {"host": host.strip("[]"), "port": port}
    return {key: value for key, value in found.items() if value}


def _source(text: str) -> dict[str, str]:
    """``NAME=WHERE,channel=0,speaker=Ann,dialogue=table`` as the settings of a source."""
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise ConfigError(f"--source {text}: write it as NAME=WHERE, such as ann=mic:1")
    settings = {"name": name, "speaker": name}
    found = re.compile(r",(channel|speaker|dialogue)=([^,]*)$")
    while option := found.search(rest):
        settings[option[1]] = option[2]
        rest = rest[: option.start()]
    return settings | {"where": rest}


def read_speed(text: str) -> float | None:
    """A factor of real time; None for ``max``. Raises ConfigError for anything else."""
    if text == "max":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not speed > 0:
        raise ConfigError(f"--speed {text}: must be 'max' or a number above 0, such as 1")
    return speed


def device_of(options: argparse.Namespace) -> str:
    """The device that ``--device`` chooses. Raises ConfigError for a GPU that isn't there."""
    from stream_hbaf.recognizer import resolve_device

    return resolve_device(options.device)


def limit_library_threads() -> None:
    """Keep the libraries' threads from delaying each other; before they are imported."""
    # numpy's products here are small: waking threads for them takes longer than computing them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # The OpenMP threads of Whisper and torch wait for each other by spinning. On a machine that is
    # busy, that keeps the thread that is waited for from running: with a busy loop on each core,
    # transcripts came 25 s after the end of an utterance; without spinning, at once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def print_status(line: str) -> None:
    """Tell the person at the terminal what happens: on stderr, since stdout is for results."""
    sys.stderr.write(f"stream-hbaf: {line}\n")
    sys.stderr.flush()


def print_line(line: str) -> None:
    """Print a line to stdout at once, even if stdout is a file."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
