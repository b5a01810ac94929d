"""What pages are told: everything that happens, and first of all what happened before they came.

A page never holds up the recogniser: what it doesn't take in time waits in a short queue. When
that is full, levels and partials are let go; then the whole queue is, and the page is told anew
all that there is to know.
"""

import asyncio
import json
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any

from stream_hbaf.events import (
    AnyEvent,
    DialogueSummary,
    Event,
    Feedback,
    Level,
    Partial,
    Speech,
    Status,
    Switch,
    Utterance,
)
from stream_hbaf.publish.messages import encode

REMEMBERED = 2000  # utterances, statuses and so on of this run, for pages that come later
WAITING = 256  # messages for one page

Key = tuple[str, ...]


def written(event: Event) -> str:
    """An event as the page gets it: its fields, and its type under ``event``."""
    return f'{{"event":"{type(event).__name__.lower()}",{encode(event).decode()[1:]}'


class History:
    """The newest word on everything: a bounded number of utterances, and how all else stands."""

    def __init__(self) -> None:
        self._told: OrderedDict[Key, tuple[str, str]] = OrderedDict()  # dialogue id, message

    def add(self, event: Event, message: str) -> None:
        """Remember it in place of what it replaces, if it is more than a moment's."""
        key = _key(event)
        if key is None:
            return
        # An utterance stays where it began, so that a page tells them in their order.
        self._told[key] = (getattr(event, "dialogue_id", ""), message)
        if len(self._told) > REMEMBERED:
            oldest = next(key for key in self._told if key[0] in ("utterance", "feedback"))
            del self._told[oldest]

    def forget(self, dialogue_id: str) -> int:
        """Erase a dialogue; returns how many utterances of it there were."""
        erased = [key for key, (of, _) in self._told.items() if of == dialogue_id]
        for key in erased:
            del self._told[key]
        for key in [k for k in self._told if k[0] == "feedback" and ("utterance", k[1]) in erased]:
            del self._told[key]
        return sum(key[0] == "utterance" for key in erased)

    def messages(self) -> list[str]:
        """All of it, oldest first."""
        return [message for _, message in self._told.values()]


def _key(event: Event) -> Key | None:
    match event:
        case Utterance() | Feedback():
            return (type(event).__name__.lower(), event.id)
        case Status():
            return ("status", event.source, event.stage)
        case Switch():
            return ("switch", event.source, event.switch)
        case Speech():
            return ("speech", event.source)
        case Level() | Partial() | DialogueSummary():  # pages sum up for themselves
            return None
        case _:
            return (type(event).__name__,)


class PageQueue:
    """What one page has still to be told; a new page, and one that is too slow, is welcomed."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[bool, str]] = deque()  # whether it may be let go, message
        self._welcome_due = True
        self._arrived = asyncio.Event()
        self._arrived.set()

    def put(self, message: str, *, droppable: bool = False) -> None:
        """Tell the page this, when it has time."""
        if self._welcome_due and not droppable:
            return self._arrived.set()  # it will be told with all else
        if len(self._waiting) >= WAITING:
            self._waiting = deque(one for one in self._waiting if not one[0])
        if len(self._waiting) >= WAITING:
            return self.welcome()
        self._waiting.append((droppable, message))
        self._arrived.set()
        return None

    def welcome(self) -> None:
        """Tell the page everything anew; nothing else that waits is needed then."""
        self._waiting.clear()
        self._welcome_due = True
        self._arrived.set()

    async def next(self) -> str | None:
        """The next message; None when the page is to be welcomed."""
        while True:
            await self._arrived.wait()
            if self._welcome_due:
                self._welcome_due = False
                return None
            if self._waiting:
                return self._waiting.popleft()[1]
            self._arrived.clear()


def is_droppable(event: AnyEvent) -> bool:
    """A moment's news, which the next one replaces."""
    return isinstance(event, Level | Partial)


def welcome(fields: Mapping[str, Any], history: History) -> str:
    """The first message: who recognises here and what pages may ask for, then what happened."""
    head = json.dumps({"event": "welcome", **fields}, ensure_ascii=False)
    return f'{head[:-1]},"history":[{",".join(history.messages())}]}}'
