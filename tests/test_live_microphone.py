"""From a real microphone path (a virtual PulseAudio device) through everything to a broker."""

import asyncio
import json
import signal
import subprocess
import sys
import time
import wave
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import numpy as np
from live_kit import assert_same, recognise
from mosquitto import mosquitto, require_mosquitto
from numpy.typing import NDArray
from virtual_microphone import DEVICE, VirtualMicrophone, virtual_microphone

from stream_hbaf.audio.file import FileSource
from stream_hbaf.audio.microphone import Microphone
from stream_hbaf.audio.source import AudioSource, Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.live.runtime import Recognition
from stream_hbaf.recognizer import Recognizer

__all__ = ["virtual_microphone"]

RECORDINGS = Path(__file__).parent / "recordings"
SENTENCE = RECORDINGS / "sense_and_sensibility_01_austen_64kb-0930.flac"
LONGER = RECORDINGS / "sense_and_sensibility_01_austen_64kb-0890.flac"


class Recorder:
    """Passes a source's chunks on and keeps them."""

    name = "recorder"

    def __init__(self, source: AudioSource) -> None:
        self._source = source
        self.samples: list[NDArray[np.int16]] = []
        self.start = 0

    async def __aenter__(self) -> Self:
        await self._source.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._source.__aexit__(*exception)

    async def chunks(self) -> AsyncIterator[Chunk]:
        since = time.monotonic()
        async for chunk in self._source.chunks():
            if chunk.captured_at >= since:
                if not self.samples:
                    self.start = chunk.start
                assert not chunk.after_gap
                self.samples.append(chunk.samples)
                yield chunk


def test_live_equals_replay(
    recognizer: Recognizer, virtual_microphone: VirtualMicrophone, tmp_path: Path
) -> None:
    """Promise 2: what the microphone gave, replayed from a file, gives the same to the bit."""
    live: list[Recognition] = []
    recorder = Recorder(Microphone(DEVICE, chunk_ms=32, on_status=lambda *_: None))

    async def listen() -> None:
        stop = asyncio.Event()
        pipeline = LivePipeline(recognizer, [], on_recognition=live.append)
        async with recorder:
            running = asyncio.create_task(pipeline.run(recorder, stop=stop))
            for path in (SENTENCE, LONGER):
                player = virtual_microphone.play(path)
                await asyncio.to_thread(player.wait)
                await asyncio.sleep(1.2)
            stop.set()
            await running

    asyncio.run(listen())
    recording = tmp_path / "recording.wav"
    with wave.open(str(recording), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
        file.writeframes(np.concatenate(recorder.samples).tobytes())
    replayed = recognise(
        recognizer, FileSource(recording, speed=None, chunk_ms=320, on_status=lambda *_: None)
    )
    assert len(live) >= 2
    assert "amiable" in (live[0].text.transcript.text if live[0].text else "")
    assert_same(live, replayed, shift=recorder.start)


def test_command_publishes_what_the_microphone_hears_and_survives_its_loss(
    virtual_microphone: VirtualMicrophone, tmp_path: Path
) -> None:
    """Talk: an end event arrives. Unplug: offline. Plug in, talk: online and another. Ctrl-C:
    stopped."""
    require_mosquitto()
    with mosquitto(tmp_path) as broker:
        received = tmp_path / "received"
        with received.open("w") as out:
            listener = subprocess.Popen(
                ["mosquitto_sub", "-p", str(broker.port), "-t", "stream_hbaf/#", "-v", "-q", "1"],
                stdout=out,
            )
        command = [sys.executable, "-m", "stream_hbaf.cli", "--mic", DEVICE, "--json"]
        process = subprocess.Popen(
            [*command, "--mqtt", f"mqtt://127.0.0.1:{broker.port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

        def wait_for(text: str, *, times: int = 1) -> None:
            deadline = time.monotonic() + 30
            while received.read_text().count(text) < times:
                assert process.poll() is None
                assert time.monotonic() < deadline, f"no {text!r} in\n{received.read_text()}"
                time.sleep(0.1)

        try:
            wait_for("/microphone/status/capture online")
            virtual_microphone.play(SENTENCE).wait()
            wait_for('"type":"end"')
            virtual_microphone.unload()
            wait_for("/microphone/status/capture offline")
            virtual_microphone.load()
            wait_for("/microphone/status/capture online", times=2)
            virtual_microphone.play(SENTENCE).wait()
            wait_for('"type":"end"', times=2)
            process.send_signal(signal.SIGINT)
            _, output = process.communicate(timeout=20)
            assert process.returncode == 0, output
            assert "Traceback" not in output
        finally:
            process.kill()
            time.sleep(0.3)
            listener.terminate()
            listener.wait()
        lines = received.read_text().splitlines()
        topics = [line.split(" ", 1) for line in lines]
        ends = [
            json.loads(payload)
            for topic, payload in topics
            if topic.endswith("/microphone/utterance") and '"type":"end"' in payload
        ]
        assert all("amiable" in end["text"] for end in ends)
        assert [payload for topic, payload in topics if topic.endswith("/available")][-1] == (
            "stopped"
        )
