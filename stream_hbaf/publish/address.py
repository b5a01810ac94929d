"""Where the broker is, and what this recogniser is called there."""

import re
import socket
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import ConfigError

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
DEFAULT_PATH = "/mqtt"  # of MQTT over WebSocket, where most brokers expect it


@dataclass(frozen=True, slots=True)
class Address:
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
    """Where ``mqtt.url`` points; ``embedded`` is this machine. Raises ConfigError."""
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
    """Never repeats what stands before an @: with a scheme missing, a password hides there."""
    url = url.rpartition("@")[2]
    if parts.password is not None:
        raise ConfigError(
            "mqtt.url: a password in a url is visible to everybody on this machine; "
            "set STREAM_HBAF_MQTT__PASSWORD, or mqtt.password in a --config file"
        )
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise ConfigError(
            f"mqtt.url: '{url}' is no broker; use mqtt://HOST:PORT, mqtts://HOST, "
            "or ws:// and wss:// for MQTT over WebSocket"
        )
    path = "" if parts.scheme in ("ws", "wss") else parts.path
    if path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError(f"mqtt.url: '{url}' goes on after the port; use mqtt://HOST:PORT")


def node_name(config: MqttConfig) -> str:
    """The configured node, else this machine's name in letters that any topic may hold."""
    return config.node or re.sub(r"[^A-Za-z0-9_-]+", "_", socket.gethostname()).strip("_") or "node"
