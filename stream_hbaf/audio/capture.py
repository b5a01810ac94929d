"""The capture process, which records from an audio device, and the list of devices.

It is a process of its own because PortAudio notices a new device only when it is initialised
again. ``python -m stream_hbaf.audio.capture`` writes to stdout, for each chunk, a ``HEADER`` and
then its int16 samples; to stderr one JSON object a line, ``{"state": ..., "detail": ...}``.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.audio.source import CANCELS, RATE_HZ, Chunker, LossReport, Resampler, no_channel
from stream_hbaf.errors import DeviceError

# captured_at (seconds of CLOCK_MONOTONIC, which all processes share), after_gap
HEADER = Struct("<d?")
REFUSED, GONE = 3, 4  # exit statuses: the device can't be opened; it stopped giving sound

QUEUE_S = 5  # sound that is held while the parent doesn't read; then the oldest is dropped
FIRST_SOUND_S = 4.0  # an idle sound server may take two seconds to start its device
SILENT_DEVICE_S = 1.5  # without a callback, after which the device is gone
BLOCK_MS = 32
LATENCY_S = 0.1  # of the device's buffer: with PortAudio's own 35 ms a busy machine loses sound
OLDEST_S = 0.5  # age of a buffer above which the device's clock is taken for broken
MOST_CHANNELS = 2  # virtual devices offer 32, of which a microphone uses two
CRASHED = "PortAudio crashed; check the sound settings of this machine (ALSA, PulseAudio)"
DEVICE_BUSY = (-9985, -16)  # PortAudio's "Device unavailable", ALSA's EBUSY


@dataclass(frozen=True, slots=True)
class Device:
    """A device one can record from."""

    index: int
    name: str
    channels: int
    rate_hz: int
    is_default: bool


def list_devices() -> list[Device]:
    """The devices that are connected now. Raises DeviceError if PortAudio is missing.

    They are listed by a new process, because PortAudio's list is fixed when it is initialised.
    """
    arguments = [sys.executable, "-m", "stream_hbaf.audio.capture", "--list"]
    listing = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if listing.returncode:
        raise DeviceError(last_detail(listing.stderr) or CRASHED)
    return [Device(**fields) for fields in json.loads(listing.stdout)]


def last_detail(stderr: str) -> str:
    """The last status line's detail, among whatever else a child wrote to stderr."""
    for line in reversed(stderr.splitlines()):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return str(json.loads(line)["detail"])
    return stderr.strip().rpartition("\n")[2]


def find_device(name: str | None, devices: Sequence[Device]) -> Device:
    """The device of an index, a name, or part of a name in any case; None is the default device.

    Raises DeviceError if there is none, or several match.
    """
    if not devices:
        raise DeviceError("no microphone found; connect one, or listen to a recording with --file")
    if name is None:
        return next((device for device in devices if device.is_default), devices[0])
    if name.strip().lstrip("-").isdigit():
        found = [device for device in devices if device.index == int(name)]
    else:
        found = [device for device in devices if device.name == name]
        found = found or [device for device in devices if name.lower() in device.name.lower()]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{device.index} {device.name!r}" for device in found or devices)
    if found:
        raise DeviceError(f"microphone {name!r} could be any of {listed}; give its number")
    raise DeviceError(
        f"no microphone {name!r}; there are {listed} (run 'stream-hbaf devices' to see them)"
    )


def _portaudio() -> Any:
    try:
        import sounddevice  # here: its import starts PortAudio, and fails without the library
    except OSError:
        raise DeviceError(
            "the PortAudio library is missing; install it: apt-get install libportaudio2"
        ) from None
    return sounddevice


def _present_devices(sounddevice: Any) -> list[Device]:
    default = sounddevice.default.device[0]
    return [
        Device(
            index=entry["index"],
            name=entry["name"],
            channels=entry["max_input_channels"],
            rate_hz=round(entry["default_samplerate"]),
            is_default=entry["index"] == default,
        )
        for entry in sounddevice.query_devices()
        if entry["max_input_channels"] > 0
    ]


class _Block(NamedTuple):
    samples: NDArray[np.float32]  # [n, channels]
    captured_at: float  # of its last frame
    after_gap: bool


class _Intake:
    """The queue from PortAudio's thread to ours: bounded, the oldest is dropped when it is full."""

    def __init__(self, rate_hz: int) -> None:
        self._rate_hz = rate_hz
        self._limit = QUEUE_S * rate_hz
        self._blocks: deque[_Block] = deque()
        self._frames = 0
        self._gap = False  # frames before the next block were dropped
        self._changed = threading.Condition()
        self.dropped = 0  # frames, because the queue was full
        self.overruns = 0  # times the device itself lost sound
        self._opened_at = time.monotonic()
        self._last_call = 0.0
        self._ended = False

    def put(self, samples: NDArray[np.float32], _count: int, clock: Any, flags: Any) -> None:
        """PortAudio's callback for each block [n, channels]."""
        now = time.monotonic()
        # Blocks come in bursts; the device's clock tells when this one was captured.
        age_s = clock.currentTime - clock.inputBufferAdcTime - len(samples) / self._rate_hz
        captured_at = now - (age_s if 0 < age_s < OLDEST_S else 0.0)
        # Devices often flag an overrun when they start, before any sound that we could lose.
        overrun = bool(flags.input_overflow) and self._last_call > 0
        with self._changed:
            self.overruns += overrun
            self._last_call = now
            self._blocks.append(_Block(samples.copy(), captured_at, overrun))
            self._frames += len(samples)
            while self._frames > self._limit:
                lost = self._blocks.popleft()
                self._frames -= len(lost.samples)
                self.dropped += len(lost.samples)
                self._gap = True
            self._changed.notify()

    def end(self) -> None:
        """PortAudio's callback for the end of the stream."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def take(self) -> _Block | None:
        """The oldest block; None once the stream has ended or the device gives no more sound."""
        with self._changed:
            patience_s = SILENT_DEVICE_S if self._last_call else FIRST_SOUND_S
            deadline = max(self._last_call, self._opened_at) + patience_s
            self._changed.wait_for(
                lambda: self._blocks or self._ended, max(0.0, deadline - time.monotonic())
            )
            if not self._blocks:
                return None
            block = self._blocks.popleft()
            self._frames -= len(block.samples)
            if self._gap:
                block = block._replace(after_gap=True)
            self._gap = False
            return block

    def loss(self) -> str:
        """What was lost so far, for the status line."""
        if self.dropped:
            return f"{self.dropped / self._rate_hz:.1f} s lost, this machine is too slow"
        return f"sound lost by the device ({self.overruns} overruns)"


def _open_stream(sounddevice: Any, device: Device, *, channel: int | None) -> tuple[Any, _Intake]:
    """Open the device at its own rate, else at a common one. Raises DeviceError."""
    needed = 1 if channel is None else channel + 1
    if needed > device.channels:
        where = f"microphone {device.name!r}"
        raise DeviceError(no_channel(needed - 1, where=where, channels=device.channels))
    channels = max(needed, min(device.channels, MOST_CHANNELS))
    # Some devices can only be opened with all of their channels.
    counts = dict.fromkeys([channels, 1 if channel is None else device.channels])
    rates = dict.fromkeys([device.rate_hz, RATE_HZ, 48_000, 44_100])
    reason = ""
    for rate_hz, count in [(rate_hz, count) for rate_hz in rates for count in counts]:
        intake = _Intake(rate_hz)
        try:
            stream = sounddevice.InputStream(
                device=device.index,
                samplerate=rate_hz,
                channels=count,
                blocksize=rate_hz * BLOCK_MS // 1000,
                latency=LATENCY_S,
                dtype="float32",
                callback=intake.put,
                finished_callback=intake.end,
            )
            stream.start()
        except sounddevice.PortAudioError as error:
            reason = reason or str(error.args[0]).rpartition(": ")[2]
            codes = {error.args[1] if len(error.args) > 1 else 0}
            codes |= {error.args[2][1]} if len(error.args) > 2 else set()
            if codes & set(DEVICE_BUSY):
                raise DeviceError(
                    f"microphone {device.name!r} is busy; close the program that records from it, "
                    "or name a device of the sound server (PulseAudio, PipeWire), which shares it"
                ) from None
        else:
            return stream, intake
    raise DeviceError(
        f"microphone {device.name!r} can't be opened ({reason}); "
        "check that it is connected, or choose another ('stream-hbaf devices')"
    )


def _capture(
    sounddevice: Any,
    options: argparse.Namespace,
    *,
    write: Callable[[bytes], None],
    report: Callable[[str, str], None],
) -> None:
    """Write chunks until the device gives no more sound, and report its states.

    Raises DeviceError if it can't be opened, BrokenPipeError once the parent no longer reads.
    """
    channel = options.channel
    device = find_device(options.device, _present_devices(sounddevice))
    stream, intake = _open_stream(sounddevice, device, channel=channel)
    name, rate_hz = f"microphone {device.name!r}", round(stream.samplerate)
    report("online", f"{name} at {rate_hz} Hz")
    resampler = Resampler(rate_hz, stream.channels, channel=channel)
    chunker = Chunker(chunk_ms=options.chunk_ms)
    losses = LossReport(name, report)
    cancelled = False
    while (block := intake.take()) is not None:
        losses.update(intake.loss() if block.after_gap else "", now=time.monotonic())
        if block.after_gap:
            resampler = Resampler(rate_hz, stream.channels, channel=channel)
            chunker.drop()
        resampled = resampler.feed(block.samples)
        if resampler.cancels() and not cancelled:
            cancelled = True
            report("degraded", f"{name}: {CANCELS}")
        for chunk in chunker.feed(resampled, captured_at=block.captured_at - resampler.behind_s):
            header = HEADER.pack(chunk.captured_at, chunk.after_gap)
            write(header + chunk.samples.astype("<i2").tobytes())
    report("offline", f"{name} stopped giving sound; is it still connected?")


def main(arguments: Sequence[str] | None = None) -> int:
    """Record until the device is lost or the parent ends; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m stream_hbaf.audio.capture")
    parser.add_argument("--device", help="name, part of a name, or number")
    parser.add_argument("--channel", type=int, help="from 0 on; without it the mean of all")
    parser.add_argument("--chunk-ms", type=int, default=32)
    parser.add_argument("--list", action="store_true", help="the devices, as JSON")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    out, status = _take_over_output()

    def report(state: str, detail: str) -> None:
        os.write(status, json.dumps({"state": state, "detail": detail}).encode() + b"\n")

    def write(content: bytes) -> None:
        while content:
            content = content[os.write(out, content) :]

    try:
        sounddevice = _portaudio()
        if options.list:
            devices = [asdict(device) for device in _present_devices(sounddevice)]
            write(json.dumps(devices).encode())
            return 0
        _capture(sounddevice, options, write=write, report=report)
        return GONE
    except DeviceError as error:
        with contextlib.suppress(BrokenPipeError):
            report("offline", str(error))
        return REFUSED
    except BrokenPipeError:  # the parent has ended
        return GONE


def _take_over_output() -> tuple[int, int]:
    """Private copies of stdout and stderr; what ALSA and PortAudio print goes to /dev/null."""
    out, status = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    sys.stderr = os.fdopen(os.dup(status), "w", buffering=1)  # tracebacks still reach the parent
    return out, status


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # PortAudio's own shutdown can hang after a device is lost
