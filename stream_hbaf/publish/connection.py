"""Connections to an MQTT broker: opening, publishing, subscribing, and their errors."""

import asyncio
import contextlib
import logging
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from aiomqtt import MqttCodeError, MqttError, ProtocolVersion, Will
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import BrokerError, printable
from stream_hbaf.publish.address import Address, node_name, read_address
from stream_hbaf.publish.messages import Message, available
from stream_hbaf.publish.mqtt_client import (
    LACKING,
    NO_QOS_1,
    NO_RETAIN,
    NOT_AUTHORIZED,
    Client,
    HungUpError,
)
from stream_hbaf.publish.reachable import CONNECT_TIMEOUT_S, check_reachable, tls_context

__all__ = ["Client", "MqttError"]  # few files import aiomqtt

# Called with whether the broker is connected, and a line for people.
OnConnectionStatus = Callable[[bool, str], None]

ACKNOWLEDGE_TIMEOUT_S = 10.0  # after that the connection counts as lost
KEEPALIVE_S = 15  # also how long an abandoned connection attempt keeps its socket
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
STEADY_S = 5.0  # a connection that lasted as long is no sign of a broker that hangs up at once
INCOMING_LIMIT = 10_000  # received messages that wait to be read

# Without it Nagle's algorithm delays a message that follows another at once by up to 40 ms.
NO_DELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

PROTOCOLS = {"3.1.1": ProtocolVersion.V311, "5": ProtocolVersion.V5}
UTF_8 = 1  # MQTT 5's payload format indicator
LONGEST_PROPERTY = 200  # characters
SUBSCRIPTION_REFUSED = 0x80
UNKNOWN_VERSION = 132  # reason codes, as paho maps CONNACK 1, 4 and 5
WRONG_PASSWORD = 134

# Errors are reported in one line here; the client would log them with tracebacks.
SILENT = logging.Logger("mqtt", level=logging.CRITICAL + 1)


@dataclass(frozen=True, slots=True)
class Received:
    """A message from the broker."""

    topic: str
    payload: bytes
    retained: bool  # it was published before the subscription
    # MQTT 5 only:
    response_topic: str = ""  # where the sender expects the response
    correlation: bytes = b""  # correlation data to return with the response


def backoff() -> Iterator[float]:
    """The seconds to wait before each attempt: exponential backoff with jitter, without end."""
    delay_s = FIRST_DELAY_S
    while True:
        yield delay_s * random.uniform(0.5, 1.0)
        delay_s = min(2 * delay_s, LONGEST_DELAY_S)


async def open_client(config: MqttConfig, *, will: Message | None = None) -> Client:
    """A connected client; ``will`` is its last will.

    Raises BrokerError if the broker can't be reached, refuses, or lacks what a publisher needs,
    ConfigError for wrong settings.
    """
    address = read_address(config)
    context = await asyncio.to_thread(tls_context, config) if address.tls else None
    await check_reachable(address, context)
    try:
        client = await _connected(config, address, context, will=will)
    except MqttError as error:
        reason = _explain_refusal(error, config.username or address.username)
        if will and isinstance(error, HungUpError):
            reason = await _explain_hang_up(config, address, context, will=will) or reason
        raise BrokerError(f"{address}: {reason}") from None
    if will and client.limits.lacking:
        await close_client(client)
        raise BrokerError(f"{address}: {LACKING[client.limits.lacking]}")
    return client


async def check_broker(config: MqttConfig) -> None:
    """Connect as a publisher does, and disconnect. Raises BrokerError or ConfigError."""
    will = available("offline", prefix=config.prefix, node=node_name(config))
    await close_client(await open_client(config, will=will))


async def _connected(
    config: MqttConfig,
    address: Address,
    context: ssl.SSLContext | None,
    *,
    will: Message | None,
) -> Client:
    """A connected client. Raises MqttError."""
    is_ipv6 = ":" in address.host  # then paho makes a header that is not valid
    client = Client(
        hostname=address.host,
        port=address.port,
        username=config.username or address.username,
        password=config.password.get_secret_value() if config.password else None,
        logger=SILENT,
        protocol=PROTOCOLS[config.version],
        transport="tcp" if address.path is None else "websockets",
        websocket_path=address.path,
        websocket_headers={"Host": address.authority} if is_ipv6 else None,
        will=_last_will(will, version=config.version) if will else None,
        timeout=CONNECT_TIMEOUT_S,
        keepalive=KEEPALIVE_S,
        max_queued_incoming_messages=INCOMING_LIMIT,
        socket_options=[NO_DELAY],
        tls_context=context,
    )
    await client.__aenter__()
    return client


async def _explain_hang_up(
    config: MqttConfig, address: Address, context: ssl.SSLContext | None, *, will: Message
) -> str:
    """What of the last will makes the broker hang up; "" if it is not the will.

    With MQTT 3.1.1 a broker can't say that it keeps no retained messages, or allows no QoS 1.
    """
    for tried, code in ((replace(will, retain=False), NO_RETAIN), (replace(will, qos=0), NO_QOS_1)):
        with contextlib.suppress(MqttError):
            await close_client(await _connected(config, address, context, will=tried))
            return LACKING[code]
    with contextlib.suppress(MqttError):
        await close_client(await _connected(config, address, context, will=None))
        return f"hangs up at the last will, {will.topic}; check its access rules and its settings"
    return ""


async def close_client(client: Client) -> None:
    """Disconnect; a connection that is broken already is no error."""
    with contextlib.suppress(MqttError):
        await client.__aexit__(None, None, None)


async def publish(client: Client, message: Message, *, version: str) -> None:
    """Publish a message; returns when it is acknowledged (QoS 1) or sent (QoS 0).

    Raises RefusedError when the broker answers that it does not take the message, MqttError when
    the connection breaks, or the acknowledgement takes too long.
    """
    await client.publish(
        message.topic,
        message.payload,
        qos=message.qos,
        retain=message.retain,
        properties=_properties(message, version=version),
        timeout=ACKNOWLEDGE_TIMEOUT_S,
    )


def packet_size(message: Message, *, version: str) -> int:
    """The bytes of a message as it is sent, its topic and properties included."""
    properties = _properties(message, version=version)
    rest = 2 + len(message.topic.encode()) + (2 if message.qos else 0) + len(message.payload)
    rest += len(properties.pack()) if properties else 0  # type: ignore[no-untyped-call]
    return 1 + max(1, (rest.bit_length() + 6) // 7) + rest  # 7 bits of the length a byte


async def subscribe_to(client: Client, topics: Sequence[str]) -> bool:
    """Subscribe with QoS 1; returns whether the broker grants all of the topics."""
    if not topics:
        return True
    codes = await client.subscribe([(topic, 1) for topic in topics])
    numbers = (code if isinstance(code, int) else code.value for code in codes)
    return all(number < SUBSCRIPTION_REFUSED for number in numbers)


async def receive(client: Client) -> AsyncIterator[Received]:
    """Messages as they arrive. Raises MqttError when the connection breaks."""
    async for message in client.messages:
        properties = message.properties
        yield Received(
            str(message.topic),
            message.payload if isinstance(message.payload, bytes) else b"",
            retained=message.retain,
            response_topic=getattr(properties, "ResponseTopic", ""),
            correlation=getattr(properties, "CorrelationData", b""),
        )


async def speaks_mqtt(address: Address) -> bool:
    """Whether an MQTT broker answers at the address; one that refuses counts too."""
    client = Client(address.host, address.port, logger=SILENT, timeout=2.0, keepalive=KEEPALIVE_S)
    try:
        await client.__aenter__()
    except MqttError as error:
        return isinstance(error, MqttCodeError)
    await close_client(client)
    return True


def _last_will(will: Message, *, version: str) -> Will:
    properties = _properties(will, version=version, packet=PacketTypes.WILLMESSAGE)
    return Will(will.topic, will.payload, will.qos, will.retain, properties)


def _properties(
    message: Message, *, version: str, packet: int = PacketTypes.PUBLISH
) -> Properties | None:
    """MQTT 5 properties of a message; none with version 3.1.1."""
    if version != "5":
        return None
    properties = Properties(packet)  # type: ignore[no-untyped-call]  # paho has no types there
    if message.payload:
        properties.PayloadFormatIndicator = UTF_8
        is_json = message.payload.startswith(b"{")
        properties.ContentType = "application/json" if is_json else "text/plain"
    if message.expires_s is not None:
        properties.MessageExpiryInterval = message.expires_s
    if message.correlation:
        properties.CorrelationData = message.correlation
    if message.properties:
        # Brokers disconnect clients that send control characters in a property.
        plain = [(name, printable(value)[:LONGEST_PROPERTY]) for name, value in message.properties]
        properties.UserProperty = plain
    return properties


def _explain_refusal(error: MqttError, username: str | None) -> str:
    code = getattr(getattr(error, "rc", None), "value", None)
    if code in (WRONG_PASSWORD, NOT_AUTHORIZED):
        if username is None:
            return "asks for a user; set mqtt.username and STREAM_HBAF_MQTT__PASSWORD"
        return (
            f"refuses user '{username}' or the password; "
            "check mqtt.username and STREAM_HBAF_MQTT__PASSWORD"
        )
    if code == UNKNOWN_VERSION:
        return "does not speak this version of MQTT; set mqtt.version to 3.1.1"
    if code in LACKING:
        return LACKING[code]
    if code is not None:
        return f"the broker refuses ({error}); check its settings"
    return (
        "listens, but does not answer as an MQTT broker; "
        "check the port, mqtt:// or mqtts://, the path of ws://, and mqtt.certificate"
    )
