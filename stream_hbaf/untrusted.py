"""Reads YAML and JSON that others may have written: plain values, within limits.

A short text can stand for a very large value (YAML's aliases and merges), nest deeper than Python's
stack, or hold a number that no field can. Such a text is refused with the reason.
"""

import math
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import from_json

from stream_hbaf.errors import shorten

SETTINGS_BYTES = 1 << 18  # of a file of settings; those here have at most 3 kB
PIECE_BYTES = (
    1 << 20
)  # read at once: Python allocates all that is asked for, however short the file
MAX_DEPTH = 32  # mappings and lists within each other; settings and events need six
MAX_VALUES = 100_000  # of one text, each alias counted as all that it stands for
MAX_NUMBER = 1 << 53  # larger integers aren't the same in all JSON readers (RFC 8259, section 6)
# What PyYAML raises, beside its own errors, for a text that doesn't fit its tag: "!!bool x".
UNFIT_TAG = (ValueError, KeyError, AttributeError, TypeError, OverflowError)


class UntrustedError(ValueError):
    """A text that isn't what it should be, or is out of all limits: the reason, without a place."""

    def __init__(self, reason: str, *, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line  # from 1, where it is known


def read_limited(path: Path, *, limit: int) -> bytes:
    """A file's content. Raises OSError, or UntrustedError if it has more than ``limit`` bytes.

    A device or a pipe without an end isn't read further than that.
    """
    with path.open("rb") as file:
        left = limit if os.fstat(file.fileno()).st_size <= limit else -1  # pipes have no size
        parts = []
        while left >= 0 and (part := file.read(min(left + 1, PIECE_BYTES))):
            parts.append(part)
            left -= len(part)
    if left < 0:
        raise UntrustedError(f"it has more than {limit:,} bytes")
    return b"".join(parts)


def parse_yaml(content: bytes) -> Any:
    """The plain values of a YAML text in UTF-8. Raises UntrustedError."""
    try:
        value = yaml.load(content.decode(), Loader=_PlainLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error)
        line = None if mark is None else mark.line + 1
        raise UntrustedError(" ".join(reason.split()), line=line) from None
    except RecursionError:
        raise UntrustedError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UntrustedError("it isn't UTF-8", line=line) from None
    except UntrustedError:
        raise
    except UNFIT_TAG as error:
        fits = isinstance(error, ValueError)  # else the text is about PyYAML's insides
        reason = shorten(str(error)) if fits else "a value doesn't fit its tag"
        raise UntrustedError(reason) from None
    _check(value)
    return value


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text. Raises UntrustedError."""
    try:
        value = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise UntrustedError(shorten(str(error))) from None
    _check(value)
    return value


class _PlainLoader(yaml.SafeLoader):
    """Plain data only; no merged mappings, of which a short text could make a very long one."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise UntrustedError("mappings are merged with <<")


def _check(value: Any) -> None:
    """Raises UntrustedError for a value that is too large or too deep, or holds such a number."""
    waiting, count = [(value, 1)], 1
    while waiting:
        one, depth = waiting.pop()
        if isinstance(one, float) and not math.isfinite(one):
            raise UntrustedError("a number that isn't finite")
        if isinstance(one, int | float) and abs(one) > MAX_NUMBER:
            raise UntrustedError("a number out of all bounds")
        if isinstance(one, str) and not one.isascii() and one != as_unicode(one):
            raise UntrustedError("half a surrogate pair, which is no character")
        parts = _parts(one)
        count += len(parts)
        if count > MAX_VALUES:
            raise UntrustedError(f"it holds more than {MAX_VALUES:,} values, aliases written out")
        if parts and depth > MAX_DEPTH:
            raise UntrustedError("it is nested too deeply")
        waiting += [(part, depth + 1) for part in parts]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return [*value] if isinstance(value, list | tuple | set) else []


def as_unicode(text: str) -> str:
    """The text with a replacement character for each lone surrogate, which UTF-8 can't hold.

    Such are the bytes of a file's name that isn't UTF-8, and half an emoji.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
