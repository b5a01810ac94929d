"""A real mosquitto on a free port of this machine, for the tests that need a broker."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("mosquitto", "mosquitto_sub", "mosquitto_pub", "mosquitto_passwd", "openssl")
INSTALL = "apt-get install mosquitto mosquitto-clients openssl"


def find_program(name: str) -> str:
    """The program's path; Debian has mosquitto in /usr/sbin, which may not be in PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin") or ""


def require_mosquitto() -> None:
    """Skip the test where mosquitto isn't installed; in CI fail it."""
    missing = [name for name in PROGRAMS if not find_program(name)]
    if not missing:
        return
    line = f"needs {', '.join(missing)}: {INSTALL}"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(line)
    pytest.skip(line)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Certificates:
    """A certificate authority, and certificates that it signed."""

    authority: Path
    localhost: Path  # certificate for the name localhost and the address 127.0.0.1
    elsewhere: Path  # certificate for elsewhere.example
    key: Path


def make_certificates(folder: Path) -> Certificates:
    made = Certificates(
        folder / "ca.pem", folder / "localhost.pem", folder / "elsewhere.pem", folder / "key.pem"
    )
    ca_key = folder / "ca-key.pem"
    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    _openssl(
        *new, "-x509", "-days", "2", "-subj", "/CN=Test authority", "-keyout", ca_key,
        "-out", made.authority,
    )  # fmt: skip
    request = folder / "request.pem"
    _openssl(*new, "-subj", "/CN=server", "-keyout", made.key, "-out", request)
    names = {made.localhost: "DNS:localhost,IP:127.0.0.1", made.elsewhere: "DNS:elsewhere.example"}
    for certificate, name in names.items():
        extension = certificate.with_suffix(".ext")
        extension.write_text(f"subjectAltName={name}\n")
        _openssl(
            "x509", "-req", "-in", request, "-CA", made.authority, "-CAkey", ca_key,
            "-CAcreateserial", "-days", "2", "-extfile", extension, "-out", certificate,
        )  # fmt: skip
    return made


def _openssl(*words: str | Path) -> None:
    subprocess.run([find_program("openssl"), *words], check=True, capture_output=True)


class Mosquitto:
    """A broker that can be stopped and restarted at the same port."""

    def __init__(self, folder: Path, *settings: str, port: int = 0) -> None:
        self.port = port or free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._file = folder / f"mosquitto-{self.port}.conf"
        self._file.write_text("\n".join([f"listener {self.port} 127.0.0.1", *settings, ""]))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [find_program("mosquitto"), "-c", str(self._file)]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.01)
        raise TimeoutError(f"mosquitto does not start: {self._file}")

    def stop(self) -> None:
        """End it with SIGTERM: with `persistence true` it saves sessions and their messages."""
        if self._process:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            self._process.wait(timeout=10)
            self._process = None

    def pause(self) -> None:
        """Stop the process: connections stay open, but nothing is answered."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)


@contextmanager
def mosquitto(folder: Path, *settings: str, port: int = 0) -> Iterator[Mosquitto]:
    """A running broker. ``settings`` are lines of mosquitto.conf; without a password file anybody
    may connect. Without a ``port`` it gets a free one."""
    require_mosquitto()
    if not any(line.startswith("password_file") for line in settings):
        settings = ("allow_anonymous true", *settings)
    broker = Mosquitto(folder, *settings, port=port)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


def password_file(folder: Path, *, user: str, password: str) -> Path:
    require_mosquitto()
    path = folder / "passwords"
    command = [find_program("mosquitto_passwd"), "-b", "-c", str(path), user, password]
    subprocess.run(command, check=True, capture_output=True)
    path.chmod(0o644)  # mosquitto reads it as another user
    return path


class Subscriber:
    """The output of mosquitto_sub: lines ``retained qos topic payload``.

    With a ``session`` the broker keeps messages for it while it is disconnected.
    """

    def __init__(self, port: int, *, topic: str = "#", session: str = "") -> None:
        self._command = [
            "stdbuf", "-oL",  # line-buffered, although stdout is a pipe
            find_program("mosquitto_sub"), "-p", str(port), "-t", topic, "-q", "1",
            "-F", "%r %q %t %p", "-d", *(["-c", "-i", session] if session else []),
        ]  # fmt: skip
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> "Subscriber":
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdout=asyncio.subprocess.PIPE, limit=2**20
        )
        while not (await self._line()).startswith("Subscribed"):
            pass
        return self

    async def __aexit__(self, *_: object) -> None:
        self._process.kill()
        await self._process.wait()

    async def next(self, *, timeout_s: float = 10) -> str:
        """The next message; mosquitto_sub's debug output is skipped."""
        async with asyncio.timeout(timeout_s):
            while True:
                line = await self._line()
                if line[:4] in ("0 0 ", "0 1 ", "1 0 ", "1 1 "):
                    return line

    async def until(self, end: str, *, timeout_s: float = 10) -> list[str]:
        """All messages up to the first one that ends with ``end``."""
        lines = [await self.next(timeout_s=timeout_s)]
        while not lines[-1].endswith(end):
            lines.append(await self.next(timeout_s=timeout_s))
        return lines

    async def _line(self) -> str:
        assert self._process.stdout
        return (await self._process.stdout.readline()).decode().rstrip("\n")
