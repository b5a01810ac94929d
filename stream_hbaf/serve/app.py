"""The whole service as an application of Ray Serve.

    serve run stream_hbaf.serve.app:build config=settings.yaml serve.checkpoints=/shared/streams

``Session`` owns the connections and their dialogues; Ray starts it again, on any node, when it is
killed. Its clients connect to its own port, not to Serve's: a proxy would have a share in every
message of a connection that lasts for hours.
"""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from stream_hbaf.config import Config, load_config
from stream_hbaf.serve.remote import RemoteRecognizer
from stream_hbaf.serve.replicas import bind_models, health_options, models_behind
from stream_hbaf.serve.service import serve_streams


def build(settings: Mapping[str, str]) -> serve.Application:
    """The application, from settings by name as ``--set`` takes them; ``config`` is their file."""
    given = dict(settings)
    file = given.pop("config", None)
    overrides = {"mqtt.url": "none", **given}  # a broker of its own would move with the session
    config = load_config(file=Path(file) if file else None, environ=os.environ, overrides=overrides)
    deployment: Any = serve.deployment  # its types know of decorators only
    session = deployment(Session).options(
        num_replicas=1, ray_actor_options={"num_cpus": 1}, **health_options()
    )
    application: serve.Application = session.bind(config, *bind_models(config))
    return application


class Session:
    """The service's process: all connections, and what is remembered between their utterances."""

    def __init__(
        self, config: Config, transcribe: DeploymentHandle[Any], understand: DeploymentHandle[Any]
    ) -> None:
        models = models_behind(transcribe, understand, replicas=config.serve.replicas)
        started: Future[None] = Future()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()

        async def run() -> None:
            await serve_streams(
                config,
                lambda config: RemoteRecognizer(config, models),
                tell=logging.getLogger("ray.serve").info,
                on_started=lambda: started.set_result(None),
                stop=self._stop,
            )

        def work() -> None:
            try:
                self._loop.run_until_complete(run())
            except BaseException as error:
                if not started.done():
                    started.set_exception(error)
                    return
                raise

        # A loop of its own: Serve's own calls must not wait for sound, nor sound for them.
        self._thread = threading.Thread(target=work, name="session", daemon=True)
        self._thread.start()
        started.result()

    async def __call__(self, request: Any) -> str:
        """Answer a probe over HTTP."""
        return "ok\n"

    def pid(self) -> int:
        """The number of its process on its node."""
        return os.getpid()

    def check_health(self) -> None:
        """Raise RuntimeError once it has ended: Serve then starts another one."""
        if not self._thread.is_alive():
            raise RuntimeError("the service has ended; see its log")

    def __del__(self) -> None:
        if not sys.is_finalizing() and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout=5.0)
