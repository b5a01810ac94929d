"""The outbox keeps messages on disk, in order, within bounds, and can erase them."""

import asyncio
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from stream_hbaf.config import MqttConfig
from stream_hbaf.publish.messages import Message
from stream_hbaf.publish.moment import Moment
from stream_hbaf.publish.outbox import Outbox

CONFIG = MqttConfig(url="mqtt://broker", prefix="p", node="n", outbox=5)


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of this test's outboxes."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "stream_hbaf"


def stored(words: str, *, dialogue_id: str = "d") -> Message:
    properties = (("source", "m"), ("speaker", "Zoë"))
    return Message(
        "p/n/m/utterance", words.encode(), dialogue_id=dialogue_id, properties=properties
    )


def payloads(outbox: Outbox) -> list[str]:
    return [queued.message.payload.decode() for queued in outbox.first(1000)]


def files(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(folder.glob(pattern))


async def filled(*words: str, config: MqttConfig = CONFIG, away: bool = True) -> Outbox:
    outbox = Outbox(config, on_report=lambda line: None)
    await outbox.open()
    for word in words:
        await outbox.put([stored(word)], broker_away=away)
    return outbox


async def left(config: MqttConfig = CONFIG, *, lines: list[str] | None = None) -> list[Message]:
    """What a new start finds."""
    outbox = Outbox(config, on_report=(lines if lines is not None else []).append)
    await outbox.open()
    found = [queued.message for queued in outbox.first(1000)]
    await outbox.close()
    return found


def test_messages_left_over() -> None:
    """They come back whole, in order, before what is new, and only until they are removed."""

    async def main() -> None:
        first = await filled("one", "two", "thrée")
        await first.remove(first.first(1))
        assert await first.close() == 2
        second = await filled("four")
        assert payloads(second) == ["two", "thrée", "four"]
        assert second.first(2) == sorted(second.first(2), key=lambda queued: queued.number)
        await second.close()
        lines: list[str] = []
        assert await left(lines=lines) == [stored("two"), stored("thrée"), stored("four")]
        assert lines[0] == "outbox: messages of an earlier run, sent first: 3"

    asyncio.run(main())


def test_only_durable_messages_are_on_disk() -> None:
    """Each run publishes its own state, and responses concern one run only."""

    async def main() -> None:
        outbox = await filled()
        label = Message("p/n/m/emotion", b"joy", retain=True, dialogue_id="d")
        await outbox.put([stored("one"), label], broker_away=False)
        await outbox.put([Message("p/n/response/ping", b"{}")], broker_away=False)
        assert payloads(outbox) == ["one", "joy", "{}"]
        assert outbox.pop_retained() == [label]
        assert await outbox.close() == 1
        assert await left() == [stored("one")]

    asyncio.run(main())


def test_too_many_messages_while_the_broker_is_away() -> None:
    """The oldest are dropped and counted; none are while the broker is connected."""

    async def main() -> None:
        outbox = await filled("a", "b", "c", "d", "e", "f", "g", away=False)
        assert (outbox.dropped, len(outbox), outbox.full) == (0, 7, True)
        await outbox.put([stored("h")], broker_away=True)
        assert payloads(outbox) == ["d", "e", "f", "g", "h"]
        assert outbox.dropped == 3
        await outbox.close()
        assert [message.payload for message in await left()] == [b"d", b"e", b"f", b"g", b"h"]

    asyncio.run(main())


class Clock:
    """The clocks of a machine, which a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.boot, self.since_boot, self.at = "boot 1", 100.0, 1_800_000_000.0
        for module in ("outbox", "outbox_file"):
            monkeypatch.setattr(f"stream_hbaf.publish.{module}.present", self)

    def __call__(self) -> Moment:
        return Moment(self.boot, self.since_boot, self.at)

    def wait(self, hours: float) -> None:
        self.since_boot += hours * 3600
        self.at += hours * 3600

    def set(self, hours: float) -> None:
        """Set the wall clock forward."""
        self.at += hours * 3600

    def boot_again(self, number: int = 2) -> None:
        self.boot, self.since_boot = f"boot {number}", 10.0


TWO_HOURS = CONFIG.model_copy(update={"outbox_age_h": 2})


def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages older than `outbox_age_h` are dropped and counted, also at the next start and
    after another boot."""
    clock = Clock(monkeypatch)

    async def main() -> list[str]:
        lines: list[str] = []
        first = Outbox(TWO_HOURS, on_report=lines.append)
        await first.put([stored("old")], broker_away=True)
        clock.wait(3)
        await first.put([stored("young")], broker_away=True)
        assert (payloads(first), first.dropped) == (["young"], 1)
        await first.close()
        clock.wait(3)
        assert await left(TWO_HOURS, lines=lines) == []
        await (await filled("again", config=TWO_HOURS)).close()
        clock.boot_again()
        clock.wait(3)
        assert await left(TWO_HOURS, lines=lines) == []
        return lines

    assert [line for line in asyncio.run(main()) if "kept" not in line] == [
        "outbox: messages dropped, too old: 1",
        "outbox: messages of an earlier run dropped, too old: 1",
        "outbox: messages of an earlier run dropped, too old: 1",
    ]


@pytest.mark.parametrize("wrong_by_h", [-500_000, -240, 240, 500_000])
def test_clock_that_is_set(monkeypatch: pytest.MonkeyPatch, wrong_by_h: float) -> None:
    """A wall clock that was wrong makes no message old: neither in the same run, nor in the next
    one, nor, if it was set before a message came, after another boot."""
    clock = Clock(monkeypatch)
    clock.set(wrong_by_h)

    async def main() -> None:
        outbox = await filled("one", config=TWO_HOURS)
        clock.set(-wrong_by_h)
        await outbox.put([stored("two")], broker_away=True)
        assert (payloads(outbox), outbox.dropped) == (["one", "two"], 0)
        await outbox.close()
        assert await left(TWO_HOURS) == [stored("one"), stored("two")]
        clock.boot_again()
        clock.set(1)
        assert await left(TWO_HOURS) == [stored("one"), stored("two")]

    asyncio.run(main())


def test_clock_that_was_impossible_at_an_earlier_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a clock begins in 1970: what it kept counts as new, and grows old."""
    clock = Clock(monkeypatch)
    clock.set(-500_000)

    async def main() -> None:
        await (await filled("one", config=TWO_HOURS)).close()
        clock.boot_again()
        clock.set(500_000)
        assert await left(TWO_HOURS) == [stored("one")]
        clock.wait(1)
        assert await left(TWO_HOURS) == [stored("one")]
        clock.wait(2)
        assert await left(TWO_HOURS) == []

    asyncio.run(main())


def test_order_of_merged_files_with_a_clock_that_steps_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within each file messages stay in their order, whatever the clock showed."""
    clock = Clock(monkeypatch)

    async def main() -> list[str]:
        first, second = await filled("a1"), await filled("b1")
        clock.boot_again()
        clock.set(-1)
        for outbox, word in ((second, "b2"), (first, "a2")):
            clock.wait(0.1)
            await outbox.put([stored(word)], broker_away=True)
        await first.close()
        await second.close()
        clock.boot_again(3)
        clock.wait(0.1)
        return [message.payload.decode() for message in await left()]

    found = asyncio.run(main())
    assert sorted(found) == ["a1", "a2", "b1", "b2"]
    assert found.index("a1") < found.index("a2")
    assert found.index("b1") < found.index("b2")


def test_forgotten_dialogue_is_gone_from_the_disk(state: Path) -> None:
    """No byte of its words is in any file, though the recogniser goes on; others stay."""

    async def main() -> None:
        outbox = await filled()
        secrets = [stored(f"secret {n}" * 500, dialogue_id="gone") for n in range(3)]
        await outbox.put([secrets[0], stored("public"), *secrets[1:]], broker_away=False)
        assert b"secret 1" in content()
        assert await outbox.forget("gone") == 3
        assert payloads(outbox) == ["public"]
        assert b"secret" not in content()
        assert b"public" in content()
        await outbox.close()

    def content() -> bytes:
        return b"".join(path.read_bytes() for path in state.iterdir())

    asyncio.run(main())


def test_forgotten_dialogue_is_gone_from_what_other_runs_left(state: Path) -> None:
    """Also from outboxes for other brokers and nodes, and from damaged files."""

    async def main() -> None:
        secret = stored("secret", dialogue_id="gone")
        for other in ({"url": "mqtt://elsewhere"}, {"node": "o"}):
            outbox = Outbox(CONFIG.model_copy(update=other), on_report=lambda line: None)
            await outbox.put([replace(secret, topic="p/o/m/utterance")], broker_away=True)
            await outbox.put([stored("public")], broker_away=True)
            await outbox.close()
        (state / "outbox-n-0.damaged").write_bytes(b"rubbish gone secret")
        (state / "outbox-n-0.1.damaged").write_bytes(b"public")
        ours = await filled("ours")
        await ours.forget("gone")
        await ours.close()

    asyncio.run(main())
    content = b"".join(path.read_bytes() for path in state.iterdir())
    assert b"secret" not in content
    assert content.count(b"public") == 2
    assert not files(state, "*.damaged")  # nobody can tell what they hold


def test_readable_by_its_owner_only(state: Path) -> None:
    """Folder, file, log and lock are private: they hold transcripts."""

    async def main() -> list[Path]:
        outbox = await filled("one")
        found = files(state)
        assert {path.stat().st_mode & 0o777 for path in found} == {0o600}
        await outbox.close()
        return found

    assert len(asyncio.run(main())) == 4  # file, log, its index, lock
    assert state.stat().st_mode & 0o777 == 0o700


def test_one_file_for_each_recogniser_at_each_broker(state: Path) -> None:
    """Other broker, prefix or node: another file; none publishes what another left."""
    others = [{"url": "mqtt://elsewhere"}, {"prefix": "q"}, {"node": "o"}]

    async def main() -> None:
        outbox = await filled("ours")
        await outbox.close()
        for other in others:
            assert await left(CONFIG.model_copy(update=other)) == []
        assert await left() == [stored("ours")]

    asyncio.run(main())
    assert len(list(state.glob("*.sqlite"))) == 4


def test_second_recogniser_with_the_same_node(state: Path) -> None:
    """It takes a file of its own; once both are gone the next start publishes what both left."""

    async def main() -> None:
        first, second = await filled("a"), await filled("b")
        assert payloads(second) == ["b"]
        await first.put([stored("c")], broker_away=True)
        await first.close()
        await second.close()
        assert [message.payload for message in await left()] == [b"a", b"b", b"c"]
        assert [message.payload for message in await left()] == [b"a", b"b", b"c"]
        assert len(files(state, "*.sqlite")) == 1

    asyncio.run(main())


def test_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line says so and what to do; messages are held in memory, and at the end counted."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))

    async def main() -> list[str]:
        lines: list[str] = []
        outbox = Outbox(CONFIG, on_report=lines.append)
        await outbox.put([stored("one")], broker_away=False)
        await outbox.put([stored("two")], broker_away=False)
        assert payloads(outbox) == ["one", "two"]
        await outbox.remove(outbox.first(1))
        assert await outbox.close() == 0
        return lines

    folder = tmp_path / "file" / "stream_hbaf"
    assert asyncio.run(main()) == [
        f"outbox: {folder}: Not a directory; messages are kept in memory only: "
        "free some space there, or set XDG_STATE_HOME to another folder",
        f"outbox: {folder}: can't be written; messages lost: 1",
    ]


FULL_DISK = """
    import asyncio, resource
    from test_outbox import CONFIG, Outbox, stored
    def allow(size):  # of a file: beyond it, writing fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    async def main():
        outbox = Outbox(CONFIG, on_report=print)
        await outbox.put([stored("small")], broker_away=False)
        allow(50_000)
        await outbox.put([stored("x" * 100_000)], broker_away=False)
        await outbox.put([stored("y" * 100_000)], broker_away=False)
        allow(resource.RLIM_INFINITY)
        await outbox.put([stored("last")], broker_away=False)
        print(await outbox.close())
    asyncio.run(main())
"""


def lines_of(script: str) -> list[str]:
    """What a script prints in a process of its own, whose limits are its own too."""
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return child.stdout.splitlines()


def test_full_disk(state: Path) -> None:
    """One line; messages are held in memory, and all are on disk once there is room again."""
    full, mended, kept, count = lines_of(FULL_DISK)
    assert full.startswith(f"outbox: {state}: ")
    assert "kept in memory only: free some space there" in full
    assert mended == f"outbox: {state}: messages are kept on disk again"
    assert (kept, count) == ("outbox: messages kept for the next start: 4", "4")
    found = [message.payload.decode()[:5] for message in asyncio.run(left())]
    assert found == ["small", "xxxxx", "yyyyy", "last"]


FORGET_ON_A_FULL_DISK = """
    import asyncio, resource
    from stream_hbaf.errors import ConfigError
    from test_outbox import CONFIG, Outbox, stored
    def allow(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    async def main():
        outbox = Outbox(CONFIG, on_report=print)
        await outbox.put([stored("secret" * 1000)], broker_away=False)
        allow(10)
        try:
            await outbox.forget("d")
        except ConfigError as error:
            print(error)
        print(len(outbox))
        allow(resource.RLIM_INFINITY)
        print(await outbox.forget("d"))
        await outbox.close()
    asyncio.run(main())
"""


def test_forget_on_a_full_disk(state: Path) -> None:
    """It is an error that says so, and can be repeated; meanwhile nothing is sent."""
    error, *counts = lines_of(FORGET_ON_A_FULL_DISK)
    assert error.startswith("forget: not all was erased: outbox: ")
    assert error.endswith("; then ask again")
    assert counts == ["0", "1"]
    assert b"secret" not in b"".join(path.read_bytes() for path in state.iterdir())


def test_damaged_file(state: Path) -> None:
    """It is renamed, reported in one line, and a new one begun."""
    lines: list[str] = []

    async def main() -> None:
        await (await filled("one")).close()
        (file,) = files(state, "*.sqlite")
        file.write_bytes(b"no database at all" * 1000)
        assert await left(lines=lines) == []
        await (await filled("two")).close()
        assert await left() == [stored("two")]

    asyncio.run(main())
    (damaged,) = state.glob("*.damaged")
    assert damaged.read_bytes().startswith(b"no database")
    assert lines[0].endswith(f"renamed to {damaged.name}, and a new file begun")


def test_messages_set_aside() -> None:
    """They come last at the next start, count towards the limit, and are forgotten like others."""

    async def main() -> None:
        outbox = await filled("a", "b", "c")
        a, b, _ = outbox.first(3)
        await outbox.set_aside([a, b])
        assert (payloads(outbox), len(outbox), outbox.depth) == (["c"], 1, 3)
        outbox.take_back()
        assert payloads(outbox) == ["a", "b", "c"]
        await outbox.set_aside([a, b])
        for word in "defg":
            await outbox.put([stored(word, dialogue_id="other")], broker_away=False)
        await outbox.set_aside(outbox.first(1))
        assert (outbox.dropped, outbox.depth) == (2, 5)
        assert await outbox.close() == 5
        assert [message.payload for message in await left()] == [b"d", b"e", b"f", b"g", b"c"]
        again = await filled()
        gone = again.first(5)
        assert await again.forget("d") == 1
        await again.set_aside(gone[-1:])  # it was refused while it was being forgotten
        assert again.depth == 4
        await again.close()

    asyncio.run(main())


def test_cancelled_put_stores_its_message() -> None:
    """The message is stored all the same."""

    async def main() -> None:
        outbox = await filled()
        sending = asyncio.create_task(outbox.put([stored("one")], broker_away=False))
        await asyncio.sleep(0)
        sending.cancel()
        await asyncio.wait({sending})
        assert sending.cancelled()
        assert payloads(outbox) == ["one"]
        await outbox.close()
        assert await left() == [stored("one")]

    asyncio.run(main())
