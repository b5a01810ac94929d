"""What others may ask of a running recogniser, over MQTT or from the page: every wish in one place.

A wish that can't be granted is an answer that says why, never the end of the run.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from stream_hbaf.audio.capture import list_devices
from stream_hbaf.config import Config
from stream_hbaf.errors import ConfigError, StreamHbafError
from stream_hbaf.events import Feedback, Info, Request, Response, SwitchName
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.recognizer import Recognizer

LOG = logging.getLogger(__name__)

Answer = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]
FINISH_S = 60.0  # an utterance that began with the former bundle is over by then


class Remembering(Protocol):
    """Whoever keeps something of a dialogue."""

    async def forget(self, dialogue_id: str) -> int:
        """Erase it; returns how many things that were."""


class Recording(Protocol):
    """Whoever writes sessions down."""

    def record(self, source: str, *, on: bool) -> None:
        """Begin or end the recording of a source. Raises ConfigError where there is no folder."""

    async def correct(self, feedback: Feedback) -> None:
        """Keep what somebody says that an utterance's emotion was."""


class Controls:
    """Grants what is asked of one pipeline."""

    def __init__(
        self,
        pipeline: LivePipeline,
        *,
        info: Callable[[], Info],
        recording: Recording | None,
        remembering: Callable[[], Sequence[Remembering]],
    ) -> None:
        """``info`` tells who publishes here, and ``remembering`` who keeps something, now."""
        self._pipeline = pipeline
        self._info = info
        self._recording = recording
        self._remembering = remembering
        self._loading = asyncio.Lock()  # one bundle after another
        self._answers: dict[str, Answer] = {
            "ping": self._ping,
            "reset": self._reset,
            "flush": self._flush,
            "set_model": self._set_model,
            "get_state": self._get_state,
            "forget": self._forget,
            "devices": self._devices,
        }

    async def answer(self, request: Request) -> Response:
        """Do what is asked; what can't be done is said in the answer."""
        found = partial(Response, command=request.command, transaction=request.transaction)
        try:
            answer = self._answers.get(request.command)
            if answer is None:
                raise ConfigError(
                    f"no command '{request.command}'; there is {', '.join(self._answers)}"
                )
            return found(status="ok", content=await answer(request.arguments))
        except StreamHbafError as error:
            return found(status="error", error=" ".join(str(error).split()))

    async def set_switch(self, source: str, *, switch: SwitchName, on: bool) -> None:
        """Set a switch of a source. Raises ConfigError where that can't be."""
        if switch == "record" and self._recording is None:
            raise ConfigError("record: no folder to write to; start with --record DIR")
        await self._pipeline.turn(source, switch, on=on)
        if switch == "record" and self._recording is not None:
            self._recording.record(source, on=on)

    async def correct(self, feedback: Feedback) -> None:
        """Take a correction; it is kept where the session is recorded."""
        labels = self._pipeline.recognizer.bundle.labels
        if feedback.label not in labels:
            raise ConfigError(f"no label '{feedback.label}'; there is {', '.join(labels)}")
        if self._recording is None:
            raise ConfigError("feedback: nothing is recorded; start with --record DIR")
        await self._recording.correct(feedback)

    async def _ping(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        return {"time": time.time()}

    async def _reset(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        await self._pipeline.cut("request", source=_text(asked, "source"))
        return {"ended": self._pipeline.restart(source=_text(asked, "source"))}

    async def _flush(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        await self._pipeline.cut("request", source=_text(asked, "source"))
        return {}

    async def _set_model(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        name = _text(asked, "model")
        if not name:
            raise ConfigError("set_model: give a bundle's name or folder as 'model'")
        async with self._loading:
            config: Config = self._pipeline.recognizer.config.model_copy(update={"model": name})
            recognizer = await asyncio.to_thread(Recognizer, config)
            former = self._pipeline.take(recognizer)
            await self._pipeline.tell(self._info())
            # What began with it is still being finished.
            asyncio.get_running_loop().call_later(FINISH_S, former.close)
        return {"model": recognizer.model.id, "sha256": recognizer.model.sha256}

    async def _get_state(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        health = self._pipeline.health().model_dump(by_alias=True)
        switches = {name: dict(pipe.switches) for name, pipe in self._pipeline.sources.items()}
        return {
            **self._info().model_dump(by_alias=True),
            "health": health,
            "switches": switches,
            "dialogues": self._pipeline.dialogues(),
        }

    async def _forget(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        dialogue_id = _text(asked, "dialogue_id")
        if not dialogue_id:
            raise ConfigError("forget: give the dialogue's id as 'dialogue_id'")
        # What is being said would be told, and kept, after it was forgotten.
        erased = await self._pipeline.end_dialogue(dialogue_id)
        for keeper in self._remembering():
            erased += await keeper.forget(dialogue_id)
        return {"erased": erased}

    async def _devices(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        found = await asyncio.to_thread(list_devices)
        return {
            "devices": [
                {
                    "index": device.index,
                    "name": device.name,
                    "channels": device.channels,
                    "rate_hz": device.rate_hz,
                    "is_default": device.is_default,
                }
                for device in found
            ]
        }


def _text(asked: Mapping[str, Any], name: str) -> str:
    value = asked.get(name, "")
    if not isinstance(value, str):
        raise ConfigError(f"'{name}' must be text, not {value!r}")
    return value
