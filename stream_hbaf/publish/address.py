"""The address of an MQTT broker, and the name of this recogniser there, from the settings."""

import re
import socket
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urlsplit

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import ConfigError

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
DEFAULT_PATH = "/mqtt"  # of MQTT over WebSocket, where most brokers expect it
ZONE = "%25"  # an IPv6 address's zone in a URL (RFC 6874): [fe80::1%25eth0]


@dataclass(frozen=True, slots=True)
class Address:
    """A broker's host and port, and which transport to use."""

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    path: str | None = None  # of MQTT over WebSocket; None: plain MQTT

    def __str__(self) -> str:
        scheme = "mqtt" if self.path is None else "ws"
        return f"{scheme}{'s' if self.tls else ''}://{self.authority}{self.path or ''}"

    @property
    def authority(self) -> str:
        """``host:port`` as a URL has it, an IPv6 address in brackets."""
        host = f"[{self.host.replace('%', ZONE)}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


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
        raise ConfigError(
            "mqtt.url: the host or port is malformed; use mqtt://HOST:PORT, "
            "an IPv6 address in brackets: mqtt://[::1]:PORT"
        ) from None
    _check_url(parts, config.url)
    return Address(
        host=(parts.hostname or "").replace(ZONE, "%"),
        port=DEFAULT_PORTS[parts.scheme] if port is None else port,
        tls=parts.scheme in ("mqtts", "wss"),
        username=_decode(parts.username),
        path=_web_path(parts) if parts.scheme in ("ws", "wss") else None,
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


def _decode(username: str | None) -> str | None:
    """A user name as it was before it was percent-encoded for the URL."""
    try:
        decoded = unquote(username, errors="strict") if username is not None else None
    except UnicodeDecodeError:
        decoded = "\0"
    if decoded is not None and "\0" in decoded:  # MQTT has no such strings
        raise ConfigError("mqtt.url: the user name is not text in UTF-8; set mqtt.username")
    return decoded


def _web_path(parts: SplitResult) -> str:
    return quote(parts.path, safe="/%:@!$&'()*+,;=~") or DEFAULT_PATH


def node_name(config: MqttConfig) -> str:
    """The configured node, else the host name with other than letters and digits replaced."""
    return config.node or re.sub(r"[^A-Za-z0-9_-]+", "_", socket.gethostname()).strip("_") or "node"
