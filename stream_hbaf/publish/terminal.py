"""Output on the terminal: a run's level meter, running transcript and utterances, or JSON lines.

The ``watch`` command prints the messages of any recogniser, as they are published.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from pydantic_core import from_json
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress, TextColumn
from rich.text import Text

from stream_hbaf.errors import printable
from stream_hbaf.events import (
    AnyEvent,
    Emotion,
    Event,
    Inferred,
    Level,
    Partial,
    Speech,
    Status,
    Utterance,
)
from stream_hbaf.publish.connection import Received
from stream_hbaf.untrusted import as_unicode

LOG = logging.getLogger(__name__)

COLOURS = {
    "anger": "red",
    "disgust": "green",
    "fear": "magenta",
    "joy": "yellow",
    "neutral": "white",
    "sadness": "blue",
    "surprise": "cyan",
}
CONFLICT = "≠"  # voice alone and words alone contradict each other
REVISED = "↺"  # an utterance of before, whose speaker is another than it was
UNSURE = 0.8  # probability of a speaker below which the name has a question mark
REDRAW_S = 0.1  # at least, between two redraws of the bottom line
QUIETEST_DBFS, LOUDEST_DBFS = -60.0, -10.0
METER_WIDTH = 8
BAR_WIDTH = 10
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Terminal:
    """Prints events for people: to a terminal of any width with a live bottom line, or to a file.

    In a file each utterance is one plain line, and its inferences are another.
    """

    def __init__(self, *, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._level = Level(source="", dbfs=QUIETEST_DBFS, speech=False)
        self._running = ""  # the running transcript
        self._provisional = ""  # its label
        self._changed = asyncio.Event()

    async def send(self, event: AnyEvent) -> None:
        """Print an utterance that has ended, and keep what the bottom line shows."""
        self._changed.set()
        match event:
            case Level():
                self._level = event
            case Partial():
                self._running, self._provisional = event.text, event.emotion.label
            case Utterance(type="update", emotion=emotion):
                self._running = event.text
                self._provisional = emotion.label if emotion else ""
            case Utterance(type="end", revision=int()):
                self._console.print(_revised(event), soft_wrap=not self._console.is_terminal)
            case Utterance(type="end"):
                self._running = self._provisional = ""
                # Lines are wrapped on a terminal only.
                soft_wrap = not self._console.is_terminal
                self._console.print(self._utterance(event), soft_wrap=soft_wrap)
            case Speech(on=True):
                self._running = self._provisional = ""
            case Status(state="online", detail=""):
                return
            case Status():
                self._console.print(Text(f"{event.stage} {event.state}: {event.detail}", "dim"))

    async def run(self) -> None:
        """Redraw the bottom line when events change it, until cancelled."""
        if not self._console.is_terminal:
            await asyncio.Event().wait()
        drawn = ""
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while True:
                line = self._line()
                if line.plain != drawn:
                    drawn = line.plain
                    live.update(line, refresh=True)
                await asyncio.sleep(REDRAW_S)
                await self._changed.wait()
                self._changed.clear()

    async def close(self, timeout_s: float) -> None:
        """Do nothing: ``send`` has printed everything."""

    def _line(self) -> Text:
        """The bottom line: level meter, speech or not, and the end of the running transcript."""
        share = (self._level.dbfs - QUIETEST_DBFS) / (LOUDEST_DBFS - QUIETEST_DBFS)
        lit = round(min(1.0, max(0.0, share)) * METER_WIDTH)
        mark, style = ("● ", "red") if self._level.speech else ("○ ", "dim")
        line = Text().append(mark, style)
        line.append("▮" * lit, "green").append("·" * (METER_WIDTH - lit), "dim").append(" ")
        if not self._level.speech:
            return line.append("listening", "dim")
        label = f"{self._provisional}? " if self._provisional else ""
        line.append(label, COLOURS.get(self._provisional, ""))
        room = max(0, self._console.width - line.cell_len - 1)
        text = self._running or "…"
        return line.append(text if len(text) <= room else "…" + text[-room + 1 :])

    def _utterance(self, event: Utterance) -> Group:
        emotion = event.emotion
        label = emotion.label if emotion else "unknown"
        doubt = "?" if emotion and emotion.abstained else ""
        score = f" {emotion.score:.0%}" if emotion and emotion.score is not None else ""
        clock = datetime.fromisoformat(event.start_time).astimezone().strftime("%H:%M:%S")
        style = f"bold {COLOURS.get(label, 'white')}"
        head = Text().append(f"{clock} ", "dim").append(f"{label}{doubt}{score} ", style)
        if event.conflict:
            head.append(f"{CONFLICT} ", "bold")
        head.append(_speaker(event))
        head.append(event.text or "(no words)")
        lines = [head, *_inferences(event.inferences)]
        if not self._console.is_terminal:
            return Group(*lines)
        below = self._bars(emotion) if emotion else Text()
        return Group(*lines, below, self._footer(event))

    def _bars(self, emotion: Emotion) -> Columns:
        """A bar for each label; labels outside the prediction set are dimmed."""
        cells = []
        for label, probability in emotion.probabilities.items():
            lit = round(probability * BAR_WIDTH)
            cell = Text(f"  {label:<9}", "" if label in emotion.set else "dim")
            cell.append("█" * lit, COLOURS.get(label, "")).append("░" * (BAR_WIDTH - lit), "dim")
            cells.append(cell.append(f"{probability:>4.0%}"))
        return Columns(cells, padding=(0, 1))

    def _footer(self, event: Utterance) -> Text:
        if event.latency_ms is None:
            return Text()
        confirmed, total = event.latency_ms.vad, event.latency_ms.total
        spent = f"  {confirmed:.0f} ms to confirm the end, then {total - confirmed:.0f} ms"
        return Text(f"{spent}  {event.degraded}".rstrip(), "dim")


def _speaker(event: Utterance) -> str:
    """``Ann: ``, with a question mark where the voice says so without certainty; or nothing."""
    doubt = "?" if event.speaker_score is not None and event.speaker_score < UNSURE else ""
    return f"{event.speaker}{doubt}: " if event.speaker or doubt else ""


def _revised(event: Utterance) -> Text:
    """One dimmed line: what of an earlier utterance is known better now."""
    clock = datetime.fromisoformat(event.start_time).astimezone().strftime("%H:%M:%S")
    label = f"{event.emotion.label} " if event.emotion else ""
    words = event.text or "(no words)"
    return Text(f"{clock} {REVISED} {label}{_speaker(event)}{words}", "dim")


def _inferences(inferred: Inferred | None) -> list[Text]:
    """One dimmed line, or none."""
    if inferred is None:
        return []
    phrases_by_head = {
        "others feel": inferred.external,
        "the speaker feels": inferred.internal,
        "the speaker wants": inferred.purpose,
    }
    parts = [f"{head}: {', '.join(said)}" for head, said in phrases_by_head.items() if said]
    return [Text(f"  {' · '.join(parts)}", "dim")] if parts else []


class JsonLines:
    """Writes events, except levels, as one JSON object a line.

    A thread writes, because a pipe blocks when its reader is slow. Meanwhile partials are dropped,
    and other events wait. When the reader has closed the pipe, ``stop`` is set. A full disk is
    logged, and ends nothing.
    """

    def __init__(self, *, stop: asyncio.Event, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._stop = stop
        self._closed = False  # by the reader
        self._failing = False  # the disk behind it refuses
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="stdout")
        self._writing = 0

    async def send(self, event: AnyEvent) -> None:
        """Write an event; returns when it is written."""
        if isinstance(event, Level) or (isinstance(event, Partial) and self._writing):
            return
        self._writing += 1
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._writer, self._write, event_line(event))
        except BrokenPipeError:
            self._closed = True
            self._stop.set()
        finally:
            self._writing -= 1

    async def run(self) -> None:
        """Wait until cancelled: ``send`` writes."""
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        """End the thread, without waiting for a reader that is slow."""
        self._writer.shutdown(wait=False)

    def _write(self, line: str) -> None:
        if self._out.closed:
            raise BrokenPipeError
        if self._closed:
            return
        try:
            self._out.write(line + "\n")
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self._failing:
                LOG.warning("stdout: can't be written (%s); make room", error.strerror)
            self._failing = True
        else:
            self._failing = False


def event_line(event: Event) -> str:
    """One JSON object: the event's fields, and its type in ``event``."""
    fields = event.model_dump(mode="json", by_alias=True, exclude_none=True)
    return _json({"event": type(event).__name__.lower(), **fields})


def _json(fields: dict[str, Any]) -> str:
    """One line that UTF-8 can hold, whatever the names in it are."""
    return as_unicode(json.dumps(fields, ensure_ascii=False))


@contextlib.contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int, Path], None]]:
    """A progress bar on stderr; yields a function of the files done, all files, and the newest."""
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[file]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, file="")

        def update(done: int, total: int, file: Path) -> None:
            bar.update(task, completed=done, total=total, file=file.name)

        yield update


async def watch(
    received: AsyncGenerator[Received, None], *, prefix: str, out: TextIO, json: bool
) -> None:
    """Print the messages under a prefix, as they are received. Raises BrokenPipeError when
    nobody reads ``out`` any more."""
    colours = not json and out.isatty() and "NO_COLOR" not in os.environ
    async with contextlib.aclosing(received):
        async for message in received:
            line = json_line(message) if json else _dimmed(message, prefix=prefix, colours=colours)
            print(line, file=out, flush=True)


def json_line(message: Received) -> str:
    """``{"topic": …, "payload": …}``; the payload is an object if it holds one, else text."""
    payload = _decode(message.payload)
    return _json({"topic": message.topic, "payload": payload})


def human_line(message: Received, *, prefix: str, at: datetime) -> str:
    """Time, node and source, and the content, in one printable line."""
    node, _, rest = message.topic.removeprefix(f"{prefix}/").partition("/")
    source, _, kind = rest.partition("/")
    payload = _decode(message.payload)
    where = f"{node}/{source}" if kind else node
    is_utterance = kind in ("utterance", "partial")
    content = payload
    if isinstance(payload, dict):
        plain = [f"{k}={v}" for k, v in payload.items() if isinstance(v, str | int | float)]
        content = _utterance(payload) if is_utterance else "  ".join(plain)
    what = content if is_utterance else f"{kind or rest} {content}"
    # Anybody may publish, and control characters could control the terminal.
    return printable(f"{at:%H:%M:%S}  {where}  {what}")


def _dimmed(message: Received, *, prefix: str, colours: bool) -> str:
    """A line for people; one that is not final is dimmed."""
    line = human_line(message, prefix=prefix, at=datetime.now().astimezone())
    kind = message.topic.rpartition("/")[2]
    payload = _decode(message.payload)
    ended = isinstance(payload, dict) and payload.get("type") == "end"
    provisional = kind == "partial" or (kind == "utterance" and not ended)
    return f"{DIM}{line}{PLAIN}" if colours and provisional else line


def _utterance(payload: dict[str, Any]) -> str:
    kind = payload.get("type", "partial")
    score = payload.get("speaker_score")
    doubt = "?" if isinstance(score, int | float) and score < UNSURE else ""
    parts = [f"{payload.get('speaker', '')}{doubt}"]
    if payload.get("revision"):
        parts.insert(0, REVISED)
    emotion = payload.get("emotion")
    if isinstance(emotion, dict):
        label = f"{emotion.get('label', '')}{'?' * (emotion.get('abstained') is True)}"
        score = emotion.get("score")
        is_share = isinstance(score, int | float) and 0 <= score <= 1  # else of any size
        parts.append(f"{label} {score:.2f}" if is_share else f"{label} ")
    if payload.get("conflict") is True:
        parts.append(CONFLICT)
    if text := payload.get("text"):
        parts.append(f"'{text}'")
    if degraded := payload.get("degraded"):
        parts.append(f"[{degraded}]")
    if kind != "end":
        parts.append(f"({kind})")
    return "  ".join(part for part in parts if part)


def _decode(payload: bytes) -> Any:
    """A JSON object as a dict; everything else (ON, a label, invalid JSON) as text."""
    if payload.startswith(b"{"):
        with contextlib.suppress(ValueError):
            return from_json(payload, allow_inf_nan=False)
    return payload.decode(errors="replace")
