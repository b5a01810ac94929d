#!/usr/bin/env python3
"""Takes the picture of the terminal for the documentation, from a run in tmux, as SVG.

tools/make_picture.py docs/terminal.svg

Played are strangers, told apart by their voices: two people of a meeting, J. F. Kennedy, and a
reader of a novel.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import wave
from io import StringIO
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ

SESSION = "stream-hbaf-picture"
WIDTH = 96
PAUSE_S = 1.5
LOADING_S = 25  # until the models are there, and for the last utterance
RECORDINGS = Path(__file__).parent.parent / "tests" / "recordings"
AUSTEN = "sense_and_sensibility_01_austen_64kb"
PLAYED = (  # recording, and how many seconds of it
    ("meeting.flac", 17.3),
    ("jfk.flac", 5.2),
    (f"{AUSTEN}-0890.flac", 9.0),
)


def tmux(*arguments: str) -> str:
    done = subprocess.run(["tmux", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def write_tour(file: Path) -> float:
    """Write what is played, one recording after the other; returns its length in seconds."""
    pause = np.zeros(round(PAUSE_S * SAMPLE_RATE_HZ), np.int16)
    pieces = []
    for name, length_s in PLAYED:
        pieces += [read_audio(RECORDINGS / name)[: round(length_s * SAMPLE_RATE_HZ)], pause]
    samples = np.concatenate(pieces)
    with wave.open(str(file), "wb") as out:
        out.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
        out.writeframes(samples.tobytes())
    return len(samples) / SAMPLE_RATE_HZ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--height", type=int, default=48, help="lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "strangers.wav"
        length_s = write_tour(file)
        listen = f"--file {file} --mqtt none --set speakers.engine=campplus"
        # The pane stays when the recording is over, so that the picture has all of it.
        command = f"{sys.executable} -m stream_hbaf.cli {listen}; sleep 600"
        tmux("new-session", "-d", "-s", SESSION, "-x", str(WIDTH), "-y", "200", command)
        try:
            time.sleep(length_s + LOADING_S)
            shown = tmux("capture-pane", "-e", "-p", "-t", SESSION)
        finally:
            tmux("kill-session", "-t", SESSION)
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    lines = shown.rstrip("\n").split("\n")[: options.height]
    console.print(Text.from_ansi("\n".join(lines)))
    options.picture.write_text(console.export_svg(title="stream-hbaf"), encoding="utf-8")


if __name__ == "__main__":
    main()
