"""A damaged outbox ends nothing: what can be read is delivered, the rest named and set aside."""

import asyncio
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing, suppress
from pathlib import Path

import pytest

from stream_hbaf.config import MqttConfig
from stream_hbaf.publish.messages import Message
from stream_hbaf.publish.outbox import Outbox

CONFIG = MqttConfig(url="mqtt://broker", prefix="p", node="n")
SIZES = (20, 300, 5000)  # bytes of text: in a page, and over several
DAMAGES = 60


def message(number: int) -> Message:
    text = "w" * SIZES[number % len(SIZES)]
    payload = f'{{"id":"u{number}","text":"{text}"}}'.encode()
    properties = (("source", "m"),)
    return Message("p/n/m/utterance", payload, dialogue_id="d", properties=properties)


MESSAGES = [message(number) for number in range(20)]


@pytest.fixture(scope="module", params=["closed", "killed"])
def outbox(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of a run that ended in order, or of one that was killed."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    script = f"""
        import asyncio, os
        from test_outbox_damage import CONFIG, MESSAGES, Outbox
        async def main():
            outbox = Outbox(CONFIG, on_report=print)
            for message in MESSAGES:
                await outbox.put([message], broker_away=False)
            if "{request.param}" == "closed":
                await outbox.close()
            os._exit(0)
        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = os.environ | {"XDG_STATE_HOME": str(folder)}
    subprocess.run(command, cwd=Path(__file__).parent, env=environment, check=True, timeout=60)
    return folder


@pytest.fixture
def state(outbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as this test's state folder."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    shutil.copytree(outbox, tmp_path / "state")
    return tmp_path / "state" / "stream_hbaf"


def database(state: Path) -> Path:
    (path,) = state.glob("*.sqlite")
    return path


def start(*new: Message) -> tuple[list[Message], list[str]]:
    """The messages that a run finds and the lines that it reports; it leaves them, and ``new``."""
    lines: list[str] = []

    async def main() -> list[Message]:
        outbox = Outbox(CONFIG, on_report=lines.append)
        await outbox.open()
        found = [queued.message for queued in outbox.first(1000)]
        await outbox.put(new, broker_away=False)
        assert await outbox.close() == len(found) + len(new)
        return found

    return asyncio.run(main()), [line for line in lines if "messages of" not in line]


def check(state: Path, *, what: str) -> list[int]:
    """Start twice; returns the numbers of the messages that were found."""
    found, lines = start(message(100))
    numbers = [MESSAGES.index(each) for each in found]  # so each is as it was written
    assert numbers == sorted(numbers), what
    assert all(line.isprintable() for line in lines), what
    named = [line for line in lines if "renamed to" in line]
    assert len(named) <= 1, what
    assert len(list(state.glob("*[0-9].damaged"))) == len(named), what
    assert not any("kept in memory" in line for line in lines), what
    again, lines = start()
    assert again == [*found, message(100)], what
    assert not any("renamed to" in line for line in lines), what
    return numbers


def damage(path: Path, chance: random.Random) -> str:
    """Damage a file at random; returns how."""
    content = bytearray(path.read_bytes())
    place, length = chance.randrange(len(content)), chance.randrange(1, 5000)
    kind = chance.choice(["bit", "bytes", "head", "cut", "insert", "zeros"])
    match kind:
        case "bit":
            content[place] ^= 1 << chance.randrange(8)
        case "bytes":
            for _ in range(chance.randrange(1, 200)):
                content[chance.randrange(len(content))] = chance.randrange(256)
        case "head":
            content[chance.randrange(100)] = chance.randrange(256)
        case "cut":
            del content[place:]
        case "insert":
            content[place:place] = chance.randbytes(length)
        case "zeros":
            content[place : place + length] = bytes(len(content[place : place + length]))
    path.write_bytes(content)
    return f"{kind} at {place} of {path.suffix}"


def test_random_damage(state: Path) -> None:
    """No damage crashes a start, is met twice, or has anything delivered that was not written."""
    whole = {path: path.read_bytes() for path in state.iterdir()}
    targets = [path for path in whole if path.suffix != ".lock"]
    delivered = 0
    for seed in range(DAMAGES):
        for path in state.iterdir():
            path.unlink()
        for path, content in whole.items():
            path.write_bytes(content)
        chance = random.Random(seed)
        what = f"seed {seed}: {damage(chance.choice(targets), chance)}"
        delivered += len(check(state, what=what))
    assert delivered > DAMAGES * len(MESSAGES) / 3


@pytest.mark.parametrize(
    ("statement", "kept"),
    [
        ("update waiting set number = number * 1000000000000", 0),
        ("update waiting set number = 9223372036854775807 where number = 9", 19),
        ("update waiting set at = 'soon' where number = 3", 19),
        ("update waiting set at = 9e999 where number = 3", 19),
        ("update waiting set since_boot = -9e999", 0),
        ("update waiting set topic = null where number < 3", 18),
        ("update waiting set topic = x'ff00ff' where number < 3", 18),
        ("update waiting set topic = 'p/n/#', checksum = null where number < 3", 18),
        ("update waiting set topic = 'q/n/m/utterance', checksum = null where number < 3", 18),
        ("update waiting set payload = zeroblob(100000000) where number = 5", 19),
        ("update waiting set payload = 'no JSON', checksum = null where number = 5", 19),
        ("update waiting set payload = replace(payload, 'w', 'v') where number = 5", 19),
        (
            f"update waiting set properties = '{'[' * 100_000}', checksum = null where number < 2",
            19,
        ),
        ("update waiting set properties = '[[1, 2], [3]]', checksum = null where number < 2", 19),
        ("update waiting set dialogue_id = 5 where number < 2", 19),
        ("update waiting set payload = 7 where number < 3", 18),
        (
            "pragma writable_schema = on; update sqlite_schema set sql = 'create table waiting ('"
            " || char(127) || ')' where name = 'waiting'",
            0,
        ),
        ("create table others (x)", 20),
        ("create trigger t before delete on waiting begin select raise(abort, 'no'); end", 20),
        ("alter table waiting rename column at to bt", 0),
        ("drop table waiting", 0),
        (
            "drop table waiting; create view waiting as with recursive r(n) as (select 1 union all "
            "select n + 1 from r) select n as number, 1.0 as at, 't' as topic from r",
            0,
        ),
        ("insert into retained values ('q/other', '{}', 'mqtt://broker:1883')", 20),
        ("insert into retained values ('p/n/info', '[[', 'mqtt://broker:1883')", 20),
    ],
)
def test_hostile_values(state: Path, statement: str, kept: int) -> None:
    """What the program doesn't write is not delivered; the rest is."""
    with closing(sqlite3.connect(database(state))) as changed, suppress(sqlite3.OperationalError):
        changed.executescript(statement)
        changed.commit()
    assert len(check(state, what=statement)) == kept
    assert len(list(state.glob("*[0-9].damaged"))) == 1


def test_something_else_than_a_file(state: Path) -> None:
    """A folder where the file or its log should be is renamed as well."""
    path = database(state)
    for each in (path, path.with_name(f"{path.name}-wal")):
        each.unlink(missing_ok=True)
        each.mkdir()
        assert check(state, what=each.name) in ([], [20])
        for rest in state.glob("*.damaged"):
            rest.rmdir() if rest.is_dir() else rest.unlink()
