"""Where emotions go when nobody runs a broker: one on this machine, inside the recogniser."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from amqtt.broker import Broker
from amqtt.errors import BrokerError as NotStarted

from stream_hbaf.errors import BrokerError
from stream_hbaf.publish.address import Address
from stream_hbaf.publish.connection import speaks_mqtt

LOOPBACK = "127.0.0.1"  # anybody may connect, so nobody from outside may
GRACE_S = 30  # amqtt cuts a client off after exactly its keepalive, before most have pinged
FORWARD_S = 0.2  # amqtt acknowledges before it forwards, and forgets what it hasn't forwarded
SHUTDOWN_S = 1.0


@dataclass(frozen=True, slots=True)
class LocalBroker:
    url: str
    started: bool  # False: the broker was already there


@contextlib.asynccontextmanager
async def embedded_broker(port: int) -> AsyncIterator[LocalBroker]:
    """A broker on this machine: our own, or the one that already listens at the port.

    Ours speaks MQTT 3.1.1, keeps nothing on disk, and lives as long as the context: leave it
    after the publisher has said goodbye. Raises BrokerError if something else has the port.
    """
    url = f"mqtt://{LOOPBACK}:{port}"
    if not _is_free(port):
        if not await speaks_mqtt(Address(LOOPBACK, port)):
            raise BrokerError(_taken(port))
        yield LocalBroker(url, started=False)
        return
    for name in ("amqtt", "transitions"):  # they report each client that hangs up
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    broker = Broker(_settings(port))
    try:
        await broker.start()
    except NotStarted as error:  # somebody was quicker
        raise BrokerError(_taken(port)) from error
    try:
        yield LocalBroker(url, started=True)
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_S):
                await asyncio.sleep(FORWARD_S)
                await broker.shutdown()


def _settings(port: int) -> dict[str, Any]:
    return {
        "listeners": {"default": {"type": "tcp", "bind": f"{LOOPBACK}:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        "timeout_disconnect_delay": GRACE_S,
    }


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed ones don't count
        try:
            probe.bind((LOOPBACK, port))
        except PermissionError:
            raise BrokerError(
                f"mqtt.port: {port} needs root; choose one above 1023 with --set mqtt.port=PORT"
            ) from None
        except OSError:
            return False
    return True


def _taken(port: int) -> str:
    return (
        f"mqtt.port: port {port} is taken by something that is not an MQTT broker; choose another "
        "with --set mqtt.port=PORT, or use --mqtt mqtt://HOST or --mqtt none"
    )
