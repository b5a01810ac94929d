"""The commands around the live recogniser: listen, devices, watch, schema."""

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from stream_hbaf.commands.options import add_settings, read_config, read_speed, say, share_the_cores

EXAMPLE = Path(__file__).parent.parent / "audio" / "example.flac"


def add_listening(parser: argparse.ArgumentParser) -> None:
    """What ``stream-hbaf`` does without the name of a command."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--mic", nargs="?", const="", metavar="NAME|INDEX", help="listen to a microphone"
    )
    where.add_argument("--file", metavar="PATH|URL", help="listen to a recording or a stream")
    where.add_argument(
        "--source",
        action="append",
        dest="sources",
        metavar="NAME=WHERE",
        help="listen to several: mic:NAME, a file, a URL, ws://HOST:PORT, wyoming://HOST:PORT, "
        "satellite://HOST:PORT or browser; with ,channel=N ,speaker=NAME ,dialogue=NAME",
    )
    parser.add_argument(
        "--speed", default="1", metavar="1|max", help="of a recording; 1 is real time (default)"
    )
    add_settings(parser)
    parser.set_defaults(run=_listen)


def add_live(commands: Any) -> None:
    """What goes with it."""
    devices = commands.add_parser("devices", help="list the microphones there are")
    devices.set_defaults(run=_devices)

    schema = commands.add_parser("schema", help="print what is published as AsyncAPI")
    schema.add_argument("--out", type=Path, help="write it here, with a JSON Schema a message")
    schema.set_defaults(run=_schema)

    watch = commands.add_parser("watch", help="subscribe and show what is published")
    add_settings(watch, listening=False)
    watch.set_defaults(run=_watch)


def _listen(options: argparse.Namespace) -> int:
    if options.version:
        from stream_hbaf import __version__

        sys.stdout.write(f"stream-hbaf {__version__}\n")
        return 0
    speed = read_speed(options.speed)
    config = read_config(options)
    share_the_cores()
    from stream_hbaf.commands.run import Replaying, listen

    replaying = Replaying(speed=speed, example=EXAMPLE)
    return asyncio.run(_interruptibly(listen, config, replaying=replaying, json=options.json))


async def _interruptibly(command: Any, *arguments: Any, **named: Any) -> int:
    """Run a command that stops in good order when asked to by Ctrl-C or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await command(*arguments, **named, stop=stop)
    return 0


def _devices(options: argparse.Namespace) -> int:
    from stream_hbaf.audio.capture import list_devices

    devices = list_devices()
    if not devices:
        sys.stdout.write("no microphone found; plug one in, or give a recording with --file\n")
    for device in devices:
        mark = "*" if device.is_default else " "
        sys.stdout.write(
            f"{mark} {device.index:>3}  {device.name}  "
            f"({device.channels} channels, {device.rate_hz} Hz)\n"
        )
    return 0


def _schema(options: argparse.Namespace) -> int:
    from stream_hbaf.publish.schema import asyncapi, write_schema

    if options.out is None:
        say(json.dumps(asyncapi(), indent=2, ensure_ascii=False))
        return 0
    write_schema(options.out)
    say(f"{options.out}: an AsyncAPI document and JSON Schemas of all that is published")
    return 0


def _watch(options: argparse.Namespace) -> int:
    config = read_config(options)
    from stream_hbaf.publish.watch import watch

    try:
        asyncio.run(watch(config.mqtt, out=sys.stdout, json=options.json))
    except KeyboardInterrupt:
        return 0
    return 0
