"""The models as deployments of Ray Serve: any number of replicas, on any node, without memory.

``Transcribe`` runs Whisper, ``Understand`` all that makes an emotion of words and sound. A request
brings all that its answer depends on, the dialogue's state too: any replica can answer it, and
answers it again if another one died over it.
"""

import asyncio
import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from stream_hbaf.bundle import read_bundle_config
from stream_hbaf.cluster import run_on_each_node
from stream_hbaf.config import Config, TranscriptConfig
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.errors import ConfigError, ModelError, shorten
from stream_hbaf.features.blocks import BlockFrontEnd
from stream_hbaf.features.whisper import Transcriber, Transcript
from stream_hbaf.features.whisper_encoder import decoders
from stream_hbaf.networks.network import State
from stream_hbaf.prediction import Prediction, TextFeatures, whisper_encoder_of
from stream_hbaf.recognizer import Int16, Recognizer, resolve_device
from stream_hbaf.serve.remote import Models, RemoteTranscriber
from stream_hbaf.weights import digest_parts

LOG = logging.getLogger(__name__)
T = TypeVar("T")

HEALTH_EVERY_S = 1.0  # so often a replica is asked whether it lives: a dead one is replaced soon
HEALTH_WITHIN_S = 30.0  # on a busy machine
# Settings of the libraries' threads and caches, which replicas have as the service has.
LIBRARIES = ("OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
# Of a replica, after which the cluster has no room for it, nor a node that it could add. It loads
# weights that are on its node, which takes half a minute on a busy one.
START_WITHIN_S = 300.0
SAID_AFTER_S = 35.0  # Serve says after 30 s what it waits for
LOOK_EVERY_S = 0.2  # whether it has started
STOP_WITHIN_S = 5.0  # for requests that run when a replica is stopped
UNDERSTOOD_AT_ONCE = 4  # requests that a replica of Understand takes: one runs, others travel
# Requests that run or wait, of those that a replica takes at once, above which there should be one
# more replica: by Little's law those that wait, wait for half of a request's time then.
BUSY = 0.75


class Transcribe:
    """Whisper, for as many utterances at once as its node decodes."""

    def __init__(self, config: TranscriptConfig, *, encoder: str | None, device: str) -> None:
        """``encoder`` as ``acoustic_encoder`` of ``Transcriber``."""
        limit_replica_threads()
        device = resolve_device(device)
        self._transcriber = Transcriber(config, acoustic_encoder=encoder, device=device)
        self._threads = ThreadPoolExecutor(decoders(), thread_name_prefix="transcript")

    def encoder_width(self) -> int:
        """As ``Transcriber.encoder_width``."""
        return self._transcriber.encoder_width

    def pid(self) -> int:
        """The number of this replica's process on its node."""
        return os.getpid()

    async def final(self, samples: Int16, speech_score: float, decode: bool) -> Transcript:
        """As ``Transcriber.final``; to cancel the request abandons the transcript."""
        run = partial(self._transcriber.final, samples, speech_score, decode=decode)
        return await self._run(lambda abandon: run(abandon=abandon))

    async def partial(self, samples: Int16) -> Transcript | None:
        """As ``Transcriber.partial``; to cancel the request abandons the transcript."""
        return await self._run(partial(self._transcriber.partial, samples))

    async def _run(self, transcribe: Callable[[Callable[[], bool]], T]) -> T:
        abandoned = threading.Event()
        job = self._threads.submit(transcribe, abandoned.is_set)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            abandoned.set()
            raise


class Understand:
    """A bundle: text features, the voice's embeddings, and steps of the network."""

    def __init__(self, config: Config, transcribe: DeploymentHandle[Any]) -> None:
        limit_replica_threads()

        def load() -> Recognizer:  # in a thread, from which requests may be waited for
            return Recognizer(config, transcriber=RemoteTranscriber(transcribe))

        self._thread = ThreadPoolExecutor(1, thread_name_prefix="understand")
        self._recognizer = self._thread.submit(load).result()
        self._device = torch.device(resolve_device(config.device))

    def pid(self) -> int:
        """The number of this replica's process on its node."""
        return os.getpid()

    async def measure(self, samples: Int16) -> Mapping[str, np.ndarray]:
        """As ``BlockFrontEnd.measure``."""
        front_end = self._recognizer.acoustic
        assert isinstance(front_end, BlockFrontEnd)  # else it isn't asked for
        return await self._run(front_end.measure, samples)

    async def encode_text(self, transcript: Transcript, **named: Any) -> TextFeatures:
        """As ``Recognizer.encode_text``."""
        return await self._run(self._recognizer.encode_text, transcript, **named)

    async def classify(self, *, state: State, **named: Any) -> tuple[Prediction, State]:
        """As ``Recognizer.classify``."""
        own = _moved(state, self._device)
        prediction, after = await self._run(self._recognizer.classify, state=own, **named)
        return prediction, _moved(after, torch.device("cpu"))

    async def classify_final(
        self, dialogue: LiveDialogue, **named: Any
    ) -> tuple[Prediction, LiveDialogue]:
        """As ``Recognizer.classify_final``, with the dialogue as it is then."""
        own = _dialogue_on(self._device, dialogue)
        prediction = await self._run(self._recognizer.classify_final, dialogue=own, **named)
        return prediction, _dialogue_on(torch.device("cpu"), own)

    async def _run(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        run = partial(function, *arguments, **named)
        return await asyncio.get_running_loop().run_in_executor(self._thread, run)


def limit_replica_threads() -> None:
    """Keep torch's threads from delaying those of other replicas."""
    torch.set_num_threads(1)


def _moved(state: State, device: torch.device) -> State:
    return state.map(lambda tensor: tensor.to(device))


def _dialogue_on(device: torch.device, dialogue: LiveDialogue) -> LiveDialogue:
    past = (replace(one, state=_moved(one.state, device)) for one in dialogue.past)
    state = _moved(dialogue.state, device)
    return replace(dialogue, state=state, past=deque(past, maxlen=dialogue.past.maxlen))


def bind_models(config: Config) -> tuple[serve.Application, serve.Application]:
    """``Transcribe`` and ``Understand``, bound for ``serve.run``."""
    words = _bind_transcribe(config)
    return words, _bind_understand(config, words)


def _bind_transcribe(config: Config) -> serve.Application:
    deployment: Any = serve.deployment(Transcribe)  # its types know of decorators only
    bound: serve.Application = deployment.options(
        **_options(config, cpus=1, at_once=decoders())
    ).bind(config.transcript, encoder=_encoder_of(config), device=config.device)
    return bound


def _bind_understand(config: Config, transcribe: object) -> serve.Application:
    """``transcribe`` is bound, or the handle of one that runs."""
    deployment: Any = serve.deployment(Understand)
    bound: serve.Application = deployment.options(
        **_options(config, cpus=0.5, at_once=UNDERSTOOD_AT_ONCE)
    ).bind(model_settings(config), transcribe)
    return bound


def _encoder_of(config: Config) -> str | None:
    return whisper_encoder_of(read_bundle_config(config.model))


def _options(config: Config, *, cpus: float, at_once: int) -> dict[str, Any]:
    return {
        "max_ongoing_requests": at_once,
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": config.serve.replicas,
            "target_ongoing_requests": BUSY * at_once,
        },
        "ray_actor_options": {
            "num_cpus": cpus,
            "num_gpus": config.serve.gpus_each,
            "runtime_env": {
                "env_vars": {name: os.environ[name] for name in LIBRARIES if name in os.environ}
            },
        },
        **health_options(),
    }


def health_options() -> dict[str, Any]:
    """When a replica counts as dead, and how long one that is stopped has."""
    return {
        "health_check_period_s": HEALTH_EVERY_S,
        "health_check_timeout_s": HEALTH_WITHIN_S,
        "graceful_shutdown_timeout_s": STOP_WITHIN_S,
    }


def model_settings(config: Config) -> Config:
    """The settings that answers depend on, without passwords: all that replicas are given.

    The deployment's prior is its owner's, who sends what has been learned with each request.
    """
    kept = ("model", "device", "inferences", "transcript")
    return Config(**{name: getattr(config, name) for name in kept})


def deploy(config: Config, *, abandon: Callable[[], bool] = lambda: False) -> Models:
    """Have replicas of the models run on the cluster that is connected, and wait for them.

    Those that another service has started with the same settings are shared, and ``Transcribe`` by
    all bundles that want the same of it; they stay when this one ends. Raises ConfigError for a
    node without the weights, ModelError if they don't start or once ``abandon()`` is true.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    require_weights(config)
    serve.start(proxy_location="Disabled")  # requests come from Python alone
    size = config.serve.model_dump_json(include={"replicas", "gpus_each"})
    of_words = (config.transcript.model_dump_json(), _encoder_of(config), config.device, size)
    run = partial(_run, abandon=abandon)
    transcribe = run(Transcribe, _bind_transcribe(config), settings=of_words)
    of_all = (model_settings(config).model_dump_json(), size)
    understand = run(Understand, _bind_understand(config, transcribe), settings=of_all)
    return models_behind(transcribe, understand, replicas=config.serve.replicas)


def _run(
    kind: type,
    bound: serve.Application,
    *,
    settings: tuple[str | None, ...],
    abandon: Callable[[], bool],
) -> DeploymentHandle[Any]:
    """The handle of an application that has these settings; it is started if there is none."""
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    name = f"stream-hbaf-{kind.__name__.lower()}-{digest}"
    if _status(name) != "RUNNING":
        target = serve.RunTarget(bound, name=name, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)
    began, warned = time.monotonic(), False
    while (status := _status(name)) != "RUNNING":
        if abandon():
            raise ModelError(f"ended before replicas of {kind.__name__} had started")
        late = time.monotonic() > began + START_WITHIN_S
        if late or status == "DEPLOY_FAILED":
            why = f" within {START_WITHIN_S:g} s" if late else ""
            raise ModelError(f"replicas of {kind.__name__} don't start{why}: {_reason(name)}")
        if not warned and time.monotonic() > began + SAID_AFTER_S:
            LOG.warning("waiting for replicas of %s: %s", kind.__name__, _reason(name))
            warned = True
        time.sleep(LOOK_EVERY_S)
    return serve.get_deployment_handle(kind.__name__, app_name=name)


def _status(application: str) -> str:
    known = serve.status().applications.get(application)
    return known.status if known is not None else ""


def models_behind(
    transcribe: DeploymentHandle[Any], understand: DeploymentHandle[Any], *, replicas: int
) -> Models:
    """The models behind two handles."""
    return Models(transcribe, understand, decoders=replicas * decoders())


def require_weights(config: Config) -> None:
    """Raise ConfigError if a node of the cluster lacks the weights, or has others than this one."""
    models = model_settings(config)
    here = weights_of(models)
    for node, there in run_on_each_node(weights_of, models).items():
        for part in here.keys() | there.keys():
            if here.get(part) != there.get(part):
                lacks = "has no weights" if part not in there else "has other weights"
                raise ConfigError(
                    f"node {node}: {lacks} {part} than this one; install the same packages and "
                    "models on every node"
                )


def weights_of(config: Config) -> dict[str, str]:
    """The digests of the bundle and of the weights that it needs, on this machine, by part."""
    bundle = read_bundle_config(config.model)
    parts = [*bundle.parts, f"whisper:{config.transcript.model}"]
    return digest_parts(parts, known=bundle.digests, bundle=bundle.id)


def _reason(application: str) -> str:
    """Why an application doesn't start, in one line."""
    known = serve.status().applications.get(application)
    messages = [one.message for one in known.deployments.values() if one.message] if known else []
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return shorten(lines[-1] if lines else "see 'serve status'", limit=400)
