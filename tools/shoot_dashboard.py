#!/usr/bin/env python3
"""Takes the pictures of the dashboard for the documentation, from a run on a recording.

    tools/shoot_dashboard.py docs/

Writes ``dashboard-light.png`` and ``dashboard-phone-dark.png`` during an utterance.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Error, Page

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chromium import chromium
from mosquitto import free_port

EXAMPLE = Path(__file__).parent.parent / "stream_hbaf" / "audio" / "example.flac"
TIMEOUT_S = 120  # includes loading the models
# name: width, height, device pixel ratio, colour scheme, whether the newest utterance is opened
PICTURES: dict[str, tuple[int, int, float, Literal["light", "dark"], bool]] = {
    "dashboard-light": (1280, 860, 1, "light", False),
    "dashboard-phone-dark": (390, 844, 1.5, "dark", True),
}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--file", type=Path, default=EXAMPLE)
    parser.add_argument("--utterances", type=int, default=7, help="finished ones to wait for")
    options = parser.parse_args()
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
