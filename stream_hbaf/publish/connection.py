"""Connections to an MQTT broker: addresses, opening, publishing, subscribing, and their errors."""

import asyncio
import contextlib
import logging
import random
import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from aiomqtt import Client, MqttCodeError, MqttError, ProtocolVersion, Will
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import BrokerError, ConfigError, printable
from stream_hbaf.publish.messages import Message

__all__ = ["Client", "MqttError"]  # no other file imports aiomqtt

# Called with whether the broker is connected, and a line for people.
OnConnectionStatus = Callable[[bool, str], None]

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
DEFAULT_PATH = "/mqtt"  # of MQTT over WebSocket, where most brokers expect it
CONNECT_TIMEOUT_S = 5.0
ACKNOWLEDGE_TIMEOUT_S = 10.0  # after that the connection counts as lost
KEEPALIVE_S = 15  # also how long an abandoned connection attempt keeps its socket
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
INCOMING_LIMIT = 10_000  # received messages that wait to be read

# Without it Nagle's algorithm delays a message that follows another at once by up to 40 ms.
NO_DELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

PROTOCOLS = {"3.1.1": ProtocolVersion.V311, "5": ProtocolVersion.V5}
UTF_8 = 1  # MQTT 5's payload format indicator
LONGEST_PROPERTY = 200  # characters
SUBSCRIPTION_REFUSED = 0x80
UNKNOWN_VERSION = 132  # reason codes, as paho maps CONNACK 1, 4 and 5
WRONG_PASSWORD, NOT_AUTHORIZED = 134, 135
NAME_MISMATCH, IP_MISMATCH = 62, 64  # OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH, ..._IP_...

# Errors are reported in one line here; the client would log them with tracebacks.
SILENT = logging.Logger("mqtt", level=logging.CRITICAL + 1)


@dataclass(frozen=True, slots=True)
class Address:
    """A broker's host and port, and which transport to use."""

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    path: str | None = None  # of MQTT over WebSocket; None: plain MQTT

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        scheme = "mqtt" if self.path is None else "ws"
        return f"{scheme}{'s' if self.tls else ''}://{host}:{self.port}{self.path or ''}"


def read_address(config: MqttConfig) -> Address:
    """The address in ``mqtt.url``; ``embedded`` is this machine.

    Raises ConfigError if the URL is malformed, holds a password, or is ``none``.
    """
    if config.url == "embedded":
        return Address("127.0.0.1", config.port)
    if config.url == "none":
        raise ConfigError("mqtt.url is 'none': there is no broker; use --mqtt mqtt://HOST")
    try:
        parts = urlsplit(config.url)
        port = parts.port
    except ValueError:
        raise ConfigError("mqtt.url: the host or port is malformed; use mqtt://HOST:PORT") from None
    _check_url(parts, config.url)
    return Address(
        host=parts.hostname or "",
        port=DEFAULT_PORTS[parts.scheme] if port is None else port,
        tls=parts.scheme in ("mqtts", "wss"),
        username=parts.username,
        path=(parts.path or DEFAULT_PATH) if parts.scheme in ("ws", "wss") else None,
    )


def _check_url(parts: SplitResult, url: str) -> None:
    """The messages leave out what stands before an @: it may hold a password."""
    url = url.rpartition("@")[2]
    if parts.password is not None:
        raise ConfigError(
            "mqtt.url: a password in a url is visible to everybody on this machine; "
            "set STREAM_HBAF_MQTT__PASSWORD, or mqtt.password in a --config file"
        )
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise ConfigError(
            f"mqtt.url: '{url}' is not a broker's address; use mqtt://HOST:PORT, mqtts://HOST, "
            "or ws:// and wss:// for MQTT over WebSocket"
        )
    path = "" if parts.scheme in ("ws", "wss") else parts.path
    if path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError(
            f"mqtt.url: '{url}' has a path, a query or a fragment; use mqtt://HOST:PORT"
        )


def node_name(config: MqttConfig) -> str:
    """The configured node, else the host name with other than letters and digits replaced."""
    return config.node or re.sub(r"[^A-Za-z0-9_-]+", "_", socket.gethostname()).strip("_") or "node"


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

    Raises BrokerError if the broker can't be reached or refuses, ConfigError for wrong settings.
    """
    address = read_address(config)
    context = await asyncio.to_thread(_tls_context, config) if address.tls else None
    try:
        await _check_reachable(address, context)
    except (OSError, UnicodeError) as error:
        raise BrokerError(f"{address}: {_explain(error, address)}") from None
    username = config.username or address.username
    client = Client(
        hostname=address.host,
        port=address.port,
        username=username,
        password=config.password.get_secret_value() if config.password else None,
        logger=SILENT,
        protocol=PROTOCOLS[config.version],
        transport="tcp" if address.path is None else "websockets",
        websocket_path=address.path,
        will=_last_will(will, version=config.version) if will else None,
        timeout=CONNECT_TIMEOUT_S,
        keepalive=KEEPALIVE_S,
        max_queued_incoming_messages=INCOMING_LIMIT,
        socket_options=[NO_DELAY],
        tls_context=context,
    )
    try:
        await client.__aenter__()
    except MqttError as error:
        raise BrokerError(f"{address}: {_explain_refusal(error, username)}") from None
    return client


async def close_client(client: Client) -> None:
    """Disconnect; a connection that is broken already is no error."""
    with contextlib.suppress(MqttError):
        await client.__aexit__(None, None, None)


async def publish(client: Client, message: Message, *, version: str) -> None:
    """Publish a message; returns when it is acknowledged (QoS 1) or sent (QoS 0).

    Raises MqttError when the connection breaks, or the acknowledgement takes too long.
    """
    await client.publish(
        message.topic,
        message.payload,
        qos=message.qos,
        retain=message.retain,
        properties=_properties(message, version=version),
        timeout=ACKNOWLEDGE_TIMEOUT_S,
    )


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


async def _check_reachable(address: Address, context: ssl.SSLContext | None) -> None:
    """Open and close a TCP (and TLS) connection. Raises OSError or UnicodeError if that fails.

    The MQTT client connects in one of asyncio's threads, which the program waits for when it
    ends: a broker that doesn't answer would delay Ctrl-C. So a daemon thread connects first.
    """
    outcome: Future[None] = Future()
    outcome.set_running_or_notify_cancel()  # from here on the thread may settle it at any time

    def attempt() -> None:
        try:
            _connect(address, context)
        except (OSError, UnicodeError) as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    threading.Thread(target=attempt, name="mqtt-reach", daemon=True).start()
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        await asyncio.wrap_future(outcome)


def _connect(address: Address, context: ssl.SSLContext | None) -> None:
    with socket.create_connection((address.host, address.port), CONNECT_TIMEOUT_S) as plain:
        if context:
            try:
                context.wrap_socket(plain, server_hostname=address.host).close()
            except ConnectionError as error:  # the server did not understand the handshake
                raise ssl.SSLError(str(error)) from None


def _tls_context(config: MqttConfig) -> ssl.SSLContext:
    setting, file = "mqtt.ca_file", config.ca_file
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
        if config.certificate is not None:
            setting, file = "mqtt.certificate", config.certificate
            # Without a password OpenSSL would ask for that of an encrypted key on the terminal.
            context.load_cert_chain(config.certificate, config.key, password="")
    except OSError as error:  # ssl.SSLError is one
        is_ssl = isinstance(error, ssl.SSLError)
        reason = "is not a PEM certificate" if is_ssl else error.strerror or "can't be read"
        if setting == "mqtt.certificate":
            reason += ", or mqtt.key is not its key"
        raise ConfigError(f"{setting}: {file}: {reason}; check the path") from None
    return context


def _explain(error: OSError | UnicodeError, address: Address) -> str:
    match error:
        case ssl.SSLCertVerificationError(verify_code=code) if code in (NAME_MISMATCH, IP_MISMATCH):
            return f"its certificate is not for '{address.host}'; use the name it was made for"
        case ssl.SSLCertVerificationError():
            return (
                f"its certificate is not trusted ({error.verify_message}); "
                "set mqtt.ca_file to the certificate of its authority"
            )
        case ssl.SSLError():
            return "does not speak TLS at this port; use mqtt:// or the broker's TLS port"
        case socket.gaierror() | UnicodeError():
            return f"no host '{address.host}' is known; check mqtt.url (--mqtt)"
        case ConnectionRefusedError():
            return "nothing listens there; start the broker, or check mqtt.url (--mqtt)"
        case TimeoutError():
            return f"no answer within {CONNECT_TIMEOUT_S:g} s; check mqtt.url and the firewall"
        case _:
            return f"{error.strerror or error}; check mqtt.url (--mqtt) and the network"


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
    if code is not None:
        return f"the broker refuses ({error}); check its settings"
    return (
        "listens, but does not answer as an MQTT broker; "
        "check the port, mqtt:// or mqtts://, the path of ws://, and mqtt.certificate"
    )
