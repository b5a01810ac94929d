"""The drills of ``tools/drill.py``: what goes wrong, and what must come of it."""

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import aiomqtt
from damages import damage
from drill_stage import Stage
from fuzz_mqtt import Messages
from soak_mqtt import Broker, restart, until

SMALL_KB = 400  # of the disk that fills up
MEMORY = 8 << 20  # bytes that may still be allocated
HOSTILE = 500  # messages
LONG_AGO = "-400d"  # a clock that has not been set
# All topics but that of utterances.
ALLOWED = [
    *("available", "info", "health", "+/status/+", "+/speech", "+/emotion", "+/partial"),
    *("+/dialogue", "+/+/state", "response/+"),
]


class Skipped(Exception):  # noqa: N818  no error
    """A drill needs what this machine doesn't have."""


async def kill(stage: Stage) -> str:
    """The recogniser is killed in the middle of its work."""
    run = await stage.start()
    await run.reports(3)
    await run.kill()
    await stage.deliver()
    return f"SIGKILL after {len(run.reported)} utterances; the next run delivers"


async def kill_broker(stage: Stage) -> str:
    """The broker is killed, and comes back."""
    run = await stage.start()
    await run.reports(2)
    await stage.broker.kill()
    await run.reports(4)
    await restart(stage.broker, stage.received)
    await run.ends(0)
    return "the broker is killed after 2, and started after 4"


async def kill_both(stage: Stage) -> str:
    """The recogniser is killed while the broker is away."""
    left = await leave(stage)
    await restart(stage.broker, stage.received)
    await stage.deliver()
    return f"the outbox keeps {left}; the next run delivers"


async def leave(stage: Stage) -> int:
    """Kill the broker, then a run; returns how many utterances it reported meanwhile."""
    run = await stage.start()
    await run.reports(1)
    await stage.broker.kill()
    before = len(run.reported)
    await run.reports(before + 3)
    await run.kill()
    return len(run.reported) - before


async def stop_broker(stage: Stage) -> str:
    """The broker's process stands still: connections stay open, nothing is answered."""
    run = await stage.start()
    await run.reports(2)
    stage.broker.signal(signal.SIGSTOP)
    await run.reports(5)
    stage.broker.signal(signal.SIGCONT)
    await run.ends(0)
    return "SIGSTOP after 2, SIGCONT after 5"


async def silent_broker(stage: Stage) -> str:
    """Something accepts connections and never answers."""
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await stage.refused(f"mqtt://127.0.0.1:{port}")


async def refuse_user(stage: Stage) -> str:
    """The broker asks for a password."""
    async with other_broker(stage.folder / "guarded", "allow_anonymous false") as broker:
        return await stage.refused(f"mqtt://127.0.0.1:{broker.port}")


async def refuse_topic(stage: Stage) -> str:
    """The broker's rules forbid the topic of utterances, until they are corrected."""
    rules = stage.folder / "rules"
    written = [f"topic write stream_hbaf/+/{name}" for name in ALLOWED]
    rules.write_text("\n".join(["topic read #", *written, ""]))
    rules.chmod(0o700)
    await stage.broker.kill()
    port = stage.broker.port
    stage.broker.configure(f"acl_file {rules}", "allow_anonymous true")
    await restart(stage.broker, stage.received)
    run = await stage.start("--set", "mqtt.version=5")
    await run.ends(0)
    said = run.line_with("utterance").removeprefix("stream-hbaf: ")
    await stage.broker.kill()
    rules.write_text("topic readwrite #\n")
    await restart(stage.broker, stage.received)
    await stage.deliver()
    return said.replace(f"mqtt://127.0.0.1:{port}: ", "")


async def tls(stage: Stage) -> str:
    """A broker without TLS where it is expected, and one whose certificate nobody knows."""
    from mosquitto import make_certificates

    said = [await stage.refused(f"mqtts://127.0.0.1:{stage.broker.port}")]
    made = make_certificates(stage.folder)
    settings = (f"certfile {made.localhost}", f"keyfile {made.key}", "allow_anonymous true")
    async with other_broker(stage.folder / "tls", *settings) as broker:
        said.append(await stage.refused(f"mqtts://localhost:{broker.port}"))
    return " | ".join(said)


async def damaged_state(stage: Stage) -> str:
    """What the state directory holds is damaged between two runs."""
    left = await leave(stage)
    stage.excused |= set(stage.reported)
    for path in (stage.folder / "stream_hbaf").glob("*.sqlite*"):
        path.write_bytes(damage(path.read_bytes(), seed=8))
    await restart(stage.broker, stage.received)
    run = await stage.start()
    await run.ends(0)
    named = run.line_with("damaged").removeprefix("stream-hbaf: ")
    found = len(stage.excused & set(stage.received.ends))
    return f"{found} of {len(stage.excused)} before the damage, {left} in the outbox: {named}"


async def two_instances(stage: Stage) -> str:
    """Two runs have one state directory and one name, and are both killed without a broker."""
    runs = [await stage.start() for _ in range(2)]
    for run in runs:
        await run.reports(1)
    await stage.broker.kill()
    for run in runs:
        await run.reports(4)
        await run.kill()
    await restart(stage.broker, stage.received)
    await stage.deliver()
    return "both killed after 4; the next run delivers both outboxes"


async def clock(stage: Stage) -> str:
    """The clock is set while a run is under way: 400 days on, as after a boot without one."""
    offset = stage.folder / "offset"
    offset.write_text(LONG_AGO)
    run = await stage.start(environ=false_clock(offset))
    await run.reports(1)
    await stage.broker.kill()
    await run.reports(3)
    offset.write_text("+0")
    await run.reports(5)
    await run.kill()
    await restart(stage.broker, stage.received)
    await stage.deliver()
    return f"{LONG_AGO} until 3 utterances are in the outbox, then right; the next run delivers"


async def full_disk(stage: Stage) -> str:
    """The disk of state and recording is full, and the broker goes away and comes back."""
    folder = stage.folder / "small"
    with small_disk(folder, f"size={SMALL_KB}k") as mounted:
        limit = None if mounted else limit_files
        run = await stage.start("--record", str(folder / "r"), state=folder, limit=limit)
        await run.reports(1)
        if mounted:
            fill(folder / "rest")
        await stage.broker.kill()
        await run.reports(4)
        await restart(stage.broker, stage.received)
        await run.ends(0)
        how = f"a disk of {SMALL_KB} kB" if mounted else "files limited by RLIMIT_FSIZE"
        return f"{how}: {run.line_with('No space' if mounted else 'large').split(': ', 1)[1]}"


async def read_only(stage: Stage) -> str:
    """The state directory can't be written."""
    folder = stage.folder / "locked"
    with small_disk(folder, "ro,size=64k") as mounted:
        folder.chmod(0o500) if not mounted else None
        run = await stage.start(state=folder)
        await run.reports(2)
        await stage.broker.kill()
        await run.reports(4)
        await restart(stage.broker, stage.received)
        await run.ends(0)
        return run.line_with("Read-only" if mounted else "denied").split(": ", 1)[1]


async def memory(stage: Stage) -> str:
    """The system gives a run no more memory."""
    run = await stage.start()
    await run.reports(2)
    limit_memory(run.child.pid)
    status = await run.child.wait()
    said = run.last_line
    await stage.deliver()
    return f"status {status} after {len(run.reported)} utterances: {said}"


async def hostile_messages(stage: Stage) -> str:
    """Anybody publishes anything, also as requests, while a run and ``watch`` are connected."""
    watching = await stage.command("watch", "--json", "--mqtt", stage.url)
    run = await stage.start()
    await until(lambda: watching.printed > 0)
    async with aiomqtt.Client("127.0.0.1", stage.broker.port) as client:
        sent = hostile(stage.folder)
        for topic, payload in sent:
            await client.publish(topic, payload, qos=1)
    await run.ends(0)
    await until(lambda: watching.printed > len(sent) or watching.child.returncode is not None)
    watching.child.send_signal(signal.SIGINT)
    await watching.ends(0)
    return f"{len(sent)} messages; watch printed {watching.printed} lines, and both went on"


def hostile(folder: Path) -> list[tuple[str, bytes]]:
    """Messages for topics of a run, as the fuzzer has them."""
    messages, found = Messages(folder), []
    for seed in range(HOSTILE):
        messages.write(seed)
        topic = messages.message.topic.replace("p/n/m/utterance", "p/n/m/partial")
        topic = topic.replace("p/n/m/", "p/n/file/").replace("p/n/", "stream_hbaf/soak/")
        if topic.isprintable() and topic.startswith("stream_hbaf"):
            found.append((topic, messages.message.payload))
    return found


def false_clock(offset: Path) -> dict[str, str]:
    """The environment of a program whose clock is wrong by what a file holds. Raises Skipped."""
    if not (faketime := shutil.which("faketime")):
        raise Skipped("faketime is not installed; apt-get install faketime")
    command = [faketime, "-f", "+0d", "sh", "-c", "echo $LD_PRELOAD"]
    library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_CACHE_DURATION": "1",
    }


def limit_memory(process: int) -> None:
    """Let a process allocate next to nothing more."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.prlimit(process, resource.RLIMIT_AS, (limit, limit))


def fill(path: Path) -> None:
    """Take what is left of a disk."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(b"\0" * 1024):
            ...


def limit_files() -> None:
    """No file may become larger than this; the outbox's need more."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[bool]:
    """A folder that is a disk of its own, in memory, if this user may mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.asynccontextmanager
async def other_broker(folder: Path, *settings: str) -> AsyncIterator[Broker]:
    """A running broker with other settings."""
    broker = Broker(folder)
    broker.configure(*settings)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.kill()


Drill = Callable[[Stage], Awaitable[str]]
DRILLS: tuple[Drill, ...] = (
    *(kill, kill_broker, kill_both, stop_broker, silent_broker, refuse_user, refuse_topic, tls),
    *(damaged_state, two_instances, clock, full_disk, read_only, memory, hostile_messages),
)
