"""A ``Control`` that stores what it is asked for, for tests of MQTT requests and of the page."""

import asyncio
from collections.abc import Collection, Mapping

from stream_hbaf.errors import ConfigError
from stream_hbaf.events import Feedback, Request, Response, SwitchName

Call = Request | Feedback | tuple[str, SwitchName, bool]


class RecordingControl:
    """Answers each command with its arguments.

    ``failures`` are raised for their commands; labels other than ``labels``, if there are some,
    are refused.
    """

    def __init__(
        self, *, failures: Mapping[str, Exception] | None = None, labels: Collection[str] = ()
    ) -> None:
        self.calls: list[Call] = []
        self.pause_s = 0.0  # before each answer
        self._failures = failures or {}
        self._labels = labels

    @property
    def requests(self) -> list[Request]:
        return [call for call in self.calls if isinstance(call, Request)]

    @property
    def corrections(self) -> list[Feedback]:
        return [call for call in self.calls if isinstance(call, Feedback)]

    @property
    def switched(self) -> list[tuple[str, SwitchName, bool]]:
        return [call for call in self.calls if isinstance(call, tuple)]

    async def answer(self, request: Request) -> Response:
        await asyncio.sleep(self.pause_s)
        self.calls.append(request)
        if request.command in self._failures:
            raise self._failures[request.command]
        return Response(
            command=request.command,
            status="ok",
            content=request.arguments,
            transaction=request.transaction,
        )

    async def set_switch(self, source: str, *, switch: SwitchName, on: bool) -> None:
        self.calls.append((source, switch, on))

    async def correct(self, feedback: Feedback) -> None:
        if self._labels and feedback.label and feedback.label not in self._labels:
            raise ConfigError(f"no label '{feedback.label}'")
        self.calls.append(feedback)
