"""The commands of the live recogniser and its recordings: listening, devices, watch, replay,
sessions; and the options for settings.
"""

import argparse
import asyncio
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream_hbaf.commands import (
    Commands,
    add_command,
    add_verbose,
    limit_library_caches,
    limit_library_threads,
    print_line,
    print_status,
    read_speed,
)
from stream_hbaf.errors import ConfigError, printable

if TYPE_CHECKING:
    from stream_hbaf.config import Config
    from stream_hbaf.events import DialogueSummary, Utterance
    from stream_hbaf.sessions.session import SessionSummary

LIVE_SOURCES = ("mic", "browser", "ws://", "wyoming://", "satellite://")  # not at any other speed
FORMATS = ("manifest", "audformat", "audiofolder")  # of corpora that sessions become
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
    "--traces": "traces",
    "--host": "serve.host",
    "--port": "serve.port",
    "--ray": "serve.ray",
}


def add_listen_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``stream-hbaf`` without a command, which listens."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--mic", nargs="?", const="", metavar="NAME|INDEX", help="listen to a microphone"
    )
    where.add_argument(
        "--file", metavar="PATH|URL|-", help="listen to a recording, a stream or a pipe"
    )
    where.add_argument(
        "--source",
        action="append",
        metavar="NAME=WHERE",
        help="listen to several: mic:NAME, a file, a URL, ws://HOST:PORT, wyoming://HOST:PORT, "
        "satellite://HOST:PORT or browser; with ,channel=N ,speaker=NAME ,dialogue=NAME",
    )
    parser.add_argument(
        "--speed", metavar="1|max", help="of a recording: times real time (default: 1), or max"
    )
    add_settings(parser)
    parser.set_defaults(run=_listen)


def add_live_commands(commands: Commands) -> None:
    """Add devices and watch."""
    add_command(commands, "devices", _devices, help="list the microphones")
    watch = add_command(commands, "watch", _watch, help="subscribe and show what is published")
    add_settings(watch, listening=False)


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
            metavar="[HOST:]PORT",
            help="show it on a page (default: 127.0.0.1:8770)",
        )
        parser.add_argument(
            "--metrics",
            nargs="?",
            const="",
            metavar="[HOST:]PORT",
            help="serve metrics for Prometheus (default: 127.0.0.1:8771)",
        )
        parser.add_argument(
            "--traces",
            action="store_true",
            default=None,
            help="send a trace of each utterance to OTEL_EXPORTER_OTLP_ENDPOINT",
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

    overrides: dict[str, Any] = {}
    for setting in options.settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: write it as KEY=VALUE")
        overrides[key.strip()] = value.strip()
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
        value = getattr(options, option.removeprefix("--"), None)
        if value is not None:
            yield option, key, value
    if getattr(options, "mic", None) is not None:
        yield "--mic", "source.where", f"mic:{options.mic}" if options.mic else "mic"
    if getattr(options, "source", None):
        yield "--source", "sources", [_source(text) for text in options.source]
    for section, port in (("dashboard", 8770), ("metrics", 8771)):
        text = getattr(options, section, None)
        if text is None:
            continue
        option = f"--{section}"
        yield option, section, {}  # there, with its defaults
        parts = _address(text)
        if parts is None:
            raise ConfigError(f"{option} {text}: write it as HOST:PORT, such as 127.0.0.1:{port}")
        for name, value in parts.items():
            yield option, f"{section}.{name}", value


def _address(text: str) -> dict[str, str] | None:
    """``HOST:PORT``, ``HOST`` or ``PORT`` as settings of a server; None if it is none of these."""
    if text.isdecimal():
        return {"port": text}
    parts = re.fullmatch(r"(\[.+\]|[^:/\s]*)(?::(\d+))?", text)
    if parts is None:
        return None
    found = {"host": parts[1].strip("[]"), "port": parts[2]}
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


def _listen(options: argparse.Namespace) -> None:
    speed = read_speed(options.speed or "1")
    config = read_config(options)
    sources = config.sources or (config.source,)
    if options.speed is not None and all(s.where.startswith(LIVE_SOURCES) for s in sources):
        raise ConfigError("--speed: is that of a recording; add --file, or leave --speed out")
    limit_library_threads()
    limit_library_caches()
    from stream_hbaf.commands.run import listen

    asyncio.run(listen(config, speed=speed, json=options.json))


def _devices(options: argparse.Namespace) -> None:
    from stream_hbaf.audio.capture import list_devices

    devices = list_devices()
    if not devices:
        print_line("no microphone found; plug one in, or give a recording with --file")
    for device in devices:
        mark = "*" if device.is_default else " "
        shape = f"({device.channels} channels, {device.rate_hz} Hz)"
        print_line(f"{mark} {device.index:>3}  {device.name}  {shape}")


def _watch(options: argparse.Namespace) -> None:
    for setting in options.settings:
        if not setting.startswith("mqtt."):
            raise ConfigError(f"--set {setting}: 'watch' has the settings mqtt.KEY only")
    config = read_config(options).mqtt
    from stream_hbaf.client import follow
    from stream_hbaf.publish.terminal import watch

    received = follow(config, topic=f"{config.prefix}/+/#")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(watch(received, prefix=config.prefix, out=sys.stdout, json=options.json))


def add_session_commands(commands: Commands) -> None:
    """Add replay and sessions."""
    replay = add_command(commands, "replay", _replay, help="recognise a recorded session again")
    replay.add_argument("session", type=Path, help="folder of the session")
    replay.add_argument("--json", action="store_true", help="one JSON object a line, no more")
    replay.add_argument("--model", metavar="BUNDLE", help="another bundle than the recorded one")
    replay.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")

    sessions = commands.add_parser("sessions", help="list, export and correct recorded sessions")
    add_verbose(sessions)
    kinds = sessions.add_subparsers(required=True, metavar="list|export|import")
    listed = add_command(
        kinds, "list", _list, help="show each session's time, length, utterances and corrections"
    )
    listed.add_argument("folder", type=Path, help="folder of sessions")

    exported = add_command(kinds, "export", _export, help="write a corpus in a common format")
    exported.add_argument("folder", type=Path, help="folder of a session, or of several")
    exported.add_argument("out", type=Path, help="folder of the new corpus")
    exported.add_argument("--format", choices=FORMATS, default="manifest")
    exported.add_argument(
        "--own-labels",
        action="store_true",
        help="label utterances that nobody corrected with the predictions, marked as such",
    )

    imported = add_command(
        kinds, "import", _import, help="add corrections to sessions, or a corpus's manifest"
    )
    imported.add_argument("folder", type=Path, help="folder of sessions, or of the corpus")
    imported.add_argument("table", type=Path, help="corrections (id,label,by), or the new manifest")
    imported.add_argument("--format", choices=("corrections", *FORMATS[1:]), default="corrections")


def _replay(options: argparse.Namespace) -> None:
    limit_library_threads()
    limit_library_caches()
    from stream_hbaf.live.replay import replay_session
    from stream_hbaf.publish.terminal import REVISED, event_line
    from stream_hbaf.sessions.session import open_session

    def show(event: "Utterance | DialogueSummary") -> None:
        if options.json:
            print_line(event_line(event))
        elif (emotion := getattr(event, "emotion", None)) is not None:
            doubt = "?" if emotion.abstained else ""
            revised = f"{REVISED} " if getattr(event, "revision", None) else ""
            speaker = f"{name}: " if (name := getattr(event, "speaker", "")) else ""
            text = getattr(event, "text", "") or "(no words)"
            print_line(
                printable(f"{revised}{emotion.label}{doubt} {emotion.score:.0%} {speaker}{text}")
            )

    replayed = replay_session(
        open_session(options.session),
        on_event=show,
        progress=print_status,
        model=options.model,
        device=options.device,
    )
    print_status(f"{replayed.matched} utterances replayed")


def _list(options: argparse.Namespace) -> None:
    from stream_hbaf.sessions.session import list_sessions

    found = list_sessions(options.folder)
    for summary in found:
        print_line(_line(summary))
    if not found:
        print_line(f"{options.folder}: no session yet; --record {options.folder} writes one")


def _line(summary: "SessionSummary") -> str:
    if summary.error:
        return printable(f"{summary.folder.name}  {summary.error}")
    minutes, seconds = divmod(round(summary.length_s), 60)
    speakers = f"  {', '.join(summary.speakers)}" if summary.speakers else ""
    return printable(  # the names are others'
        f"{summary.folder.name}  {minutes}:{seconds:02}  {summary.utterances} utterances  "
        f"{summary.corrections} corrections{speakers}"
    )


def _export(options: argparse.Namespace) -> None:
    from stream_hbaf.corpora.exchange import export_audformat, export_audiofolder
    from stream_hbaf.corpora.session_corpus import export_manifest

    writers = (export_manifest, export_audformat, export_audiofolder)
    export = writers[FORMATS.index(options.format)]
    count = export(options.folder, options.out, own_labels=options.own_labels)
    print_line(f"{options.out}: {count} utterances")


def _import(options: argparse.Namespace) -> None:
    from stream_hbaf.corpora.exchange import import_audformat, import_audiofolder
    from stream_hbaf.corpora.session_corpus import import_corrections

    if options.format == "corrections":
        print_line(
            f"{options.folder}: {import_corrections(options.folder, options.table)} corrections"
        )
        return
    read = import_audformat if options.format == "audformat" else import_audiofolder
    print_line(f"{options.table}: {read(options.folder, options.table)} utterances")
