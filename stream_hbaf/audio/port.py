"""Opens ports to listen on, which bound the connections of each peer and of all.

Anybody who can reach a port can open connections to it. Without a bound they take all of the
process's file descriptors, and the recogniser can neither publish nor log.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from typing import Any

LOG = logging.getLogger(__name__)

MOST_CONNECTIONS = 128  # to one port; a process may have 1,024 descriptors, on some systems 256
# From one address. All who come through a proxy on this machine have its address: no bound for it.
MOST_OF_PEER = 32
FIRST_S = 10.0  # for a new connection to send a whole request
BACKLOG = 128
COMPLAIN_EVERY_S = 60.0
SHED_S = 0.5
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

Peer = tuple[Any, ...]  # the address of a connection's other end


class Port(socket.socket):
    """A listening socket with limits, for an asyncio server.

    A connection that hasn't been declared established within ``FIRST_S`` is ended. A new one beyond
    the limits takes the place of the oldest of these, else it is refused; both is logged once a
    minute.
    """

    def __init__(self, name: str, family: int, *, most: int, most_of_peer: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._name = name
        self._most, self._most_of_peer = most or MOST_CONNECTIONS, most_of_peer or MOST_OF_PEER
        self._connections: dict[Peer, _Connection] = {}
        self._complain_at = 0.0
        self._paused_until = 0.0
        self._spare = os.open(os.devnull, os.O_RDONLY)  # closed to accept, and refuse, the last one

    def accept(self) -> tuple[socket.socket, Peer]:
        """Called by asyncio; BlockingIOError tells it that there is no connection now."""
        if time.monotonic() < self._paused_until:
            raise BlockingIOError
        try:
            descriptor, peer = self._accept()  # type: ignore[attr-defined]  # as in socket.accept
        except (BlockingIOError, InterruptedError):
            raise
        except OSError as error:
            self._complain(f"can't accept connections ({error.strerror})")
            if error.errno in EXHAUSTED:
                self._shed()
            raise BlockingIOError from None
        connection = _Connection(self, peer, descriptor)
        if self._is_beyond(connection):
            connection.close()
            raise BlockingIOError
        return connection, peer

    def _is_beyond(self, newest: "_Connection") -> bool:
        """Whether a connection is refused, since there is none to end for it."""
        rivals = [one for one in self._connections.values() if one is not newest]
        crowd = [one for one in rivals if one.host == newest.host]
        if len(crowd) >= self._most_of_peer and not _is_local(newest.host):
            rivals, whose = crowd, f" from {newest.host}"
        elif len(rivals) >= self._most:
            whose = ""
        else:
            return False
        self._complain(f"too many connections{whose}")
        oldest = next((one for one in rivals if one.is_waiting), None)
        if oldest is None or len(self._connections) > 2 * self._most:
            return True
        oldest.end()
        return False

    def establish(self, peer: Peer | None) -> None:
        """A connection has sent what its protocol asks for first: it may stay."""
        connection = self._connections.get(peer or ())
        if connection is not None:
            connection.stop_waiting()

    def close(self) -> None:
        """Stop listening; connections stay."""
        super().close()
        self._close_spare()

    def add(self, connection: "_Connection") -> None:
        """Count a connection."""
        self._connections[connection.peer] = connection

    def remove(self, connection: "_Connection") -> None:
        """A connection has been closed."""
        self._connections.pop(connection.peer, None)

    def _shed(self) -> None:
        """Accept one connection and close it, since it would be announced for ever.

        Raises OSError if that isn't possible either: asyncio asks again after a second, and logs
        that each time it is raised.
        """
        self._paused_until = time.monotonic() + SHED_S
        self._close_spare()
        try:
            descriptor, _ = self._accept()  # type: ignore[attr-defined]
            os.close(descriptor)
            self._paused_until = 0.0
        finally:
            with contextlib.suppress(OSError):  # another thread was faster
                self._spare = os.open(os.devnull, os.O_RDONLY)

    def _close_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
        self._spare = -1

    def _complain(self, reason: str) -> None:
        now = time.monotonic()
        if now >= self._complain_at:
            self._complain_at = now + COMPLAIN_EVERY_S
            LOG.warning("%s: %s; some are refused for now", self._name, reason)


class _Connection(socket.socket):
    """An accepted connection, counted until it is closed."""

    def __init__(self, port: Port, peer: Peer, descriptor: int) -> None:
        super().__init__(port.family, port.type, port.proto, fileno=descriptor)
        self.peer = peer
        self.host = str(peer[0]) if peer else ""
        self.is_waiting = True  # for its first request
        self._port = port
        self._timer = asyncio.get_running_loop().call_later(FIRST_S, self.end)
        port.add(self)

    def stop_waiting(self) -> None:
        """It may stay."""
        self.is_waiting = False
        self._timer.cancel()

    def end(self) -> None:
        """End the stream in both directions: its owner notices, and closes it."""
        self.stop_waiting()
        with contextlib.suppress(OSError):  # the peer has hung up already
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it; called by asyncio."""
        self.stop_waiting()
        self._port.remove(self)
        super().close()


async def open_port(
    name: str,
    host: str,
    port: int,
    *,
    most: int = 0,
    most_of_peer: int = 0,
) -> Port:
    """Listen on an address; ``port`` 0 is any free one. Raises OSError if that can't be done.

    ``most`` connections are taken at once, ``most_of_peer`` from one address of another machine; 0:
    as many as ``MOST_CONNECTIONS`` and ``MOST_OF_PEER``.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # A name such as localhost has several: IPv4 is what all clients try.
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    opened = Port(name, family, most=most, most_of_peer=most_of_peer)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(address)
        opened.listen(BACKLOG)
        opened.setblocking(False)
    except BaseException:
        opened.close()
        raise
    return opened


def enable_keepalive(connection: socket.socket) -> None:
    """Have the system detect a dead peer, which would otherwise stay connected."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # seconds, seconds, times
    options["TCP_USER_TIMEOUT"] = 25_000  # ms: what is sent is not received for so long
    for option, value in options.items():
        if hasattr(socket, option):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _is_local(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "")
