"""Carries out what is asked of a running recogniser, over MQTT or from the dashboard.

A request that can't be carried out is answered with the reason; it never ends the run.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, Protocol

from stream_hbaf.audio.capture import list_devices
from stream_hbaf.config import Config
from stream_hbaf.errors import ConfigError, StreamHbafError
from stream_hbaf.events import Feedback, Info, Request, Response, SwitchName
from stream_hbaf.features.voice_prints import require_name
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.sessions.format import SpeakerChange

LOG = logging.getLogger(__name__)

Command = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]


class DialogueStore(Protocol):
    """Anything that stores parts of a dialogue: outbox, recorder, dashboard."""

    async def forget(self, dialogue_id: str) -> int:
        """Erase a dialogue; returns how many stored items were erased.

        All of it, or a StreamHbafError after which it can be tried again.
        """


class Recording(Protocol):
    """Anything that records sessions."""

    def record(self, source: str, *, on: bool) -> None:
        """Begin or end the recording of a source. Raises ConfigError where there is no folder."""

    async def correct(self, feedback: Feedback) -> None:
        """Store a correction of an utterance's emotion or speaker."""


class Controls:
    """Carries out requests, switches and corrections on one pipeline."""

    def __init__(
        self,
        pipeline: LivePipeline,
        *,
        info: Callable[[], Info],
        recording: Recording | None,
        stores: Callable[[], Sequence[DialogueStore]],
    ) -> None:
        """``info`` and ``stores`` give the publisher's description and the stores as of now."""
        self._pipeline = pipeline
        self._info = info
        self._recording = recording
        self._stores = stores
        self._loading = asyncio.Lock()  # one bundle after another
        self._wanted = 0  # the number of the newest request for a bundle
        self._retiring: asyncio.Task[None] | None = None  # of the former bundle
        self._commands: dict[str, Command] = {
            "ping": self._ping,
            "reset": self._reset,
            "flush": self._flush,
            "set_model": self._set_model,
            "get_state": self._get_state,
            "forget": self._forget,
            "rename_speaker": self._rename_speaker,
            "merge_speakers": self._merge_speakers,
            "devices": self._devices,
        }

    async def answer(self, request: Request) -> Response:
        """Carry out a command; an error becomes the answer's ``error``."""
        respond = partial(Response, command=request.command, transaction=request.transaction)
        try:
            run = self._commands.get(request.command)
            if run is None:
                raise ConfigError(
                    f"no command '{request.command}'; there is {', '.join(self._commands)}"
                )
            return respond(status="ok", content=await run(request.arguments))
        except StreamHbafError as error:
            return respond(status="error", error=" ".join(str(error).split()))

    async def set_switch(self, source: str, *, switch: SwitchName, on: bool) -> None:
        """Set a switch of a source. Raises ConfigError for a source or switch that isn't there."""
        if switch == "record" and self._recording is None:
            raise ConfigError("record: no folder to write to; start with --record DIR")
        await self._pipeline.set_switch(source, switch, on=on)
        if switch == "record" and self._recording is not None:
            self._recording.record(source, on=on)

    async def correct(self, feedback: Feedback) -> None:
        """Apply the correction of a speaker, and of a label where sets adapt; store either with the
        recorded session.

        Raises ConfigError for an unknown label, and if nothing can be done: the dialogue is over,
        and nothing is recorded.
        """
        labels = self._pipeline.recognizer.bundle.labels
        if not feedback.corrects:
            raise ConfigError("feedback: corrects nothing; give a 'label' or a 'speaker'")
        if feedback.label and feedback.label not in labels:
            raise ConfigError(f"no label '{feedback.label}'; there is {', '.join(labels)}")
        sets = self._pipeline.recognizer.sets
        learned = sets is not None and sets.correct(feedback.id, feedback.label)
        applied = bool(feedback.speaker) and await self._correct_speaker(feedback)
        try:
            if self._recording is None:
                raise ConfigError("feedback: nothing is recorded; start with --record DIR")
            await self._recording.correct(feedback)
        except ConfigError:
            if (feedback.label and not learned) or (feedback.speaker and not applied):
                raise

    async def _correct_speaker(self, feedback: Feedback) -> bool:
        """Whether the utterance is of a dialogue that goes on, where its speaker is corrected."""
        speaker = require_name(feedback.speaker)
        dialogue_id, _, turn = feedback.id.rpartition("-")
        if dialogue_id not in self._pipeline.dialogues().values() or not turn.isdecimal():
            return False
        await self._pipeline.change_speakers(
            SpeakerChange(
                dialogue_id=dialogue_id, change="correct", turn=int(turn[:9]), into=speaker
            )
        )
        return True

    async def _ping(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"time": time.time()}

    async def _reset(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        source = _text(arguments, "source")
        await self._pipeline.cut("request", source=source)
        return {"ended": self._pipeline.end_dialogues(source=source)}

    async def _flush(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        await self._pipeline.cut("request", source=_text(arguments, "source"))
        return {}

    async def _set_model(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if not (name := _text(arguments, "model")):
            raise ConfigError("set_model: give a bundle's name or folder as 'model'")
        self._wanted = number = self._wanted + 1
        async with self._loading:
            if self._retiring is not None:  # two bundles in memory are enough
                await self._retiring
            if number != self._wanted:
                raise ConfigError("set_model: a later request took the place of this one")
            config: Config = self._pipeline.recognizer.config.model_copy(update={"model": name})
            recognizer = await asyncio.to_thread(Recognizer, config)
            former = self._pipeline.swap_recognizer(recognizer)
            await self._pipeline.publish(self._info())
            self._retiring = asyncio.create_task(self._pipeline.retire(former), name="retire")
        return {"model": recognizer.model.id, "sha256": recognizer.model.sha256}

    async def _get_state(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        health = self._pipeline.health().model_dump(by_alias=True)
        switches = {name: dict(pipe.switches) for name, pipe in self._pipeline.sources.items()}
        return {
            **self._info().model_dump(by_alias=True),
            "health": health,
            "switches": switches,
            "dialogues": self._pipeline.dialogues(),
        }

    async def _forget(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if not (dialogue_id := _text(arguments, "dialogue_id")):
            raise ConfigError("forget: give the dialogue's id as 'dialogue_id'")
        # An utterance that is still open would be published, and stored, after the erasure.
        erased = await self._pipeline.finish_dialogue(dialogue_id)
        if (sets := self._pipeline.recognizer.sets) is not None:
            sets.forget(dialogue_id)
        problems: list[str] = []
        for store in self._stores():  # all of them, whatever one raises
            try:
                erased += await store.forget(dialogue_id)
            except StreamHbafError as error:
                problems.append(str(error))
        if problems:
            raise ConfigError(" · ".join(problems))
        return {"erased": erased}

    async def _rename_speaker(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return await self._change_speakers("rename", arguments, into="name")

    async def _merge_speakers(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return await self._change_speakers("merge", arguments, into="into")

    async def _change_speakers(
        self, change: Literal["rename", "merge"], arguments: Mapping[str, Any], *, into: str
    ) -> dict[str, Any]:
        speaker, new = _text(arguments, "speaker"), _text(arguments, into)
        if not speaker or not new:
            raise ConfigError(f"{change}: give the speaker as 'speaker' and the name as '{into}'")
        dialogues = set(self._pipeline.dialogues().values())
        dialogue_id = _text(arguments, "dialogue_id")
        if not dialogue_id and len(dialogues) != 1:
            known = ", ".join(sorted(dialogues)) or "none"
            raise ConfigError(f"give the dialogue's id as 'dialogue_id'; there is {known}")
        changed = await self._pipeline.change_speakers(
            SpeakerChange(
                dialogue_id=dialogue_id or dialogues.pop(),
                change=change,
                speaker=speaker,
                into=require_name(new),
            )
        )
        return {"changed": changed}

    async def _devices(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {"devices": [asdict(one) for one in await asyncio.to_thread(list_devices)]}


def _text(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments.get(name, "")
    if not isinstance(value, str):
        raise ConfigError(f"'{name}' must be text, not {value!r}")
    return value
