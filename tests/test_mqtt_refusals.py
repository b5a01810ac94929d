"""What a broker does not take is named, and does not keep the rest from being delivered."""

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest
from mosquitto import free_port, mosquitto, password_file, require_mosquitto
from mqtt_kit import config

from stream_hbaf.errors import BrokerError
from stream_hbaf.publish.mqtt import check_broker


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


VERSIONS = pytest.mark.parametrize("version", ["3.1.1", "5"])


@VERSIONS
@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("retain_available false", "keeps no retained messages, which are needed"),
        ("max_qos 0", "takes no messages with QoS 1, which are needed"),
    ],
)
def test_broker_that_lacks_what_is_needed(
    tmp_path: Path, setting: str, reason: str, version: str
) -> None:
    """One line names it, though with 3.1.1 the broker hangs up without a word."""
    with (
        mosquitto(tmp_path, setting) as broker,
        pytest.raises(BrokerError, match=f"^{broker.url}: {reason}"),
    ):
        asyncio.run(check_broker(config(broker.url, version=version)))


def test_user_name_with_an_at_sign(tmp_path: Path) -> None:
    """It is percent-encoded in the URL."""
    require_mosquitto()
    file = password_file(tmp_path, user="ann@example.org", password="right")
    tmp_path.chmod(0o755)
    with mosquitto(tmp_path, f"password_file {file}", "user root") as broker:
        url = broker.url.replace("//", "//ann%40example.org@")
        asyncio.run(check_broker(config(url, password="right")))


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_ipv6(tmp_path: Path) -> None:
    """Plain, and over WebSocket, whose request names the host as a URL does."""
    port = free_port()
    requests: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append((await reader.read(2000)).decode())
        writer.close()

    async def main() -> None:
        await check_broker(config(f"mqtt://[::1]:{port}"))
        async with await asyncio.start_server(answer, "::1", 0) as server:
            web_port = server.sockets[0].getsockname()[1]
            with pytest.raises(BrokerError):
                await check_broker(config(f"ws://[::1]:{web_port}/a b"))
        assert requests[-1].startswith("GET /a%20b HTTP/1.1\r\n")
        assert f"\r\nHost: [::1]:{web_port}\r\n" in requests[-1]

    with mosquitto(tmp_path, f"listener {port} ::1"):
        asyncio.run(main())
