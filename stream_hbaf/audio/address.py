"""Addresses at which sound arrives, or from which it is fetched: ``HOST:PORT``."""

import ipaddress
import os
from dataclasses import dataclass

from stream_hbaf.errors import DeviceError


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int  # 0: any free one, to listen on

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def cannot_listen(name: str, error: OSError) -> DeviceError:
    """Why a server can't be opened, in a line."""
    return DeviceError(
        f"{name}: can't listen there ({plain_reason(error)}); "
        "choose another port, or end the program that uses it"
    )


def plain_reason(error: OSError) -> str:
    """The system's own words: asyncio wraps the address around them."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or type(error).__name__  # a name that can't be looked up
