"""The commands of enrolled voices: speakers enrol, list, forget."""

import argparse
import asyncio
from typing import TYPE_CHECKING

from stream_hbaf.commands import (
    Commands,
    add_command,
    add_verbose,
    limit_library_threads,
    print_line,
    print_status,
)
from stream_hbaf.errors import printable

if TYPE_CHECKING:
    from stream_hbaf.recognizer import Int16

LISTEN_S = 20.0  # to a microphone


def add_speaker_commands(commands: Commands) -> None:
    """Add speakers."""
    speakers = commands.add_parser("speakers", help="enrol voices, to know them by name")
    add_verbose(speakers)
    kinds = speakers.add_subparsers(required=True, metavar="enrol|list|forget")
    enrol = add_command(kinds, "enrol", _enrol, help="learn a voice, with its owner's consent")
    enrol.add_argument("name", help="the speaker's name")
    where = enrol.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--mic", nargs="?", const="", metavar="NAME|INDEX", help="listen for 20 s to a microphone"
    )
    where.add_argument("--file", metavar="PATH", help="a recording of nobody else, at least 5 s")
    add_command(kinds, "list", _list, help="show whose voices are enrolled")
    forget = add_command(kinds, "forget", _forget, help="erase a voice")
    forget.add_argument("name", help="the speaker's name")


def _enrol(options: argparse.Namespace) -> None:
    limit_library_threads()
    from stream_hbaf.config import Config
    from stream_hbaf.features.speaker import open_speaker_encoder
    from stream_hbaf.features.voice_prints import enrol, require_name, voices_file
    from stream_hbaf.live.enrolment import LONGEST_S, voice_print

    name = require_name(options.name)
    encoder = open_speaker_encoder()
    if options.file is not None:
        where, longest_s = options.file, LONGEST_S
    else:
        where, longest_s = f"mic:{options.mic}" if options.mic else "mic", LISTEN_S
        print_status(f"listening for {LISTEN_S:g} s: let {name} alone speak, as usual")
    recording = asyncio.run(_record(where, longest_s=longest_s))
    shown = printable(where)
    found = voice_print(encoder, recording, config=Config(), where=shown)
    replaced = enrol(name, found.embedding, speech_s=found.speech_s)
    again = ", in the place of an earlier one" if replaced else ""
    print_line(f"{name}: enrolled from {found.speech_s:.1f} s of speech{again}; {voices_file()}")
    print_status("a voice print is biometric data: keep it only with its owner's consent")


async def _record(where: str, *, longest_s: float) -> "Int16":
    """At most the first ``longest_s`` seconds of a source. Raises a StreamHbafError."""
    import numpy as np

    from stream_hbaf.audio.open_source import open_source
    from stream_hbaf.config import SAMPLE_RATE_HZ

    pieces = [np.zeros(0, np.int16)]
    missing = int(longest_s * SAMPLE_RATE_HZ)
    source = open_source(
        where, speed=None, channel=None, chunk_ms=64, on_status=lambda state, detail: None
    )
    async with source:
        async for chunk in source.chunks():
            pieces.append(chunk.samples[:missing])
            missing -= len(pieces[-1])
            if missing <= 0:
                break
    return np.concatenate(pieces)


def _list(options: argparse.Namespace) -> None:
    from stream_hbaf.features.voice_prints import encoder_id, read_voices, voices_file

    voices = read_voices()
    for voice in voices:
        old = "" if voice.encoder == encoder_id() else "  (another speaker encoder; enrol again)"
        print_line(f"{voice.name}  {voice.enrolled}  {voice.speech_s:.1f} s of speech{old}")
    if not voices:
        print_line(f"nobody is enrolled; 'speakers enrol NAME --mic' does so, in {voices_file()}")


def _forget(options: argparse.Namespace) -> None:
    from stream_hbaf.features.voice_prints import forget

    forget(options.name)
    print_line(
        f"{printable(options.name)}: erased; a recogniser that runs names nobody so in the next "
        "dialogue"
    )
