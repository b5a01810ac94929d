"""A real Chromium, for the tests of the dashboard."""

import asyncio
import os
import shutil
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import pytest
from playwright.sync_api import Browser, sync_playwright

T = TypeVar("T")

PROGRAM = "chromium"
INSTALL = "apt-get install chromium"
# A virtual microphone with a beep every second, and no question for permission.
MICROPHONE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")


def require_chromium() -> str:
    """The program's path. Where it isn't installed the test is skipped; in CI it fails."""
    found = shutil.which(PROGRAM)
    if found is not None:
        return found
    line = f"needs {PROGRAM}: {INSTALL}"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(line)
    pytest.skip(line)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser of the distribution's package; none is downloaded."""
    path = require_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, chromium_sandbox=False, args=MICROPHONE
        )
        yield browser
        browser.close()


class Loop:
    """An event loop in a thread of its own, because Playwright keeps this one for itself."""

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, T], *, timeout_s: float = 60) -> T:
        """The coroutine's result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)
