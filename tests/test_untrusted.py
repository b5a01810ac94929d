"""Texts that others wrote: plain values within limits, or one line, and quickly."""

import time
import tracemalloc
from pathlib import Path

import pytest
from damages import JSON, YAML, complaint

from stream_hbaf.errors import shorten
from stream_hbaf.untrusted import (
    MAX_DEPTH,
    MAX_NUMBER,
    UntrustedError,
    as_unicode,
    parse_json,
    parse_yaml,
    read_limited,
)


@pytest.mark.parametrize("number", range(len(YAML)))
def test_yaml_is_read_or_refused_soon(number: int) -> None:
    """Bombs of aliases and merges, endless nesting, tags that don't fit: never another error."""
    began = time.thread_time()  # of this thread: a busy machine doesn't count; a bomb takes minutes
    assert "\n" not in complaint(lambda: parse_yaml(YAML[number].encode()[: 1 << 18]))
    assert time.thread_time() - began < 3.0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (YAML[0], "it holds more than 100,000 values, aliases written out"),
        (YAML[1], "it holds more than 100,000 values, aliases written out"),
        (YAML[2], "mappings are merged with <<"),
        ("&a [*a]", "it is nested too deeply"),
        ("[" * 3000, "it is nested too deeply"),
        ("a: .inf", "a number that isn't finite"),
        (f"a: {MAX_NUMBER + 1}", "a number out of all bounds"),
        ('a: "\\ud83d"', "half a surrogate pair, which is no character"),
        ("a: !!bool x", "a value doesn't fit its tag"),
        ("a: 2026-99-99", "month must be in 1..12"),
    ],
)
def test_yaml_says_what_is_wrong(text: str, reason: str) -> None:
    """Each limit has its own reason."""
    with pytest.raises(UntrustedError) as raised:
        parse_yaml(text.encode())
    assert str(raised.value) == reason


def test_yaml_names_the_line() -> None:
    """Of a syntax error, and of what isn't UTF-8."""
    for text, line in ((b"a: 1\nb: [\n", 3), (b"a: 1\nb: \xff\n", 2)):
        with pytest.raises(UntrustedError) as raised:
            parse_yaml(text)
        assert raised.value.line == line


def test_what_is_within_the_limits_is_read() -> None:
    """Aliases, nesting and numbers as people use them."""
    assert parse_yaml(b"a: &a [1, 2.5]\nb: *a\nc: !!binary aGk=\n") == {
        "a": [1, 2.5],
        "b": [1, 2.5],
        "c": b"hi",
    }
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    assert str(parse_yaml(deep.encode())) == str(parse_json(deep)) == deep
    assert parse_json(f'{{"a": [-{MAX_NUMBER}, 1e-9, "\\ud83d\\ude00"]}}') == {
        "a": [-MAX_NUMBER, 1e-9, "\N{GRINNING FACE}"]
    }


@pytest.mark.parametrize("text", JSON)
def test_json_is_read_or_refused(text: str) -> None:
    """Never another error, whatever the text."""
    assert len(complaint(lambda: parse_json(text))) <= 80


def test_a_file_without_an_end_is_not_read_to_it() -> None:
    """A device gives as many bytes as are asked for."""
    with pytest.raises(UntrustedError, match="it has more than 1,000 bytes"):
        read_limited(Path("/dev/zero"), limit=1000)


def test_a_large_limit_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """Of a short file, and of one as long as the limit, in pieces."""
    for length in (0, 5, 3 << 20):
        (tmp_path / "x").write_bytes(b"a" * length)
        tracemalloc.start()
        assert len(read_limited(tmp_path / "x", limit=max(length, 1 << 34))) == length
        assert tracemalloc.get_traced_memory()[1] < 3 * length + (2 << 20)
        tracemalloc.stop()
        assert len(read_limited(tmp_path / "x", limit=length)) == length
        with pytest.raises(UntrustedError):
            read_limited(tmp_path / "x", limit=length - 1)


def test_names_that_are_not_utf_8_become_text() -> None:
    """Whole pairs of surrogates are the character that they stand for."""
    assert as_unicode("caf\udce9") == "caf\N{REPLACEMENT CHARACTER}"
    assert as_unicode("\ud83d \ud83d\ude00 é") == "\N{REPLACEMENT CHARACTER} \N{GRINNING FACE} é"


def test_what_is_named_in_a_message_is_one_short_line() -> None:
    """Control characters could control the terminal."""
    assert shorten("a\x1b[31m\n b") == "a\N{REPLACEMENT CHARACTER}[31m b"
    assert shorten("x" * 500, limit=5) == "xxxx…"
