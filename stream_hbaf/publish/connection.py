"""Connections to an MQTT broker: opening, publishing, subscribing, and their errors."""

import asyncio
import contextlib
import logging
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiomqtt
from aiomqtt import MqttCodeError, MqttError, ProtocolVersion, Will
from paho.mqtt.client import DisconnectFlags
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import BrokerError, printable
from stream_hbaf.publish.address import Address, read_address
from stream_hbaf.publish.messages import Message
from stream_hbaf.publish.reachable import CONNECT_TIMEOUT_S, check_reachable, tls_context

__all__ = ["MqttError"]  # no other file imports aiomqtt

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
WRONG_PASSWORD, NOT_AUTHORIZED = 134, 135
KEEPALIVE_TIMEOUT, PACKET_TOO_LARGE = 141, 149
NO_RETAIN, NO_QOS_1 = 154, 155
IN_USE, QUOTA_EXCEEDED = 145, 151  # these may pass by themselves
LARGEST_PACKET = 268_435_460  # bytes: what MQTT's length field can say, and the field itself

# Errors are reported in one line here; the client would log them with tracebacks.
SILENT = logging.Logger("mqtt", level=logging.CRITICAL + 1)

LACKING = {
    NO_RETAIN: "keeps no retained messages, which are needed; "
    "allow them at the broker (mosquitto: retain_available)",
    NO_QOS_1: "takes no messages with QoS 1, which are needed; "
    "allow them at the broker (mosquitto: max_qos)",
}


class HungUpError(MqttError):
    """The broker closed the connection instead of answering the request for one."""


class RefusedError(Exception):
    """The broker has answered that it does not take a message (MQTT 5)."""

    def __init__(self, code: ReasonCode) -> None:
        super().__init__(str(code))
        self.code = code.value
        self.passes = self.code in (IN_USE, QUOTA_EXCEEDED)


@dataclass(frozen=True, slots=True)
class Limits:
    """What an MQTT 5 broker says that it takes; others say nothing."""

    packet_size: int = LARGEST_PACKET
    in_flight: int = 65_535
    lacking: int = 0  # the reason code of what the recogniser needs and the broker lacks

    @classmethod
    def of(cls, properties: Properties | None) -> "Limits":
        """The limits in the properties of a CONNACK."""
        stated = vars(properties) if properties else {}
        lacks = [NO_RETAIN] * (stated.get("RetainAvailable") == 0)
        lacks += [NO_QOS_1] * (stated.get("MaximumQoS") == 0)
        return cls(
            packet_size=stated.get("MaximumPacketSize", LARGEST_PACKET),
            in_flight=stated.get("ReceiveMaximum", 65_535),
            lacking=lacks[0] if lacks else 0,
        )


class Client(aiomqtt.Client):
    """aiomqtt's client, and what that one ignores: what a broker allows, that it refuses a
    message, and how it ended the connection. Needs methods of aiomqtt 2 that begin with _."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.limits = Limits()
        self.ending = ""  # why the broker ended the connection, if it said so
        self.hung_up = False  # the broker ended the connection; it did not fall silent
        self._refused: dict[int, ReasonCode] = {}  # by the number of the message

    def _on_connect(
        self, client: Any, userdata: Any, flags: Any, reason_code: Any, properties: Any = None
    ) -> None:
        self.limits = Limits.of(properties)
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self,
        client: Any,
        userdata: Any,
        flags: DisconnectFlags,
        reason_code: ReasonCode,
        properties: Any = None,
    ) -> None:
        self.hung_up = reason_code.value != KEEPALIVE_TIMEOUT
        if flags.is_disconnect_packet_from_server:
            self.ending = str(reason_code)
        if self._lock.locked() and not self._connected.done():  # ``__aenter__`` waits for it
            self._connected.set_exception(HungUpError("hung up"))
        super()._on_disconnect(client, userdata, flags, reason_code, properties)

    def _on_publish(
        self, client: Any, userdata: Any, mid: int, reason_code: ReasonCode, properties: Any
    ) -> None:
        if reason_code.is_failure:
            self._refused[mid] = reason_code
        super()._on_publish(client, userdata, mid, reason_code, properties)

    @contextlib.contextmanager
    def _pending_call(self, mid: int, value: Any, pending_dict: dict[int, Any]) -> Iterator[None]:
        self._refused.pop(mid, None)
        with super()._pending_call(mid, value, pending_dict):
            yield
        if code := self._refused.pop(mid, None):
            raise RefusedError(code)


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
