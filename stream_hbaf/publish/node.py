"""This recogniser as a node: its name in topics, its broker, its files on this machine."""

import fcntl
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from urllib.parse import SplitResult, urlsplit

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import ConfigError

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
DEFAULT_PATH = "/mqtt"  # of MQTT over WebSocket, where most brokers expect it


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


def state_folder() -> Path:
    """The folder for files that outlive a run, by the XDG base directory specification."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "stream_hbaf"


def broker_lock(port: int) -> Path:
    """The file that is locked by the process whose embedded broker has this port."""
    return state_folder() / f"broker-{port}.lock"


def lock_file(path: Path) -> TextIO | None:
    """Lock a file until the returned handle is closed; None if another process has locked it.

    Locks end with their process, however it ends. The locked file is never the database itself:
    closing any handle of a database's file would give up SQLite's own locks.
    """
    lock = open(path, "a", opener=_private)  # noqa: SIM115  it stays open
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def is_locked(path: Path) -> bool:
    """Whether a running process has locked the file."""
    if not path.exists():
        return False
    lock = lock_file(path)
    if lock is not None:
        lock.close()
    return lock is None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
