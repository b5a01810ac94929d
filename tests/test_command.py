"""The command as a process: how it ends, what it leaves on the broker, what it prints."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import wave
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stream_hbaf.audio.capture import list_devices
from stream_hbaf.config import SAMPLE_RATE_HZ

COMMAND = [sys.executable, "-m", "stream_hbaf.cli"]
RECORDINGS = Path(__file__).parent / "recordings"
SPEECH = RECORDINGS / "sense_and_sensibility_01_austen_64kb-0880.flac"


def write(path: Path, samples: NDArray[np.int16]) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
        file.writeframes(samples.tobytes())
    return path


def ended(output: str) -> list[dict[str, object]]:
    events = [json.loads(line) for line in output.splitlines()]
    return [e for e in events if e["event"] == "utterance" and e["type"] == "end"]


@pytest.fixture
def long_speech(tmp_path: Path, sentences: list[NDArray[np.int16]]) -> Path:
    """Half a minute of sentences with hardly a pause between them."""
    sound = np.concatenate([sentence[:-SAMPLE_RATE_HZ] for sentence in sentences] * 2)
    return write(tmp_path / "long.wav", sound)


def interrupted(speech: Path) -> float:
    """Ctrl-C in the middle of a sentence: its words come as an end event. Seconds that it took."""
    with subprocess.Popen(
        [*COMMAND, "--file", str(speech), "--mqtt", "none", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if json.loads(line)["event"] == "partial":
                break
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        rest, complaints = process.communicate(timeout=30)
        took_s = time.monotonic() - asked
    assert process.returncode == 0, complaints
    (end,) = ended("".join(lines) + rest)
    assert end["trigger"] == "end_of_input"
    assert end["text"]
    assert "Traceback" not in complaints
    return took_s


def test_interrupt_finishes_what_was_heard_and_exits_0(long_speech: Path) -> None:
    """Within seconds; a machine that others keep busy may have three tries."""
    assert any(interrupted(long_speech) < 8 for _ in range(3))


def test_interrupt_while_nothing_comes_from_a_pipe(tmp_path: Path) -> None:
    """A pipe whose writer sends nothing can be given up."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [*COMMAND, "--file", str(pipe), "--mqtt", "none", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline, writer = time.monotonic() + 30, -1
        while writer < 0:
            with contextlib.suppress(OSError):  # nobody reads it yet
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=20)
        os.close(writer)
    assert output == (b"", b"")
    assert process.returncode == 0


def test_json_output_is_nothing_but_json() -> None:
    """With --json each line of stdout is one object; what is said to people is on stderr."""
    done = subprocess.run(
        [*COMMAND, "--file", str(SPEECH), "--speed", "max", "--mqtt", "none", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (end,) = ended(done.stdout)
    assert end["speaker"] == ""
    assert end["source"] == "file"
    assert "loading the models" in done.stderr


def test_reader_that_goes_away_ends_the_command_quietly(long_speech: Path) -> None:
    """A closed pipe stops the command without a traceback, long before the recording ends."""
    began = time.monotonic()
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"'{sys.executable}' -m stream_hbaf.cli --file '{long_speech}' "
            "--mqtt none --json | head -n 3",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert len(done.stdout.splitlines()) == 3
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert time.monotonic() - began < 40  # of 52 s


def test_without_a_microphone_the_bundled_recording_is_heard() -> None:
    """No microphone: one line says so, and the recording is listened to in real time."""
    if list_devices():
        pytest.skip("this machine has a microphone")
    with subprocess.Popen(
        [*COMMAND, "--mqtt", "none", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        first = next(line for line in process.stdout if '"partial"' in line)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads(first)["source"] == "file"
    assert said.splitlines()[0] == (
        "stream-hbaf: no microphone found: listening to the bundled recording in real time"
    )


def test_narrow_terminal_shows_words_bars_and_latency() -> None:
    """Forty columns are enough: nothing is wider, and every emotion has its bar."""
    from rich.console import Console

    from stream_hbaf.events import Emotion, Latency, Utterance
    from stream_hbaf.publish.terminal import Terminal

    labels = ["anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"]
    probabilities = dict.fromkeys(labels, 0.05) | {"joy": 0.7}
    event = Utterance(
        id="d-1",
        rev=2,
        type="end",
        source="test",
        dialogue_id="d",
        turn=1,
        speaker="Ann",
        start_time="2026-01-01T12:00:00.000+00:00",
        audio_start_ms=0,
        text="I have got the job, can you believe it, after all these years",
        emotion=Emotion(
            label="joy", score=0.7, abstained=False, set=["joy"], probabilities=probabilities
        ),
        latency_ms=Latency(
            vad=612, transcript=0, acoustic=3, text=0, classify=6, publish=0.1, total=621
        ),
    )
    console = Console(width=40, force_terminal=True, record=True, highlight=False, file=StringIO())
    asyncio.run(Terminal(console=console).send(event))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 40
    assert all(label in shown for label in labels)
    assert "joy 70%" in shown
    assert "███████░░░" in shown
    assert "612 ms to confirm the end, then 9 ms" in " ".join(shown.split())
    assert "≠" not in shown


def test_terminal_shows_doubt_and_contradiction() -> None:
    """A guess has a question mark, voice against words a sign; what it hardly is stands back."""
    from rich.console import Console

    from stream_hbaf.events import Emotion, Utterance
    from stream_hbaf.publish.terminal import Terminal

    event = Utterance(
        id="d-1",
        rev=2,
        type="end",
        source="test",
        dialogue_id="d",
        turn=1,
        speaker="Ann",
        start_time="2026-01-01T12:00:00.000+00:00",
        audio_start_ms=0,
        text="Great.",
        emotion=Emotion(
            label="joy",
            score=0.41,
            abstained=True,
            set=["joy", "anger"],
            probabilities={"anger": 0.4, "joy": 0.41, "fear": 0.19},
        ),
        conflict=True,
    )
    console = Console(width=40, force_terminal=True, record=True, highlight=False, file=StringIO())
    asyncio.run(Terminal(console=console).send(event))
    styled = console.export_text(clear=False, styles=True)
    assert "joy? 41% ≠ Ann: Great." in console.export_text()
    dim = "\x1b[2m"
    assert f"{dim}  fear" in styled
    assert f"{dim}  joy" not in styled
    assert f"{dim}  anger" not in styled


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"speaker": "Ann", "speaker_score": 0.97, "speaker_source": "enrolled"}, "joy Ann: Yes."),
        ({"speaker": "Ann", "speaker_score": 0.7, "speaker_source": "voice"}, "joy Ann?: Yes."),
        ({"speaker": "", "speaker_score": 0.4}, "joy ?: Yes."),
        ({"speaker": ""}, "joy Yes."),
        (
            {"speaker": "Ben", "speaker_score": 1.0, "speaker_source": "corrected", "revision": 1},
            "↺ joy Ben: Yes.",
        ),
    ],
)
def test_terminal_says_who_speaks_and_how_surely(fields: dict[str, Any], shown: str) -> None:
    """A name of which the voice isn't sure has a question mark; a revision is one line."""
    from mqtt_kit import utterance
    from rich.console import Console

    from stream_hbaf.events import Emotion
    from stream_hbaf.publish.terminal import Terminal

    about = {"start_time": "2026-01-01T12:00:00.000+00:00", "text": "Yes."}
    joy = Emotion(label="joy")
    event = utterance(1).model_copy(update={**about, "emotion": joy, **fields})
    console = Console(width=80, record=True, highlight=False, file=StringIO())
    asyncio.run(Terminal(console=console).send(event))
    (line,) = console.export_text().splitlines()
    assert line.partition(" ")[2] == shown


@pytest.mark.parametrize("width", [40, 200])
@pytest.mark.parametrize("screen", [True, False])
def test_terminal_says_inferences_below_the_utterance(width: int, screen: bool) -> None:
    """They stand back; in a file they are one whole line, and without them there is none."""
    from rich.console import Console

    from stream_hbaf.events import Inferred, Utterance
    from stream_hbaf.publish.terminal import Terminal

    event = Utterance(
        id="d-1",
        rev=2,
        type="end",
        source="test",
        dialogue_id="d",
        turn=1,
        speaker="Ann",
        start_time="2026-01-01T12:00:00.000+00:00",
        audio_start_ms=0,
        text="I got it.",
        inferences=Inferred(external=["happy", "proud"], internal=["glad"], purpose=["to win"]),
    )
    said = "others feel: happy, proud · the speaker feels: glad · the speaker wants: to win"

    def shown(event: Utterance, *, styles: bool = False) -> str:
        console = Console(
            width=width, force_terminal=screen, record=True, highlight=False, file=StringIO()
        )
        asyncio.run(Terminal(console=console).send(event))
        return console.export_text(styles=styles)

    head, below = shown(event).split("\n", 1)
    assert head.rstrip().endswith("Ann: I got it.")
    assert " ".join(below.split()) == said
    assert "\x1b[2m  others feel" in shown(event, styles=True)
    if screen:
        assert max(map(len, shown(event).splitlines())) <= width
    else:
        assert below == f"  {said}\n"
    silent = shown(event.model_copy(update={"inferences": None}))
    assert silent.split() == head.split()
    partly = event.model_copy(
        update={"inferences": Inferred(external=[], internal=["glad"], purpose=[])}
    )
    assert shown(partly).split("\n")[1].rstrip() == "  the speaker feels: glad"
