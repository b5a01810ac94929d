"""Hostile and random damages of files, each from a seed: for tests of everything that is read."""

import copy
import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stream_hbaf.errors import StreamHbafError
from stream_hbaf.untrusted import UntrustedError

# What stands where something else is expected.
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**5, 10**9, 10**30, 10**400, 1e308, -1e308, float("nan"), float("inf")),
    *("", "x", "\0", "a\nb", "\x1b[31m", "../../x", "/dev/zero", "x" * 5000, "\ud83d", "1:2:3"),
    *([], {}, [[]], [None], {"a": {"b": 1}}, {"": ""}, ["a", "a", "a"]),
)
NAMES = ("x", "", "a.b", "__class__", "\ud83d", "x" * 999)
BYTES = (
    *(
        b"\0",
        b"\xff",
        b"\xed\xa0\xbd",
        b"\\ud83d",
        b"[",
        b"{",
        b"'",
        b'"',
        b"\n",
        b": ",
        b"- ",
        b"%",
    ),
    *(b"&a ", b"*a", b"<<: ", b"? ", b"!!int ", b"!!bool ", b"!!timestamp ", b"!!binary "),
    *(b"!!python/object/apply:os.system ", b"9" * 5000, b"1e999", b"NaN"),
)
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(9 * [f'*{before}'])}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
NESTED_BOMB = BOMB.replace("[x,x,x,x,x,x,x,x,x]", "{x: 1}")
MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(9 * [f'*{before}'])}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
# Texts that no YAML reader should stumble over.
YAML = (
    *(BOMB, NESTED_BOMB, MERGE_BOMB, "a: &a [*a]\n", "&a {b: *a}\n"),
    *("[" * 100_000, "{a: " * 5000, "- " * 5000 + "x", "model: {a: " * 300),
    *("a: " + "9" * 10_000, "a: 2026-99-99", "a: 0b", "? [a]\n: b\n", "? {a: b}\n: c\n"),
    *("a: .nan", "a: !!binary x", "a: !!int x", "a: !!float x", "a: !!timestamp x", "a: !!bool x"),
    *(
        "a: !!omap 1",
        "a: !!set 1",
        "!!python/name:os.system x",
        "%YAML 9.9\n---\na: 1",
        "- a",
        "42",
    ),
    *("a: 1\n---\nb: 2\n", "1: 2", "null: 1", "? \n: 1", "# " + "a" * 5_000_000, "\0", "a: \x07"),
)
# Texts that no JSON reader should stumble over.
JSON = (
    *('{"a":' * 100_000, "[" * 100_000 + "]" * 100_000, "", "{", "\0" * 100, "null", "[]", "3"),
    *('"\\ud83d"', '{"schema":[]}', '{"schema":{}}', '{"a":' + "9" * 5000 + "}", '{"a":NaN}'),
    *('{"format":1}', '{"format":1,"id":"' + "x" * 3_000_000 + '"}'),
)

# Containers of sound, and how FFmpeg is told the codec.
CODECS = {"flac": (), "wav": (), "ogg": ("-c:a", "libopus"), "mkv": ("-c:a", "libopus"), "mp3": ()}
CODECS |= {"m4a": (), "ts": (), "au": (), "avi": ("-c:a", "mp3"), "caf": ("-c:a", "pcm_s16le")}


def complaint(read: Callable[[], object]) -> str:
    """What is said of a file that can't be read; empty if it can. Other errors are raised."""
    try:
        read()
    except (StreamHbafError, UntrustedError) as error:
        return str(error)
    return ""


def damage(content: bytes, seed: int) -> bytes:
    """The content with a few bytes changed, cut out or put in."""
    draw = random.Random(seed)
    raw = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 10))):
        at = draw.randrange(len(raw) + 1)
        match draw.randrange(4):
            case 0 if raw:
                raw[at % len(raw)] = draw.randrange(256)
            case 1:
                del raw[at:]
            case 2:
                del raw[at : at + draw.randrange(1, 40)]
            case _:
                raw[at:at] = draw.choice(BYTES)
    return bytes(raw)


def damage_sound(content: bytes, seed: int) -> bytes:
    """Bits flipped, the end cut off, bytes cut out or inserted; half of it near the header."""
    chance, found = random.Random(seed), bytearray(content)
    near = chance.randrange(min(300, len(found)))
    at = chance.choice([near, chance.randrange(len(found))])
    match seed % 4:
        case 0:
            for _ in range(chance.choice([1, 3, 20])):
                found[chance.randrange(at + 1)] ^= 1 << chance.randrange(8)
        case 1:
            del found[at:]
        case 2:
            del found[at : at + chance.choice([1, 10, 1000])]
        case _:
            found[at:at] = chance.randbytes(chance.choice([1, 10, 1000]))
    return bytes(found)


def one_second(recording: Path, to: Path) -> Path:
    """A recording's first second in the container that the name of ``to`` says, by FFmpeg."""
    kind = to.suffix.removeprefix(".")
    command = ["ffmpeg", "-loglevel", "error", "-y", "-i", str(recording), "-t", "1"]
    subprocess.run([*command, *CODECS[kind], str(to)], check=True)
    return to


def change(tree: Any, seed: int) -> Any:
    """The tree of mappings and lists with a few values replaced, left out or added."""
    draw = random.Random(seed)
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = [*_places(tree)]
        if not places:
            break
        node, key = draw.choice(places)
        what = draw.random()
        if what < 0.1:
            del node[key]
        elif what < 0.25 and isinstance(node, dict):
            node[draw.choice(NAMES)] = copy.deepcopy(draw.choice(VALUES))
        else:
            node[key] = copy.deepcopy(draw.choice(VALUES))
    return tree


def as_text(tree: Any) -> bytes:
    """JSON, which is YAML as well."""
    return json.dumps(tree).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in [*keys]:
        yield tree, key
        yield from _places(tree[key])
