#!/usr/bin/env python3
"""Takes the pictures of the dashboard for the documentation, from a run on a recording.

    tools/shoot_dashboard.py docs/
    tools/shoot_dashboard.py docs/ --voices

Writes ``dashboard-light.png`` and ``dashboard-phone-dark.png`` during an utterance; with
``--voices`` ``dashboard-speakers.png`` instead, of two voices that are told apart.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Error, Page

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
from chromium import chromium
from conftest import RECORDINGS
from mosquitto import free_port

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ

EXAMPLE = Path(__file__).parent.parent / "stream_hbaf" / "audio" / "example.flac"
TIMEOUT_S = 120  # includes loading the models
# name: width, height, device pixel ratio, colour scheme, whether the newest utterance is opened
PICTURES: dict[str, tuple[int, int, float, Literal["light", "dark"], bool]] = {
    "dashboard-light": (1280, 860, 1, "light", False),
    "dashboard-phone-dark": (390, 844, 1.5, "dark", True),
}

BY_VOICE = ("--set", "speakers.engine=campplus", "--asr", "tiny.en")
SPEECH_S = ((0, 2.9), (3.2, 7.6), (7.9, 11))  # of a president, between a reader's sentences
SPEAKERS_SIZE = (1280, 1300)


def open_page(browser: Browser, address: str, *, name: str) -> Page:
    """Open the page as soon as the server answers."""
    width, height, density, scheme, _ = PICTURES[name]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        device_scale_factor=density,
        color_scheme=scheme,
    )
    page = context.new_page()
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            page.goto(address)
        except Error:  # the server has not started yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return page


def join_voices(path: Path) -> None:
    """Write a recording of a reader and a president, by turns."""
    reader = [read_audio(one) for one in sorted(RECORDINGS.glob("sense_and_sensibility_*.flac"))]
    speech = read_audio(RECORDINGS / "jfk.flac")
    silence = np.zeros(SAMPLE_RATE_HZ, np.int16)
    pieces = []
    for sentence, (start_s, end_s) in zip(reader[:2] + reader[3:4], SPEECH_S, strict=True):
        first, last = (int(second * SAMPLE_RATE_HZ) for second in (start_s, end_s))
        pieces += [sentence, silence, speech[first:last], silence]
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
        file.writeframes(np.concatenate([*pieces, reader[2]]).tobytes())


def shoot_speakers(folder: Path) -> None:
    """Take the picture of two voices, with the form that puts the speaker right."""
    with tempfile.TemporaryDirectory() as place, chromium() as browser:
        recording, port = Path(place, "talk.wav"), free_port()
        join_voices(recording)
        command = [sys.executable, "-m", "stream_hbaf.cli", "--file", str(recording), *BY_VOICE]
        command += ["--mqtt", "none", "--dashboard", "--set", f"dashboard.port={port}"]
        program = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            page = open_page(browser, f"http://127.0.0.1:{port}/", name="dashboard-light")
            utterances = page.locator("#utterances li")
            utterances.nth(5).wait_for(timeout=TIMEOUT_S * 1000)
            utterances.nth(1).get_by_role("button").click()
            width, height = SPEAKERS_SIZE
            page.set_viewport_size({"width": width, "height": height})
            page.locator("#speaker-name").wait_for()
            page.screenshot(path=folder / "dashboard-speakers.png")
        finally:
            program.terminate()
            program.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--file", type=Path, default=EXAMPLE)
    parser.add_argument("--utterances", type=int, default=7, help="finished ones to wait for")
    parser.add_argument("--voices", action="store_true", help="a picture of two voices instead")
    options = parser.parse_args()
    if options.voices:
        shoot_speakers(options.folder)
        return
    port = free_port()
    command = [sys.executable, "-m", "stream_hbaf.cli", "--file", str(options.file)]
    command += ["--mqtt", "none", "--dashboard", "--set", f"dashboard.port={port}"]
    program = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with chromium() as browser:
            pages = {
                name: open_page(browser, f"http://127.0.0.1:{port}/", name=name)
                for name in PICTURES
            }
            for name, page in pages.items():
                utterances = page.locator("#utterances li")
                utterances.nth(options.utterances - 1).wait_for(timeout=TIMEOUT_S * 1000)
                if PICTURES[name][-1]:
                    utterances.first.get_by_role("button").click()
                page.locator(".running .emotion").first.wait_for(timeout=TIMEOUT_S * 1000)
                page.evaluate("scrollTo(0, 0)")
                page.screenshot(path=options.folder / f"{name}.png")
    finally:
        program.terminate()
        program.wait(30)


if __name__ == "__main__":
    main()
