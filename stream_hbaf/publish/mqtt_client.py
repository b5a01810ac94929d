"""aiomqtt's client, and what that one ignores: an MQTT 5 broker's limits and its refusals."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import aiomqtt
from paho.mqtt.client import DisconnectFlags
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

# Reason codes.
FAILURES = 128  # and above
NOT_AUTHORIZED = 135
KEEPALIVE_TIMEOUT = 141
TOPIC_INVALID, PACKET_TOO_LARGE, PAYLOAD_INVALID = 144, 149, 153
NO_RETAIN, NO_QOS_1 = 154, 155
IN_USE, QUOTA_EXCEEDED = 145, 151  # these may pass by themselves
LARGEST_PACKET = 268_435_460  # bytes: what MQTT's length field can say, and the field itself

LACKING = {
    NO_RETAIN: "keeps no retained messages, which are needed; "
    "allow them at the broker (mosquitto: retain_available)",
    NO_QOS_1: "takes no messages with QoS 1, which are needed; "
    "allow them at the broker (mosquitto: max_qos)",
}


class HungUpError(aiomqtt.MqttError):
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
    """The client. It overrides methods of aiomqtt 2 that are not public, as nothing public tells
    what a broker answers."""

    def __init__(self, *args: Any, **options: Any) -> None:
        _accept_all_refusals()
        super().__init__(*args, **options)
        self.limits = Limits()
        self.ending: ReasonCode | None = None  # why the broker ended the connection, if it said so
        self._fell_silent = False
        self._refused: dict[int, ReasonCode] = {}  # by the number of the message

    @property
    def hung_up(self) -> bool:
        """Whether the broker has ended the connection; not if it only answers no more."""
        return self._disconnected.done() and not self._fell_silent

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
        self._fell_silent = reason_code.value == KEEPALIVE_TIMEOUT
        if flags.is_disconnect_packet_from_server:
            self.ending = reason_code
        if self._lock.locked() and not self._connected.done():  # ``__aenter__`` waits for it
            self._connected.set_exception(HungUpError("hung up"))
        super()._on_disconnect(client, userdata, flags, reason_code, properties)

    def _on_publish(
        self, client: Any, userdata: Any, mid: int, reason_code: ReasonCode, properties: Any
    ) -> None:
        if reason_code.is_failure:
            self._refused[mid] = reason_code
        super()._on_publish(client, userdata, mid, reason_code, properties)

    def _on_socket_register_write(self, client: Any, userdata: Any, sock: Any) -> None:
        """As aiomqtt's, which may be called in the thread that connects, and then adds a writer to
        a socket that a broker which refuses has closed meanwhile."""
        register = super()._on_socket_register_write

        def in_loop() -> None:
            if sock.fileno() >= 0:
                register(client, userdata, sock)

        self._loop.call_soon_threadsafe(in_loop)

    @contextlib.contextmanager
    def _pending_call(self, mid: int, value: Any, pending_dict: dict[int, Any]) -> Iterator[None]:
        self._refused.pop(mid, None)
        with super()._pending_call(mid, value, pending_dict):
            yield
        if code := self._refused.pop(mid, None):
            raise RefusedError(code)


@cache
def _accept_all_refusals() -> None:
    """Some brokers answer a publication with a code that the standard has for other packets, such
    as 149 (packet too large), which paho takes for a broken connection."""
    names = dict(ReasonCode.names)
    for code, (name, *_) in ReasonCode.names.items():
        packets = ReasonCode.names[code][name]
        if code >= FAILURES and PacketTypes.PUBACK not in packets:
            names[code] = {name: [*packets, PacketTypes.PUBACK]}
    ReasonCode.names = names
