"""The service for streams as one run: port, broker, recogniser, pipeline and publishers."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from stream_hbaf.config import Config
from stream_hbaf.features.turn_model import choose_engine
from stream_hbaf.live.runtime import Publisher
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.running import Run, load_optional, with_broker
from stream_hbaf.serve.server import StreamServer


async def serve_streams(
    config: Config,
    load: Callable[[Config], Recognizer],
    *,
    screens: Sequence[Publisher] = (),
    tell: Callable[[str], None],
    on_started: Callable[[], None] = lambda: None,
    stop: asyncio.Event,
) -> None:
    """Serve until ``stop`` is set.

    ``load`` loads the recogniser, in a thread; ``tell`` gets lines for who started the service;
    ``screens`` get all events. Raises a StreamHbafError if the port, the broker, the models or a
    publisher can't be opened.
    """
    config = choose_engine(config)
    async with contextlib.AsyncExitStack() as opened:
        optional = load_optional(config)
        server = StreamServer(config.serve)
        await server.open()
        config = await with_broker(config, opened)
        tell("loading the models")
        recognizer = await asyncio.to_thread(load, config)
        run = Run(config, recognizer, optional, tell=tell, serving=True)
        opened.callback(lambda: run.pipeline.recognizer.close())  # it may have been swapped
        server.pipeline = run.pipeline
        await run.start(server, *screens)
        tell(f"serving up to {server.max_streams} streams at {server.url}; Ctrl-C ends")
        on_started()
        beside = [run.publish_health(), server.start()]
        await run.pipeline.run({}, stop=stop, beside=beside)
