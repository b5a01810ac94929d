"""Defines the command line, runs a command, and reports errors as one line with status 2.

The commands about the program itself stand here too: schema, settings, completion.
"""

import argparse
import difflib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from stream_hbaf import __version__
from stream_hbaf.commands import Commands, add_command, add_verbose, print_line
from stream_hbaf.commands.adapt import add_adapt_command
from stream_hbaf.commands.live import add_listen_options, add_live_commands, add_session_commands
from stream_hbaf.commands.research import add_research_commands
from stream_hbaf.commands.serve import add_serve_command
from stream_hbaf.commands.speakers import add_speaker_commands
from stream_hbaf.errors import ConfigError, StreamHbafError, shorten

# Options for a folder.
FOLDERS = ("record", "out", "corpora", "cache", "results", "session", "sessions", "folder")


def add_about_commands(commands: Commands) -> None:
    """Add schema, settings and completion."""
    schema = add_command(commands, "schema", _schema, help="print what is published as AsyncAPI")
    schema.add_argument("--out", type=Path, help="write it here, with a JSON Schema a message")
    add_command(commands, "settings", _settings, help="list all settings, for --set and --config")
    completion = add_command(
        commands, "completion", _completion, help="print a script that completes this command"
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


@dataclass(frozen=True)
class Setting:
    """One setting, as it is documented."""

    key: str  # dotted, such as vad.threshold
    default: str  # as written in YAML; "" if it is unset
    values: str  # its type, or the values to choose from
    unit: str  # "" if it has none
    description: str  # one sentence


def list_settings() -> list[Setting]:
    """All settings in their order of definition."""
    import yaml

    from stream_hbaf.config import iter_fields

    def written(default: Any) -> str:
        unset = default is None or default in ("", ())
        return "" if unset else yaml.safe_dump(default).splitlines()[0]

    return [
        Setting(
            key=key,
            default=written(field.default),
            values=_values(field.annotation),
            unit=next((one for one in field.metadata if isinstance(one, str)), ""),
            description=" ".join((field.description or "").split()),
        )
        for key, field in iter_fields()
    ]


def settings_table() -> str:
    """All settings as a Markdown table, for the documentation."""
    head = "| setting | default | values | unit | meaning |\n| --- | --- | --- | --- | --- |\n"
    rows = (
        f"| `{s.key}` | {f'`{s.default}`' if s.default else ''} | {s.values} | {s.unit} "
        f"| {s.description.replace('``', '`')} |\n"
        for s in list_settings()
    )
    return head + "".join(rows)


def _values(annotation: Any) -> str:
    """A type in words, such as "whole number", or the values to choose from."""
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return "list"
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if kinds:  # optional, or annotated
        return _values(kinds[0])
    words = {int: "whole number", float: "number", bool: "true, false", str: "text", Path: "path"}
    return words.get(annotation, "text")


def _schema(options: argparse.Namespace) -> None:
    from stream_hbaf.publish.schema import asyncapi, write_schema

    if options.out is None:
        print_line(json.dumps(asyncapi(), indent=2, ensure_ascii=False))
        return
    write_schema(options.out)
    print_line(f"{options.out}: an AsyncAPI document and JSON Schemas of all that is published")


def _settings(options: argparse.Namespace) -> None:
    settings = list_settings()
    width = max(len(setting.key) for setting in settings)
    for setting in settings:
        unit = f", {setting.unit}" if setting.unit else ""
        print_line(f"{setting.key:<{width}}  {setting.description.replace('``', '')}")
        print_line(f"{'':<{width}}  ({setting.values}{unit}; default: {setting.default or 'none'})")


def _completion(options: argparse.Namespace) -> None:
    import shtab

    parser = build_parser()
    _complete_paths(parser, file=shtab.FILE, folder=shtab.DIRECTORY)
    print_line(shtab.complete(parser, shell=options.shell))


def _complete_paths(parser: argparse.ArgumentParser, *, file: Any, folder: Any) -> None:
    """Let files or folders be completed where an argument is one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command, file=file, folder=folder)
        elif action.type is Path or action.dest in ("file", "bundle"):
            is_folder = action.dest in FOLDERS
            action.complete = folder if is_folder else file  # type: ignore[attr-defined]


VERBOSE = re.compile("-v+")
USER_ERROR = 2  # exit status of every error that the user can correct
LONGEST_REPORT = 2000  # characters of an error, which may name what a damaged file holds
INTERRUPTED = 130  # as shells have it for Ctrl-C
FORMAT, VERBOSE_FORMAT = (
    "stream-hbaf: %(message)s",
    "%(asctime)s %(levelname)s %(name)s: %(message)s",
)
# Without -v, with -v, with -vv: the level of our own log, and of the libraries'.
LEVELS = (
    (logging.WARNING, logging.WARNING),
    (logging.INFO, logging.WARNING),
    (logging.DEBUG, logging.INFO),
)

EPILOG = """\
examples:
  stream-hbaf                            the microphone if there is one, else a recording
  stream-hbaf --mic "USB Audio"          this microphone
  stream-hbaf --file talk.mp3 --speed max --json
  stream-hbaf --mic --mqtt mqtt://broker.local --speaker Ann
  stream-hbaf serve                      for clients that connect and send sound
  stream-hbaf watch                      show what is published
Each command has a --help of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, or 2 after one line that says what is wrong."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that it can't hold ends no command
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        with shown_log(getattr(options, "verbose", 0)):
            options.run(options)
        status = 0
    except StreamHbafError as error:
        status = _report(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0].replace("_", "-")  # as packages are called
        extra = _extra_with(package)
        if extra is None:
            raise
        status = _report(f"{package} is not installed; pip install 'stream-hbaf[{extra}]'")
    except BaseExceptionGroup as group:
        known, others = group.split(StreamHbafError)
        if others is not None or known is None:
            raise
        status = _report(str(_first(known)))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:
        status = INTERRUPTED
    return status


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage, and takes no abbreviated options."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line: listening, and all other commands."""
    parser: argparse.ArgumentParser = _Parser(
        prog="stream-hbaf",
        description="Recognise the emotion of each utterance, live, and publish it over MQTT.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stream-hbaf {__version__}")
    add_listen_options(parser)
    add_verbose(parser)
    commands = parser.add_subparsers(title="other commands", metavar="COMMAND")
    add_live_commands(commands)
    add_serve_command(commands)
    add_session_commands(commands)
    add_speaker_commands(commands)
    add_research_commands(commands)
    add_adapt_command(commands)
    add_about_commands(commands)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; raises ConfigError for an option that the command does not have.

    Options before a command's name are taken as if they stood behind it.
    """
    parser = build_parser()
    return parser.parse_args(_with_command_first(arguments, parser))


@contextmanager
def shown_log(verbose: int) -> Iterator[None]:
    """Log to stderr: warnings; with -v what each stage does, with -vv every detail of it."""
    ours, others = LEVELS[min(verbose, len(LEVELS) - 1)]
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(VERBOSE_FORMAT if verbose else FORMAT))
    loggers = {"": others, "stream_hbaf": ours, "stream_hbaf.progress": min(ours, logging.INFO)}
    former = {name: logging.getLogger(name).level for name in loggers}
    logging.getLogger().addHandler(handler)
    for name, level in loggers.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        for name, level in former.items():
            logging.getLogger(name).setLevel(level)


def _with_command_first(arguments: Sequence[str], parser: argparse.ArgumentParser) -> Sequence[str]:
    """The arguments with the command's name moved before the options that stand in front of it."""
    commands, options = _commands_of(parser), parser._option_string_actions
    position = 0
    while position < len(arguments) and arguments[position].startswith("-"):
        name, has_value, _ = arguments[position].partition("=")
        if name not in options and not VERBOSE.fullmatch(name):
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.7)
            meant = f"; did you mean {near[0]}?" if near else "; see stream-hbaf --help"
            raise ConfigError(f"{name}: there is no such option{meant}")
        following = None if has_value else next(iter(arguments[position + 1 : position + 2]), None)
        position += 2 if _is_value(following, of=options.get(name), commands=commands) else 1
    if position == 0 or position >= len(arguments) or arguments[position] not in commands:
        return arguments
    command, before = arguments[position], arguments[:position]
    for name in (argument.partition("=")[0] for argument in before):
        if name in options and name not in commands[command]._option_string_actions:
            raise ConfigError(
                f"{name}: '{command}' has no such option; see stream-hbaf {command} --help"
            )
    return [command, *before, *arguments[position + 1 :]]


def _is_value(
    argument: str | None, *, of: argparse.Action | None, commands: Mapping[str, object]
) -> bool:
    """Whether the argument behind an option is its value."""
    if argument is None or of is None or of.nargs == 0:
        return False
    if of.nargs == "?" and argument in commands:
        option = of.option_strings[0]
        raise ConfigError(
            f"{option} {argument}: '{argument}' is a command, which comes first; if it is the "
            f"value of {option}, write {option}={argument}"
        )
    return of.nargs != "?" or not argument.startswith("-")


def _commands_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The parsers of all commands, by name."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices


def _extra_with(package: str) -> str | None:
    """The extra of this program that brings a package, if one does; not that of its developers."""
    required = re.compile(rf"{re.escape(package)}\b.*extra == ['\"](\w+)['\"]")
    found = filter(None, map(required.match, requires("stream-hbaf") or ()))
    return next((match[1] for match in found if match[1] != "dev"), None)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _report(message: str) -> int:
    sys.stderr.write(f"stream-hbaf: {shorten(message, limit=LONGEST_REPORT)}\n")
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
