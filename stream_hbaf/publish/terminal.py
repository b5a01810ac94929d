"""What a person sees: the level, the running transcript, and each utterance's emotion."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from stream_hbaf.events import (
    AnyEvent,
    Emotion,
    Inferred,
    Level,
    Partial,
    Speech,
    Status,
    Utterance,
)

COLOURS = {
    "anger": "red",
    "disgust": "green",
    "fear": "magenta",
    "joy": "yellow",
    "neutral": "white",
    "sadness": "blue",
    "surprise": "cyan",
}
CONFLICT = "≠"  # voice and words contradict each other
REDRAW_S = 0.1
QUIETEST_DBFS, LOUDEST_DBFS = -60.0, -10.0
METER_WIDTH = 8
BAR_WIDTH = 10
COLUMN_WIDTH = 29  # label, bar and percentage of one emotion


class Terminal:
    """Shows events on a terminal of any width, or one plain line an utterance in a file.

    In a file too, what was inferred has a line of its own.
    """

    def __init__(self, *, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._level = Level(source="", dbfs=QUIETEST_DBFS, speech=False)
        self._running = ""  # the transcript of what is being said
        self._provisional = ""
        self._drawn = ""
        self._live: Live | None = None

    async def send(self, event: AnyEvent) -> None:
        match event:
            case Level():
                self._level = event
            case Partial():
                self._running, self._provisional = event.text, event.emotion.label
            case Utterance(type="update", emotion=emotion):
                self._running = event.text
                self._provisional = emotion.label if emotion else ""
            case Utterance(type="end"):
                self._running = self._provisional = ""
                # A file is not as narrow as a terminal: there, lines stay whole.
                whole = not self._console.is_terminal
                self._console.print(self._utterance(event), soft_wrap=whole)
            case Speech(on=True):
                self._running = self._provisional = ""
            case Status(state="online", detail=""):
                return
            case Status():
                self._console.print(Text(f"{event.stage} {event.state}: {event.detail}", "dim"))

    async def run(self) -> None:
        """Redraw the bottom line while there is something new on it."""
        if not self._console.is_terminal:
            await asyncio.Event().wait()
        with Live(console=self._console, auto_refresh=False, transient=True) as self._live:
            while True:
                line = self._line()
                if line.plain != self._drawn:
                    self._drawn = line.plain
                    self._live.update(line, refresh=True)
                await asyncio.sleep(REDRAW_S)

    async def close(self, timeout_s: float) -> None:
        """Nothing is held back here."""

    def _line(self) -> Text:
        """Level meter, whether somebody speaks, and the end of the running transcript."""
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
        words = self._running or "…"
        return line.append(words if len(words) <= room else "…" + words[-room + 1 :])

    def _utterance(self, event: Utterance) -> Group:
        emotion = event.emotion
        label = emotion.label if emotion else "unknown"
        doubt = "?" if emotion and emotion.abstained else ""
        score = f" {emotion.score:.0%}" if emotion and emotion.score is not None else ""
        clock = datetime.fromisoformat(event.start_time).astimezone().strftime("%H:%M:%S")
        words = event.text or "(no words)"
        style = f"bold {COLOURS.get(label, 'white')}"
        head = Text().append(f"{clock} ", "dim").append(f"{label}{doubt}{score} ", style)
        if event.conflict:
            head.append(f"{CONFLICT} ", "bold")
        if event.speaker:
            head.append(f"{event.speaker}: ")
        head.append(words)
        lines = [head, *_inferences(event.inferences)]
        if not self._console.is_terminal:
            return Group(*lines)
        below = self._bars(emotion) if emotion else Text()
        return Group(*lines, below, self._footer(event))

    def _bars(self, emotion: Emotion) -> Table:
        """A bar for each label; those that it can hardly be stand back."""
        columns = max(1, (self._console.width - 2) // COLUMN_WIDTH)
        table = Table.grid(padding=(0, 1))
        cells = []
        for label, probability in emotion.probabilities.items():
            lit = round(probability * BAR_WIDTH)
            style = "" if label in emotion.set else "dim"
            cell = Text(f"  {label:<9}", style)
            cell.append("█" * lit, COLOURS.get(label, "")).append("░" * (BAR_WIDTH - lit), "dim")
            cells.append(cell.append(f"{probability:>4.0%}"))
        for first in range(0, len(cells), columns):
            table.add_row(*cells[first : first + columns])
        return table

    def _footer(self, event: Utterance) -> Text:
        if event.latency_ms is None:
            return Text()
        latency = event.latency_ms
        after = latency.total - latency.vad
        told = f"  {latency.vad:.0f} ms to be sure of the end, then {after:.0f} ms"
        return Text(f"{told}  {event.degraded}".rstrip(), "dim")


def _inferences(inferred: Inferred | None) -> list[Text]:
    """One line that stands back, or none."""
    if inferred is None:
        return []
    said = {
        "others feel": inferred.external,
        "the speaker feels": inferred.internal,
        "the speaker wants": inferred.purpose,
    }
    told = [f"{who}: {', '.join(phrases)}" for who, phrases in said.items() if phrases]
    return [Text(f"  {' · '.join(told)}", "dim")] if told else []


class JsonLines:
    """Writes every event but the level as one JSON object a line.

    Writing happens in a thread, since the reader of a pipe may be slow. While it is behind,
    partials are dropped; the rest waits. When the reader has gone ``stop`` is set.
    """

    def __init__(self, *, stop: asyncio.Event, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._stop = stop
        self._gone = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="stdout")
        self._writing = 0

    async def send(self, event: AnyEvent) -> None:
        if isinstance(event, Level) or (isinstance(event, Partial) and self._writing):
            return
        fields = event.model_dump(mode="json", by_alias=True, exclude_none=True)
        line = json.dumps({"event": type(event).__name__.lower(), **fields}, ensure_ascii=False)
        self._writing += 1
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._write, line)
        except (BrokenPipeError, ValueError):
            self._gone = True
            self._stop.set()
        finally:
            self._writing -= 1

    async def run(self) -> None:
        """Nothing to carry: ``send`` writes."""
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        self._writer.shutdown(wait=False)

    def _write(self, line: str) -> None:
        if not self._gone:
            self._out.write(line + "\n")
            self._out.flush()


@contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int, Path], None]]:
    """A bar on stderr for work on many files: called with how many are done, of all, and which."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[file]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, file="")

        def tell(done: int, every: int, file: Path) -> None:
            bar.update(task, completed=done, total=every, file=file.name)

        yield tell
