#!/usr/bin/env python3
"""Measures the time from publishing an utterance to its appearance on the page, in Chromium.

    tools/bench_dashboard.py [--events 100] [--before 500]

The page shows some utterances already. Then one after another is published, and the page notes
when the frame that shows it has been drawn. Both times are by the system clock.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from chromium import Loop, chromium
from dialogue_samples import INFO, utterance

from stream_hbaf.config import DashboardConfig
from stream_hbaf.dashboard.server import Dashboard

PROMISED_MS = 200
EVERY_S = 0.1

# Animation frame callbacks run before the frame is drawn; a message that they post arrives after.
WATCH = """() => {
  window.seen = new Map();
  const note = (id) => {
    const drawn = new MessageChannel();
    drawn.port1.onmessage = () => window.seen.set(id, performance.timeOrigin + performance.now());
    drawn.port2.postMessage(null);
  };
  new MutationObserver((changes) => {
    for (const {addedNodes} of changes) for (const {dataset} of addedNodes) {
      if (dataset?.id) requestAnimationFrame(() => note(dataset.id));
    }
  }).observe(document.getElementById("utterances"), {childList: true});
}"""


def measure(events: int, *, before: int) -> list[float]:
    """The milliseconds from ``send`` to the drawn frame, for each utterance."""

    async def open_dashboard() -> Dashboard:
        dashboard = Dashboard(DashboardConfig(port=0), info=INFO)
        await dashboard.start()
        for turn in range(before):
            await dashboard.send(utterance(turn))
        return dashboard

    with Loop() as loop, chromium() as browser:
        dashboard = loop.run(open_dashboard())
        page = browser.new_page()
        page.goto(dashboard.address)
        page.locator("#utterances li").first.wait_for()
        page.evaluate(WATCH)
        sent = {}
        for turn in range(before, before + events):
            event = utterance(turn)
            sent[event.id] = time.time() * 1000
            loop.run(dashboard.send(event))
            page.wait_for_timeout(EVERY_S * 1000)
        seen: dict[str, float] = {}
        while sent.keys() - seen.keys():
            page.wait_for_timeout(EVERY_S * 1000)
            seen = dict(page.evaluate("() => [...window.seen]"))
        loop.run(dashboard.close(1))
    return [seen[one] - at for one, at in sent.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--before", type=int, default=500, help="utterances shown already")
    options = parser.parse_args()
    delays = measure(options.events, before=options.before)
    p95 = statistics.quantiles(delays, n=20)[-1]
    print(f"{len(delays)} utterances, {options.before} on the page before them")
    print("| from publishing to the screen | ms |")
    print("| --- | --- |")
    print(f"| median | {statistics.median(delays):.0f} |")
    print(f"| 95 % | {p95:.0f} |")
    print(f"| longest | {max(delays):.0f} |")
    return 0 if p95 <= PROMISED_MS else 1


if __name__ == "__main__":
    raise SystemExit(main())
