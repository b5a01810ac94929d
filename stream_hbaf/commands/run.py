"""Runs the recogniser: opens sources, broker, models and publishers, recognises, closes them."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from stream_hbaf.audio.capture import list_devices
from stream_hbaf.audio.open_source import open_source
from stream_hbaf.audio.source import AudioSource, OnStatus
from stream_hbaf.audio.wyoming import WyomingSource
from stream_hbaf.cluster import connected
from stream_hbaf.commands import print_status
from stream_hbaf.config import Config, SourceConfig
from stream_hbaf.errors import DeviceError
from stream_hbaf.events import State
from stream_hbaf.features.turn_model import choose_engine
from stream_hbaf.live.answers import Answers
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.publish.terminal import JsonLines, Terminal
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.running import Run, load_optional, sources_of, with_broker

if TYPE_CHECKING:  # extras
    from stream_hbaf.dashboard.server import Dashboard

T = TypeVar("T")

EXAMPLE = Path(__file__).parent.parent / "audio" / "example.flac"
# At full speed, larger chunks save switches between threads; they never change the result.
FULL_SPEED_CHUNK_MS = 320


async def listen(config: Config, *, speed: float | None, json: bool) -> None:
    """Recognise until all sources end, or Ctrl-C or SIGTERM asks for the end.

    ``speed`` is that of recordings, in times real time; None: as fast as they are processed.
    Raises a StreamHbafError if a source, the broker, the models or a publisher can't be opened.
    """
    stop = asked_to_stop()
    config, speed = _fall_back(choose_engine(config), speed)
    async with contextlib.AsyncExitStack() as opened:
        optional = load_optional(config)
        pipelines: list[LivePipeline] = []

        def report(source: str, state: State, detail: str) -> None:
            for pipeline in pipelines:
                pipeline.report_capture(state, detail, source=source)

        sources: dict[SourceConfig, AudioSource] = {}
        for source in sources_of(config):
            found = _open_source(
                source, speed, optional.page, on_status=partial(report, source.name)
            )
            entered = await _unless(stop, opened.enter_async_context(found))
            if entered is None:
                return
            sources[source] = entered
        config = await with_broker(config, opened)
        print_status("loading the models")
        recognizer = await asyncio.to_thread(Recognizer, config)
        run = Run(config, recognizer, optional, tell=print_status)
        opened.callback(lambda: run.pipeline.recognizer.close())  # it may have been swapped
        answering = {one.name: s for one, s in sources.items() if isinstance(s, WyomingSource)}
        await run.start(Answers(answering), JsonLines(stop=stop) if json else Terminal())
        pipelines.append(run.pipeline)
        names = ", ".join(source.name for source in sources)
        print_status(f"listening to {names}; Ctrl-C ends")
        await run.pipeline.run(sources, stop=stop, beside=[run.publish_health()])


async def serve(config: Config, *, json: bool) -> None:
    """Serve until Ctrl-C or SIGTERM asks for the end.

    Raises a StreamHbafError if the port, the broker, the models or a publisher can't be opened.
    """
    from stream_hbaf.serve.service import serve_streams  # 0.2 s that other runs need not spend

    stop = asked_to_stop()
    with contextlib.ExitStack() as opened:
        load: Callable[[Config], Recognizer] = Recognizer
        if config.serve.ray is not None:
            # Not in the main thread, where Ray would handle SIGTERM.
            await asyncio.to_thread(opened.enter_context, connected(config.serve.ray))
            set_on_signals(stop)  # Ray has set handlers that abort
            load = partial(_deploy, abandon=stop.is_set)
        screen = JsonLines(stop=stop) if json else Terminal()
        await serve_streams(config, load, screens=[screen], tell=print_status, stop=stop)


def _deploy(config: Config, *, abandon: Callable[[], bool]) -> Recognizer:
    """A recogniser whose models are replicas on the cluster that is connected."""
    from stream_hbaf.serve.remote import RemoteRecognizer
    from stream_hbaf.serve.replicas import deploy

    return RemoteRecognizer(config, deploy(config, abandon=abandon))


def asked_to_stop() -> asyncio.Event:
    """An event that Ctrl-C and SIGTERM set."""
    stop = asyncio.Event()
    set_on_signals(stop)
    return stop


def set_on_signals(stop: asyncio.Event) -> None:
    """Have Ctrl-C and SIGTERM set an event, whatever they did before."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)


async def _unless(stop: asyncio.Event, opening: Coroutine[object, object, T]) -> T | None:
    """Open something that may have to be waited for, such as a pipe; None if ``stop`` is set."""
    task, stopping = asyncio.ensure_future(opening), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        stopping.cancel()


def _fall_back(config: Config, speed: float | None) -> tuple[Config, float | None]:
    """Play the bundled recording in real time if no source was given and no microphone is there."""
    if config.sources or "where" in config.source.model_fields_set:
        return config, speed
    try:
        if list_devices():
            return config, speed
        why = "no microphone found"
    except DeviceError as error:
        why = str(error)
    print_status(f"{why}: listening to the bundled recording in real time")
    source = config.source.model_copy(update={"where": str(EXAMPLE)})
    return config.model_copy(update={"source": source}), 1.0


def _open_source(
    source: SourceConfig, speed: float | None, page: "Dashboard | None", *, on_status: OnStatus
) -> AudioSource:
    if source.where == "browser" and page is not None:
        return page.microphone(source, on_status=on_status)
    return open_source(
        source.where,
        speed=speed,
        token=source.token.get_secret_value() if source.token else None,
        channel=source.channel,
        chunk_ms=FULL_SPEED_CHUNK_MS if speed is None else source.chunk_ms,
        on_status=on_status,
    )
