"""A microphone for machines without one: a private PulseAudio whose null sink is recorded.

What is played into the sink arrives at PortAudio's device ``pulse``. Each test run has its own
server, socket and settings, so several can go on at once; nothing of the user's is touched.
"""

import ctypes.util
import os
import shutil
import subprocess
import tempfile
import time
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ

DEVICE = "pulse"
SINK = "nullsink"
PACKAGES = "pulseaudio pulseaudio-utils libasound2-plugins libportaudio2"

ASOUND = """
pcm.pulse { type pulse }
ctl.pulse { type pulse }
pcm.!default { type pulse }
ctl.!default { type pulse }
"""


def missing() -> list[str]:
    """What this machine lacks for a virtual microphone."""
    lacking = [name for name in ("pulseaudio", "pactl", "paplay") if not shutil.which(name)]
    if not any(Path("/usr/lib").glob("**/alsa-lib/libasound_module_pcm_pulse.so")):
        lacking.append("libasound2-plugins")
    if not ctypes.util.find_library("portaudio"):
        lacking.append("libportaudio2")
    return lacking


def require() -> None:
    """Skip the test if there can be no virtual microphone; in CI, fail it."""
    if lacking := missing():
        line = f"no virtual microphone: {', '.join(lacking)} missing (apt-get install {PACKAGES})"
        if os.environ.get("CI"):
            pytest.fail(line)
        pytest.skip(line)


class VirtualMicrophone:
    """While open, this process and its children can record from ``pulse`` what ``play`` plays."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="microphone-", dir="/tmp")
        folder = Path(self._folder.name)
        (folder / "asound.conf").write_text(ASOUND)
        socket = folder / "socket"
        self.environment = {
            "ALSA_CONFIG_PATH": str(folder / "asound.conf"),
            "PULSE_SERVER": f"unix:{socket}",
            "PULSE_SOURCE": f"{SINK}.monitor",
            "PULSE_RUNTIME_PATH": str(folder),
            "PULSE_STATE_PATH": str(folder),
            "PULSE_COOKIE": str(folder / "cookie"),
            "PULSE_LATENCY_MSEC": "20",
        }
        self._before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        self._log = (folder / "log").open("w")
        command = ["pulseaudio", "-n", "--daemonize=no", "--use-pid-file=no", "--log-target=stderr"]
        command += ["--exit-idle-time=600"]  # a server that a killed test run left behind ends
        command += ["-L", f"module-native-protocol-unix socket={socket} auth-anonymous=1"]
        self._server = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self._wait_for_server(folder / "log")
        self.load()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.terminate()
        self._server.wait(10)
        self._log.close()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._folder.cleanup()

    def load(self) -> None:
        """Plug the microphone in."""
        self._module = self._pactl(
            "load-module", "module-null-sink", f"sink_name={SINK}", "rate=48000", "channels=2"
        ).strip()

    def unload(self) -> None:
        """Unplug it."""
        self._pactl("unload-module", self._module)

    def play(self, path: Path) -> "subprocess.Popen[bytes]":
        """Start saying what ``path`` holds; wait on the result for its end.

        Decoded here, because PulseAudio's player takes a FLAC file for raw samples.
        """
        wav = Path(self._folder.name) / f"{path.stem}.wav"
        with wave.open(str(wav), "wb") as recording:
            recording.setnchannels(1)
            recording.setsampwidth(2)
            recording.setframerate(SAMPLE_RATE_HZ)
            recording.writeframes(read_audio(path).tobytes())
        return self.play_wav(wav)

    def play_wav(self, path: Path) -> "subprocess.Popen[bytes]":
        """Play a WAV file with all its channels.

        The player reads two seconds ahead, because a delay on a busy machine would become a gap.
        """
        ahead = os.environ | {"PULSE_LATENCY_MSEC": "2000"}
        return subprocess.Popen(["paplay", f"--device={SINK}", str(path)], env=ahead)

    def _wait_for_server(self, log: Path) -> None:
        deadline = time.monotonic() + 15
        command = ["pactl", "info"]
        while subprocess.run(command, capture_output=True, check=False).returncode:
            if time.monotonic() > deadline or self._server.poll() is not None:
                raise RuntimeError(f"pulseaudio doesn't start: {log.read_text()}")
            time.sleep(0.05)

    def _pactl(self, *arguments: str) -> str:
        command: Sequence[str] = ["pactl", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def virtual_microphone() -> Iterator[VirtualMicrophone]:
    require()
    with VirtualMicrophone() as microphone:
        yield microphone
