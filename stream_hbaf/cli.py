"""The command line: what there is, and how errors are told."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from stream_hbaf.commands.live import add_listening, add_live
from stream_hbaf.commands.research import add_research
from stream_hbaf.commands.sessions import add_sessions
from stream_hbaf.errors import ConfigError, StreamHbafError

# What only the commands that read corpora need, by the name it is imported under.
TRAINING_PACKAGES = {
    "jellyfish",
    "jinja2",
    "matplotlib",
    "peft",
    "scipy",
    "sklearn",
    "tensorboard",
}
FAILURE = 2  # the exit status of every error that the user can mend

EPILOG = """\
examples:
  stream-hbaf                            the microphone if there is one, else a recording
  stream-hbaf --mic "USB Audio"          this microphone
  stream-hbaf --file talk.mp3 --speed max --json
  stream-hbaf --mic --mqtt mqtt://broker.local --speaker Ann
  stream-hbaf watch                      show what is published
Each command has a --help of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 2 after one line that says what is wrong."""
    try:
        options = _parser().parse_args(arguments)
        status: int = options.run(options)
    except StreamHbafError as error:
        status = _complain(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in TRAINING_PACKAGES:
            raise
        status = _complain(f"{package} is not installed; pip install 'stream-hbaf[train]'")
    except BaseExceptionGroup as group:
        known, others = group.split(StreamHbafError)
        if others is not None or known is None:
            raise
        status = _complain(str(_first(known)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:
        status = 130
    return status


class _Parser(argparse.ArgumentParser):
    """One that complains in a line, as all else does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stream-hbaf",
        description="Recognise the emotion of each utterance, live, and publish it over MQTT.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    add_listening(parser)
    commands = parser.add_subparsers(title="other commands", metavar="COMMAND")
    add_live(commands)
    add_sessions(commands)
    add_research(commands)
    return parser


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _complain(message: str) -> int:
    sys.stderr.write(f"stream-hbaf: {' '.join(message.split())}\n")
    return FAILURE


if __name__ == "__main__":
    sys.exit(main())
