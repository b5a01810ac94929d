"""An MQTT broker inside the recogniser, for machines that have none.

It listens on the loopback address only, asks for no password, speaks MQTT 3.1.1 and keeps nothing
on disk. Every account of this machine can read and publish there: so it takes a limited number of
clients and bytes, and nothing that a client does ends it or floods the log.
"""

import asyncio
import contextlib
import logging
import pwd
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import amqtt
from amqtt.adapters import StreamReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker
from amqtt.errors import AMQTTError, NoDataError
from amqtt.errors import BrokerError as NotStarted

from stream_hbaf.errors import BrokerError
from stream_hbaf.files import is_locked, lock_file, state_folder
from stream_hbaf.publish.address import Address
from stream_hbaf.publish.connection import speaks_mqtt

LOG = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"  # the broker asks for no password, so no other machine may reach it
MAX_CLIENTS = 100  # at once, connections that haven't said what they want included
MAX_PACKET = 16 * 2**20  # bytes; MQTT allows 256 MiB, which would be held in memory
CONNECT_S = 10.0  # within which a client says that it speaks MQTT
GRACE_S = 30  # amqtt cuts a client off after exactly its keepalive, before most have pinged
FORWARD_S = 0.2  # amqtt acknowledges before it forwards, and forgets what it hasn't forwarded
SHUTDOWN_S = 1.0
UNAVAILABLE = bytes([0x20, 2, 0, 3])  # a CONNACK
LISTEN = "0A"  # a socket's state in /proc/net/tcp


@dataclass(frozen=True, slots=True)
class LocalBroker:
    """A broker that listens on the loopback address."""

    url: str
    started: bool  # False: another stream-hbaf of this user runs it


def broker_lock(port: int) -> Path:
    """The file that is locked by the process whose embedded broker has this port."""
    return state_folder() / f"broker-{port}.lock"


@contextlib.asynccontextmanager
async def embedded_broker(port: int) -> AsyncIterator[LocalBroker]:
    """Run a broker at 127.0.0.1, or share the one that another stream-hbaf runs at this port.

    The broker ends with the context: close the publisher first. A running broker is recognised
    as ours by a lock file in the state folder of the user. Raises BrokerError if anything else
    listens at the port, another program's broker included: it may be open to the network.
    """
    url, lock = f"mqtt://{LOOPBACK}:{port}", broker_lock(port)
    broker = await _start(port)
    if broker is None:
        is_broker = await speaks_mqtt(Address(LOOPBACK, port))
        if not is_broker or not is_locked(lock):
            raise BrokerError(_refusal(port, is_broker=is_broker))
        yield LocalBroker(url, started=False)
        return
    try:
        with contextlib.ExitStack() as held:
            held.enter_context(_quiet_tasks())
            # Without a state folder the broker runs all the same; nobody shares it then.
            with contextlib.suppress(OSError):
                lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                if opened := lock_file(lock):
                    held.enter_context(opened)
            yield LocalBroker(url, started=True)
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_S):
                await asyncio.sleep(FORWARD_S)
                await broker.shutdown()


class _Reader(StreamReaderAdapter):  # type: ignore[misc]  # amqtt has no types
    """Reads packets of a limited size; the connection of a larger one is closed."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader)
        self._writer = writer

    async def read(self, n: int = -1) -> bytes:
        if n > MAX_PACKET:
            self._writer.close()
            raise NoDataError(f"a packet of {n} bytes")
        content: bytes = await super().read(n)
        return content


class _Writer(StreamWriterAdapter):  # type: ignore[misc]
    """Writes nothing to a client that has gone: asyncio would log that."""

    def write(self, data: bytes) -> None:
        if not self._writer.is_closing():
            super().write(data)


class _Broker(Broker):  # type: ignore[misc]
    """amqtt's broker, with limits, and without errors that are the clients'."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self._clients = 0

    async def stream_connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
    ) -> None:
        self._clients += 1
        try:
            if self._clients <= MAX_CLIENTS:
                await self._client_connected(
                    listener_name, _Reader(reader, writer), _Writer(writer)
                )
            else:
                writer.write(UNAVAILABLE)
        except Exception:  # whatever a client sends, or if it vanishes: amqtt may fail anywhere
            LOG.debug("a client of the embedded broker failed", exc_info=True)
        except asyncio.CancelledError:
            # The program ends before the client has gone. This coroutine is a task of its own, and
            # asyncio before 3.12 prints a traceback for one that was cancelled.
            LOG.debug("a client of the embedded broker was still connected at the end")
        finally:
            self._clients -= 1
            writer.close()

    async def _initialize_client_session(self, *connection: Any) -> Any:
        """Await the first packet, from which the session is made."""
        try:
            async with asyncio.timeout(CONNECT_S):
                return await super()._initialize_client_session(*connection)
        except TimeoutError:
            raise AMQTTError("no CONNECT came") from None


@contextlib.contextmanager
def _quiet_tasks() -> Iterator[None]:
    """amqtt leaves tasks that failed because their client has gone: they are no errors of ours."""
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        task = context.get("future") or context.get("task")
        code = getattr(task.get_coro(), "cr_code", None) if isinstance(task, asyncio.Task) else None
        if code and Path(amqtt.__file__).parent in Path(code.co_filename).parents:
            LOG.debug("%s", context.get("message"), exc_info=context.get("exception"))
        elif before:
            before(loop, context)
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
    try:
        yield
    finally:
        loop.set_exception_handler(before)


async def _start(port: int) -> Broker | None:
    """A broker that runs; None if the port is taken."""
    for name in ("amqtt", "transitions"):  # they log an error for each client that hangs up
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    anonymous = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    settings = {
        "listeners": {"default": {"type": "tcp", "bind": f"{LOOPBACK}:{port}"}},
        "plugins": anonymous,
        "timeout_disconnect_delay": GRACE_S,
    }
    broker = _Broker(settings)
    try:
        await broker.start()
    except NotStarted as error:
        if isinstance(error.__cause__, PermissionError):
            raise BrokerError(
                f"mqtt.port: {port} needs root; choose one above 1023 with --set mqtt.port=PORT"
            ) from None
        return None
    return broker


def _refusal(port: int, *, is_broker: bool) -> str:
    """Who has the port, and what to do about it, in one line."""
    known = ", ".join(_listener(port))
    who = f" ({known})" if known else ""
    if is_broker:
        return (
            f"mqtt.port: port {port} is taken by another program's MQTT broker{who}, which other "
            f"machines may read; to publish there use --mqtt mqtt://{LOOPBACK}:{port}, else "
            "choose another port with --set mqtt.port=PORT, or --mqtt none"
        )
    return (
        f"mqtt.port: port {port} is taken by something that is not an MQTT broker{who}; choose "
        "another with --set mqtt.port=PORT, or use --mqtt mqtt://HOST or --mqtt none"
    )


def _listener(port: int) -> list[str]:
    """The program and the user that listen at a port, as far as Linux shows them to this user."""
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with contextlib.suppress(OSError):
            for line in table.read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()  # 1: local address, 3: state, 7: user, 9: inode
                if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == LISTEN:
                    return [*_program(fields[9]), f"user {_user_name(int(fields[7]))}"]
    return []


def _program(inode: str) -> list[str]:
    """The name and the process id of the program that holds a socket; none if that is hidden."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if str(descriptor.readlink()) == f"socket:[{inode}]":
                process = descriptor.parent.parent
                name = (process / "comm").read_text(encoding="utf-8").strip()
                return [f"{name}, process {process.name}"]
    return []


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
