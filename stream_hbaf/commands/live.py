"""The commands of the live recogniser: listening, devices, watch."""

import argparse
import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stream_hbaf.commands.options import (
    Commands,
    add_command,
    add_settings,
    limit_library_threads,
    print_line,
    read_config,
    read_speed,
)
from stream_hbaf.errors import ConfigError

if TYPE_CHECKING:
    from stream_hbaf.commands.run import Playback
    from stream_hbaf.config import Config

EXAMPLE = Path(__file__).parent.parent / "audio" / "example.flac"
LIVE_SOURCES = ("mic", "browser", "ws://", "wyoming://", "satellite://")  # not at any other speed


def add_listen_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``stream-hbaf`` without a command, which listens."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--mic", nargs="?", const="", metavar="NAME|INDEX", help="listen to a microphone"
    )
    where.add_argument("--file", metavar="PATH|URL", help="listen to a recording or a stream")
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


def _listen(options: argparse.Namespace) -> int:
    if options.version:
        from stream_hbaf import __version__

        print_line(f"stream-hbaf {__version__}")
        return 0
    speed = read_speed(options.speed or "1")
    config = read_config(options)
    if options.speed is not None:
        _require_recording(config)
    limit_library_threads()
    from stream_hbaf.commands.run import Playback

    playback = Playback(speed=speed, example=EXAMPLE)
    asyncio.run(_listen_until_asked(config, playback=playback, json=options.json))
    return 0


def _require_recording(config: "Config") -> None:
    """Raise ConfigError if no source has a speed that can be chosen."""
    sources = config.sources or (config.source,)
    if all(source.where.startswith(LIVE_SOURCES) for source in sources):
        raise ConfigError("--speed: is that of a recording; add --file, or leave --speed out")


async def _listen_until_asked(config: "Config", *, playback: "Playback", json: bool) -> None:
    """Listen; Ctrl-C and SIGTERM end it in good order."""
    from stream_hbaf.commands.run import listen

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await listen(config, playback=playback, json=json, stop=stop)


def _devices(options: argparse.Namespace) -> int:
    from stream_hbaf.audio.capture import list_devices

    devices = list_devices()
    if not devices:
        print_line("no microphone found; plug one in, or give a recording with --file")
    for device in devices:
        mark = "*" if device.is_default else " "
        shape = f"({device.channels} channels, {device.rate_hz} Hz)"
        print_line(f"{mark} {device.index:>3}  {device.name}  {shape}")
    return 0


def _watch(options: argparse.Namespace) -> int:
    for setting in options.settings:
        if not setting.startswith("mqtt."):
            raise ConfigError(f"--set {setting}: 'watch' has the settings mqtt.KEY only")
    config = read_config(options)
    from stream_hbaf.publish.terminal import watch

    try:
        asyncio.run(watch(config.mqtt, out=sys.stdout, json=options.json))
    except KeyboardInterrupt:
        return 0
    return 0
