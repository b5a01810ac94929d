"""The commands of stream-hbaf, and what several of them share."""

import argparse
import ctypes
import os
import sys
from collections.abc import Callable
from typing import TypeAlias

from stream_hbaf.errors import ConfigError, printable

M_ARENA_MAX = -8  # as in glibc's malloc.h
ARENAS = 2

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

# Those of corpora/open_corpus.py, which imports numpy.
CORPORA = (
    "ased, emorynlp, emospeech-india, goemotions, iemocap, librispeech, meld, nemo, ravdess, "
    "savee, shemo, tess, or a manifest .csv"
)


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], *, help: str
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


def limit_library_caches() -> None:
    """Keep the memory of a run that lasts for days from growing; before libraries are imported."""
    # oneDNN, which CTranslate2 and torch run on, keeps what it prepares for each new length of
    # sound or text: 1024 by default, of 0.4 MB for each of Whisper's convolutions. Preparing one
    # takes 1 ms.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    # glibc gives each thread an arena of its own, up to eight a core, and what was freed in one
    # serves no other: with openSMILE's thread for each utterance, 220 MB for 14 streams.
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_ARENA_MAX, ARENAS)


def print_status(line: str) -> None:
    """Tell the person at the terminal what happens: on stderr, since stdout is for results."""
    sys.stderr.write(f"stream-hbaf: {printable(line)}\n")  # it may name what a file holds
    sys.stderr.flush()


def print_line(line: str) -> None:
    """Print a line to stdout at once, even if stdout is a file."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
