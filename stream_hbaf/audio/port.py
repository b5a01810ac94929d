"""Opens ports to listen on, which bound the connections of each peer and of all.

Anybody who can reach a port can open connections to it. Without a bound they take all of the
process's file descriptors, and the recogniser can neither publish nor log.
"""

import asyncio
import errno
import logging
import os
import socket
import time
from collections import Counter
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
    """A listening socket that refuses connections beyond the limits, for an asyncio server.

    A connection that hasn't been declared established within ``FIRST_S`` is ended. Refusals are
    logged once a minute.
    """

    def __init__(self, name: str, family: int) -> None:
        super().__init__(family, socket.SOCK_STREAM)
        self._name = name
        self._connections: dict[Peer, _Connection] = {}
        self._peers: Counter[str] = Counter()
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
        host = str(peer[0]) if peer else ""
        is_crowd = self._peers[host] > MOST_OF_PEER and not _is_local(host)
        if is_crowd or len(self._connections) > MOST_CONNECTIONS:
            self._complain(f"too many connections{f' from {host}' if is_crowd else ''}")
            connection.close()
            raise BlockingIOError
        return connection, peer

    def establish(self, peer: Peer | None) -> None:
        """A connection has sent what its protocol asks for first: it may stay."""
        connection = self._connections.get(peer or ())
        if connection is not None:
            connection.timer.cancel()

    def close(self) -> None:
        """Stop listening; connections stay."""
        super().close()
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    def count(self, connection: "_Connection", *, is_open: bool) -> None:
        """Count a connection that has been opened or closed."""
        host = str(connection.peer[0]) if connection.peer else ""
        if is_open:
            self._connections[connection.peer] = connection
            self._peers[host] += 1
        elif self._connections.pop(connection.peer, None) is not None:
            self._peers[host] -= 1
            if not self._peers[host]:
                del self._peers[host]

    def _shed(self) -> None:
        """Accept one connection and close it, since it would be announced for ever.

        Raises OSError if that isn't possible either: asyncio asks again after a second, and logs
        that each time it is raised.
        """
        self._paused_until = time.monotonic() + SHED_S
        os.close(self._spare)
        try:
            descriptor, _ = self._accept()  # type: ignore[attr-defined]
            os.close(descriptor)
            self._paused_until = 0.0
        finally:
            self._spare = os.open(os.devnull, os.O_RDONLY)

    def _complain(self, reason: str) -> None:
        now = time.monotonic()
        if now >= self._complain_at:
            self._complain_at = now + COMPLAIN_EVERY_S
            LOG.warning("%s: %s; new ones are refused for now", self._name, reason)


class _Connection(socket.socket):
    """An accepted connection, counted until it is closed."""

    def __init__(self, port: Port, peer: Peer, descriptor: int) -> None:
        super().__init__(port.family, port.type, port.proto, fileno=descriptor)
        self.peer = peer
        self._port = port
        self.timer = asyncio.get_running_loop().call_later(FIRST_S, self._end)
        port.count(self, is_open=True)

    def _end(self) -> None:
        # Its owner sees the end of the stream, and closes it.
        try:
            self.shutdown(socket.SHUT_RDWR)
        except OSError:
            LOG.debug("%s has hung up already", self.peer)

    def close(self) -> None:
        """Close it; called by asyncio."""
        self.timer.cancel()
        self._port.count(self, is_open=False)
        super().close()


async def open_port(name: str, host: str, port: int) -> Port:
    """Listen on an address; ``port`` 0 is any free one. Raises OSError if that can't be done."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # A name such as localhost has several: IPv4 is what all clients try.
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    opened = Port(name, family)
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


def _is_local(host: str) -> bool:
    return host.startswith("127.") or host in ("::1", "")
