#!/usr/bin/env python3
"""Takes the picture of the terminal for the documentation, from a run in tmux, as SVG.

tools/make_picture.py docs/terminal.svg
"""

import argparse
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

SESSION = "stream-hbaf-picture"
WIDTH, HEIGHT = 96, 24
EXAMPLE = Path(__file__).parent.parent / "stream_hbaf" / "audio" / "example.flac"


def tmux(*arguments: str) -> str:
    done = subprocess.run(["tmux", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--file", type=Path, default=EXAMPLE)
    parser.add_argument("--seconds", type=float, default=27, help="when to take it")
    options = parser.parse_args()
    command = f"{sys.executable} -m stream_hbaf.cli --file {options.file} --mqtt none"
    tmux("new-session", "-d", "-s", SESSION, "-x", str(WIDTH), "-y", str(HEIGHT), command)
    try:
        time.sleep(options.seconds)
        shown = tmux("capture-pane", "-e", "-p", "-t", SESSION)
    finally:
        tmux("kill-session", "-t", SESSION)
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    console.print(Text.from_ansi(shown.rstrip("\n")))
    options.picture.write_text(console.export_svg(title="stream-hbaf"), encoding="utf-8")


if __name__ == "__main__":
    main()
