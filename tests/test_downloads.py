"""Weights that have to be downloaded: progress on a terminal, and one error without a network."""

import fcntl
import hashlib
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tiny_encoder import save_tiny_mpnet

COMMIT = "0" * 40
DIGEST = """
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.weights import digest_part
TextEncoder("tests/tiny")
print(digest_part("text:tests/tiny"))
"""


@contextmanager
def hub_of(folder: Path) -> Iterator[str]:
    """A Hugging Face hub on loopback with one model, the files of ``folder``; its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # as the library calls it
            path = self.path.partition("?")[0]
            files = sorted(file.name for file in folder.iterdir())
            listed = [
                {"rfilename": n, "path": n, "type": "file", "size": 1, "oid": n} for n in files
            ]
            if "/tree/" in path:
                self._answer(json.dumps(listed).encode())
            elif path.startswith("/api/models/"):
                self._answer(json.dumps({"id": "x", "sha": COMMIT, "siblings": listed}).encode())
            elif (name := path.rpartition("/")[2]) in files:
                self._answer((folder / name).read_bytes())
            else:
                self._answer(b"", status=404)

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, content: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def terminal() -> Iterator[tuple[int, list[bytes]]]:
    """A terminal of 100 columns: what to write to, and all that was written once it is closed."""
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    drawn: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # at the end
            while part := os.read(reading, 4096):
                drawn.append(part)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield writing, drawn
    finally:
        os.close(writing)
        thread.join()
        os.close(reading)


def environment(hub: str, home: Path) -> dict[str, str]:
    return os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(home)}


def test_download_shows_its_progress_on_a_terminal(tmp_path: Path) -> None:
    """Bars on stderr, results alone on stdout; the digest is that of the file on the hub."""
    (tmp_path / "tiny").mkdir()
    folder = save_tiny_mpnet(tmp_path / "tiny")
    with hub_of(folder) as hub, terminal() as (stderr, drawn):
        done = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=environment(hub, tmp_path / "cache"),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            check=True,
        )
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert done.stdout == f"{expected}\n"
    assert "model.safetensors: 100%" in b"".join(drawn).decode(errors="replace")


def test_download_in_a_pipe_is_silent(tmp_path: Path) -> None:
    """A log of a service holds no bars."""
    (tmp_path / "tiny").mkdir()
    with hub_of(save_tiny_mpnet(tmp_path / "tiny")) as hub:
        done = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=environment(hub, tmp_path / "cache"),
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stderr == ""


MISSING = """
from stream_hbaf.errors import ModelError
from stream_hbaf.features.comet import Comet
from stream_hbaf.features.speech_encoder import SpeechEncoder
from stream_hbaf.features.text import TextEncoder
from stream_hbaf.features.whisper_encoder import WhisperEncoder
for load in (TextEncoder, SpeechEncoder, Comet, WhisperEncoder):
    try:
        load("x/y")
    except ModelError as error:
        print(error)
"""


def test_missing_network_is_one_error_at_once(tmp_path: Path) -> None:
    """Of every kind of model: which it is and what to do; nothing is retried for half a minute."""
    done = subprocess.run(
        [sys.executable, "-c", MISSING],
        env=environment("http://127.0.0.1:1", tmp_path),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    said = done.stdout.splitlines()
    assert [line.partition(" x/y: not on this machine")[0] for line in said[:3]] == [
        "text encoder",
        "speech encoder",
        "COMET",
    ]
    assert "no Whisper model 'x/y'" in said[3]
    assert "pip install 'stream-hbaf[offline]'" in said[3]
    assert done.stderr == ""
