"""Connections to an MQTT broker: opening, publishing, subscribing, and what their errors mean."""

import asyncio
import contextlib
import logging
import random
import socket
import ssl
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from aiomqtt import Client, MqttCodeError, MqttError, ProtocolVersion, Will
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import BrokerError, ConfigError, StreamHbafError
from stream_hbaf.publish.messages import Message
from stream_hbaf.publish.node import Address, read_address

__all__ = ["Client", "MqttError"]  # no other file imports aiomqtt

# Called with whether the broker is connected, and a line for people.
OnConnectionStatus = Callable[[bool, str], None]

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
        logger=_silent_logger(),
        protocol=PROTOCOLS[config.version],
        transport="tcp" if address.path is None else "websockets",
        websocket_path=address.path,
        will=_last_will(will, config),
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


async def check_connection(config: MqttConfig) -> None:
    """Connect once and leave. Raises BrokerError or ConfigError if that is impossible."""
    await close_client(await open_client(config))


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
        properties=_properties(message) if version == "5" else None,
        timeout=ACKNOWLEDGE_TIMEOUT_S,
    )


async def subscribe_to(client: Client, topics: Sequence[str]) -> bool:
    """Subscribe with QoS 1; returns whether the broker grants all of the topics."""
    if not topics:
        return True
    codes = await client.subscribe([(topic, 1) for topic in topics])
    return all(_code(granted) < SUBSCRIPTION_REFUSED for granted in codes)


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
    client = Client(
        address.host, address.port, logger=_silent_logger(), timeout=2.0, keepalive=KEEPALIVE_S
    )
    try:
        await client.__aenter__()
    except MqttError as error:
        return isinstance(error, MqttCodeError)
    await close_client(client)
    return True


async def subscribe(
    config: MqttConfig, *, topic: str, on_status: OnConnectionStatus | None = None
) -> AsyncGenerator[Received, None]:
    """Messages as they arrive; a lost connection is opened again.

    Raises BrokerError or ConfigError if the first connection fails, and BrokerError if the broker
    denies the subscription.
    """
    on_status = on_status or (lambda _connected, _line: None)
    client = await open_client(config)
    try:
        while True:
            try:
                if not await subscribe_to(client, [topic]):
                    raise BrokerError(
                        f"{read_address(config)}: may not subscribe to {topic}; "
                        "check the broker's access rules"
                    )
                async for message in receive(client):
                    yield message
            except MqttError:
                on_status(False, f"{read_address(config)}: connection lost; trying again")
                await close_client(client)
            client = await _reopen(config)
            on_status(True, f"{read_address(config)}: connected again")
    finally:
        await close_client(client)


def _last_will(will: Message | None, config: MqttConfig) -> Will | None:
    if will is None:
        return None
    properties = (
        _properties(will, packet=PacketTypes.WILLMESSAGE) if config.version == "5" else None
    )
    return Will(will.topic, will.payload, will.qos, will.retain, properties)


def _properties(message: Message, *, packet: int = PacketTypes.PUBLISH) -> Properties:
    """MQTT 5 properties of a message."""
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
        properties.UserProperty = [(name, _plain(value)) for name, value in message.properties]
    return properties


def _plain(text: str) -> str:
    """Brokers disconnect clients that send control characters in a property."""
    shown = (c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return "".join(shown)[:LONGEST_PROPERTY]


def _code(granted: object) -> int:
    """The return code of a subscription: a number, or an object of paho's around one."""
    value = getattr(granted, "value", granted)
    return value if isinstance(value, int) else 0


async def _reopen(config: MqttConfig) -> Client:
    for delay_s in backoff():
        await asyncio.sleep(delay_s)
        with contextlib.suppress(StreamHbafError):
            return await open_client(config)
    raise AssertionError("backoff has no end")


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


def _silent_logger() -> logging.Logger:
    """Errors are reported in one line here; the client would log them with tracebacks."""
    logger = logging.getLogger("stream_hbaf.publish.client")
    logger.propagate = False
    logger.disabled = True
    return logger
