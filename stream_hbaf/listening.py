"""One run of the recogniser: open source, broker, models and publishers, listen, close them."""

import asyncio
import contextlib
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from stream_hbaf import __version__
from stream_hbaf.audio.capture import list_devices
from stream_hbaf.audio.file import FileSource
from stream_hbaf.audio.microphone import Microphone
from stream_hbaf.audio.source import AudioSource, OnStatus
from stream_hbaf.config import Config
from stream_hbaf.errors import DeviceError
from stream_hbaf.events import Info, Model, State
from stream_hbaf.live import LivePipeline, Publisher
from stream_hbaf.publish.broker import embedded_broker
from stream_hbaf.publish.mqtt import MqttPublisher
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.terminal import JsonLines, Terminal

# At full speed a larger chunk costs fewer hops between threads; it never changes the answer.
FULL_SPEED_CHUNK_MS = 320


@dataclass(frozen=True, slots=True)
class Input:
    """Where sound comes from, as the command line asks for it."""

    file: Path | None  # a recording
    device: str | None  # a microphone's name or index; "" the system's own; None any, or example
    speed: float | None  # of a recording, None as fast as it goes
    example: Path  # what to listen to when there is no microphone and none was asked for


async def listen(chosen: Input, *, config: Config, json: bool, stop: asyncio.Event) -> None:
    """Recognise until the sound ends or ``stop`` is set; raises a StreamHbafError that says why
    it can't."""
    async with contextlib.AsyncExitStack() as opened:
        reports: list[LivePipeline] = []

        def on_status(state: State, detail: str) -> None:
            for pipeline in reports:
                pipeline.report_capture(state, detail)

        chosen = _fall_back(chosen)
        config = _named(config, chosen)
        source = await opened.enter_async_context(_open(chosen, config, on_status))
        url = config.mqtt.url
        if url == "embedded":
            broker = await opened.enter_async_context(embedded_broker(config.mqtt.port))
            url = broker.url
        _say("loading the models")
        loop = asyncio.get_running_loop()
        recognizer = opened.enter_context(
            await loop.run_in_executor(None, partial(Recognizer, config))
        )
        publishers: list[Publisher] = [JsonLines(stop=stop) if json else Terminal()]
        if url != "none":
            mqtt = config.mqtt.model_copy(update={"url": url})
            publisher = MqttPublisher(
                mqtt, info=_info(recognizer), on_status=lambda connected, line: _say(line)
            )
            await publisher.connect()
            publishers.append(publisher)
            _say(f"publishing to {publisher.address}")
        pipeline = LivePipeline(recognizer, publishers)
        reports.append(pipeline)
        _say(f"listening to {source.name}; Ctrl-C ends")
        await pipeline.run(source, stop=stop)


def _fall_back(chosen: Input) -> Input:
    """Without a wish and without a microphone: the bundled recording, in real time."""
    if chosen.file is not None or chosen.device is not None:
        return chosen
    try:
        if list_devices():
            return replace(chosen, device="")
        why = "no microphone found"
    except DeviceError as error:
        why = str(error)
    _say(f"{why}: listening to the bundled recording in real time")
    return replace(chosen, file=chosen.example, speed=1.0)


def _named(config: Config, chosen: Input) -> Config:
    """The source's topic level, unless the user chose one."""
    if chosen.file is None or "name" in config.source.model_fields_set:
        return config
    source = config.source.model_copy(update={"name": "file"})
    return config.model_copy(update={"source": source})


def _open(chosen: Input, config: Config, on_status: OnStatus) -> AudioSource:
    if chosen.file is None:
        device = chosen.device or None
        return Microphone(device, chunk_ms=config.source.chunk_ms, on_status=on_status)
    chunk_ms = config.source.chunk_ms if chosen.speed is not None else FULL_SPEED_CHUNK_MS
    return FileSource(chosen.file, speed=chosen.speed, chunk_ms=chunk_ms, on_status=on_status)


def _info(recognizer: Recognizer) -> Info:
    bundle = recognizer.bundle
    return Info(
        version=__version__,
        model=Model(id=bundle.id, sha256=bundle.sha256),
        labels=list(bundle.labels),
        licence=bundle.config.licence,
        sources=[recognizer.config.source.name],
    )


def _say(line: str) -> None:
    """To the person who started it; stdout is for results."""
    sys.stderr.write(f"stream-hbaf: {line}\n")
    sys.stderr.flush()
