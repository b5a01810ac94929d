"""The stages of one source: runs their models on its utterances, and reports their states."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from stream_hbaf.errors import UTTERANCE_ERRORS
from stream_hbaf.events import Stage, State, Status
from stream_hbaf.live.runtime import Runtime, Thread
from stream_hbaf.live.utterance import LiveUtterance

T = TypeVar("T")


class SourceStages:
    """What works and what doesn't, of everything that a source's sound passes through."""

    def __init__(
        self, runtime: Runtime, source: str, *, on_report: Callable[[str], Awaitable[None]]
    ) -> None:
        """``on_report`` gets the detail of each state that is published."""
        self._runtime = runtime
        self._source = source
        self._on_report = on_report
        self._states: dict[Stage, State] = {}

    async def attempt(
        self,
        utterance: LiveUtterance,
        stage: Stage,
        model: Callable[..., T],
        *arguments: object,
        thread: Thread | None = None,
    ) -> T | None:
        """Run a model on one utterance; if it fails, report that and go on without its result.

        It runs in the stage's own thread, unless another one is given.
        """
        try:
            result = await self._runtime.run_model(thread or stage, model, *arguments)
        except UTTERANCE_ERRORS as error:
            reason = reason_of(error)
            utterance.failures[stage] = reason
            await self.report(stage, "degraded", reason)
            return None
        if stage != "acoustic":  # a later attempt makes up for an earlier one
            utterance.failures.pop(stage, None)
        await self.report(stage, "online")
        return result

    async def report(self, stage: Stage, state: State, detail: str = "") -> None:
        """Publish a stage's state if it has changed."""
        if self._states.get(stage) != state or (detail and stage == "capture"):
            self._states[stage] = state
            await self._runtime.publish(
                Status(source=self._source, stage=stage, state=state, detail=detail)
            )
            await self._on_report(detail)


def reason_of(error: Exception) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()) or type(error).__name__
