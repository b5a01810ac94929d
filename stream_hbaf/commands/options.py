"""Options that commands share, and what becomes of them."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream_hbaf.errors import ConfigError

if TYPE_CHECKING:
    from stream_hbaf.config import Config


def add_settings(parser: argparse.ArgumentParser, *, listening: bool = True) -> None:
    """The options that are settings; those of a recogniser where one is ``listening``."""
    parser.add_argument(
        "--mqtt", metavar="URL|embedded|none", help="the broker (default: embedded)"
    )
    if listening:
        parser.add_argument("--model", metavar="BUNDLE", help="a bundle's name or folder")
        parser.add_argument("--asr", metavar="MODEL", help="a Whisper model (default: base)")
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
    """All settings; ConfigError says which is wrong."""
    from stream_hbaf.config import load_config

    overrides: dict[str, Any] = {}
    for setting in options.settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write it as KEY=VALUE")
        overrides[key.strip()] = value.strip()
    if getattr(options, "dashboard", None) is not None:
        overrides["dashboard"] = {}  # there, with its defaults
        overrides |= {f"dashboard.{k}": v for k, v in _address(options.dashboard).items()}
    if getattr(options, "sources", None):
        overrides["sources"] = [_source(text) for text in options.sources]
    if getattr(options, "mic", None) is not None:
        overrides["source.where"] = f"mic:{options.mic}" if options.mic else "mic"
    named = {
        "file": "source.where",
        "privacy": "privacy",
        "record": "record",
        "mqtt": "mqtt.url",
        "model": "model",
        "asr": "transcript.model",
        "language": "transcript.language",
        "device": "device",
        "speaker": "source.speaker",
        "inferences": "inferences",
    }
    for option, key in named.items():
        value = getattr(options, option, None)
        if value is not None:
            overrides[key] = str(value) if isinstance(value, Path) else value
    return load_config(file=options.config, environ=os.environ, overrides=overrides)


def _address(text: str) -> dict[str, str]:
    """``HOST:PORT``, ``HOST`` or ``:PORT`` as the settings of the page."""
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
    """A factor of real time; None is as fast as it goes."""
    if text == "max":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not speed > 0:
        raise ConfigError(f"--speed {text}: must be 'max' or a number above 0, such as 1")
    return speed


def share_the_cores() -> None:
    """Keep the libraries' threads out of each other's way; they read this when first imported."""
    # numpy's products here are small, and waking threads for them costs more than they do.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # OpenMP's threads, Whisper's and torch's, wait for each other by spinning. Where other
    # programs want the cores too, that keeps from running what is waited for: beside a busy loop
    # on each core, words came 25 s after the end of an utterance; without spinning, at once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def say(line: str) -> None:
    """A line on stdout."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()  # a log of hours should not wait for a full buffer
