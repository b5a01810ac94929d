"""The commands about the program itself: schema, settings, completion."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from stream_hbaf.commands.options import Commands, add_command, print_line

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

SHELLS = ("bash", "zsh", "fish")
FOLDERS = ("record", "out", "corpora", "cache", "results", "session", "folder")  # options for one


def add_about_commands(
    commands: Commands, *, build_parser: Callable[[], argparse.ArgumentParser]
) -> None:
    """Add schema, settings and completion; ``build_parser`` builds the whole command line."""
    schema = add_command(commands, "schema", _schema, help="print what is published as AsyncAPI")
    schema.add_argument("--out", type=Path, help="write it here, with a JSON Schema a message")

    add_command(commands, "settings", _settings, help="list all settings, for --set and --config")

    completion = add_command(
        commands, "completion", _completion, help="print a script that completes this command"
    )
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(build_parser=build_parser)


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
            unit=_unit(field),
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


def _unit(field: "FieldInfo") -> str:
    from stream_hbaf.config import Unit

    annotations = [*field.metadata, *(a for kind in get_args(field.annotation) for a in _of(kind))]
    return next((one.name for one in annotations if isinstance(one, Unit)), "")


def _of(kind: Any) -> tuple[Any, ...]:
    """What a type is annotated with."""
    return getattr(kind, "__metadata__", ())


def _schema(options: argparse.Namespace) -> int:
    from stream_hbaf.publish.schema import asyncapi, write_schema

    if options.out is None:
        print_line(json.dumps(asyncapi(), indent=2, ensure_ascii=False))
        return 0
    write_schema(options.out)
    print_line(f"{options.out}: an AsyncAPI document and JSON Schemas of all that is published")
    return 0


def _settings(options: argparse.Namespace) -> int:
    settings = list_settings()
    width = max(len(setting.key) for setting in settings)
    for setting in settings:
        unit = f", {setting.unit}" if setting.unit else ""
        print_line(f"{setting.key:<{width}}  {setting.description.replace('``', '')}")
        print_line(f"{'':<{width}}  ({setting.values}{unit}; default: {setting.default or 'none'})")
    return 0


def _completion(options: argparse.Namespace) -> int:
    import shtab

    parser: argparse.ArgumentParser = options.build_parser()
    _complete_paths(parser, file=shtab.FILE, folder=shtab.DIRECTORY)
    sys.stdout.write(shtab.complete(parser, shell=options.shell) + "\n")
    return 0


def _complete_paths(parser: argparse.ArgumentParser, *, file: Any, folder: Any) -> None:
    """Let files or folders be completed where an argument is one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command, file=file, folder=folder)
        elif action.type is Path or action.dest in ("file", "bundle"):
            is_folder = action.dest in FOLDERS
            action.complete = folder if is_folder else file  # type: ignore[attr-defined]
