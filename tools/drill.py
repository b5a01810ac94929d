#!/usr/bin/env python3
"""Runs the real command through what goes wrong where it runs: no utterance may be lost.

    tools/drill.py [--only kill,tls]

Kills, full and read-only disks, damaged state, two instances, a clock that steps, brokers that
vanish, stop, refuse or don't answer, hostile messages, too little memory; each with a recording of
the tests at full speed and a real mosquitto on the loopback interface, within two minutes. A
subscriber with a persistent session must receive every `end` that was reported on stdout, at the
latest after the next run; no run may end with a traceback. Prints a table; the status is 1 if a
drill fails.

Needs mosquitto and openssl; faketime for the clock. Who may mount gets a real full disk; without,
the size of files is limited.
"""

import argparse
import asyncio
import sys
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent)]  # damages of the tests

from drill_scenes import DRILLS, Drill, Skipped  # noqa: E402
from drill_stage import Failed, Stage  # noqa: E402
from soak_mqtt import Broker, settle, subscriber  # noqa: E402

DRILL_S = 120.0


@dataclass(frozen=True)
class Outcome:
    """What came of a drill."""

    drill: str
    what: str
    reported: int = 0
    lost: int = 0
    failed: bool = False

    @property
    def row(self) -> str:
        what = " ".join(self.what.split())
        failed = "FAILED " if self.failed else ""
        return f"{self.drill:<18}{self.reported:>9}{self.lost:>6}  {failed}{what}"


HEAD = f"{'drill':<18}{'reported':>9}{'lost':>6}  what happened"


async def run_drill(drill: Drill, folder: Path) -> Outcome:
    """Run a drill, and count what was reported and what never arrived."""
    name = drill.__name__
    async with AsyncExitStack() as opened:
        broker = Broker(folder)
        await broker.start()
        opened.push_async_callback(broker.kill)
        received = await opened.enter_async_context(subscriber(broker.port))
        stage, failed = Stage(folder, broker, received), True
        try:
            async with asyncio.timeout(DRILL_S):
                what, failed = await drill(stage), False
        except Skipped as skipped:
            what, failed = f"skipped: {skipped}", False
        except Failed as error:
            what = str(error)
        except TimeoutError:
            what = f"takes longer than {DRILL_S:g} s"
        finally:
            for run in stage.runs:
                await run.kill()
        due = set(stage.reported) - stage.excused
        await settle(received, sorted(due))
        lost = due - set(received.ends)
    return Outcome(name, what, len(stage.reported), len(lost), failed or bool(lost))


def main() -> int:
    names = [drill.__name__ for drill in DRILLS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(names), help="drills, separated by commas")
    only = parser.parse_args().only.split(",")
    if unknown := [name for name in only if name not in names]:
        parser.error(f"no drill {unknown[0]!r}; there are {', '.join(names)}")
    print(HEAD, flush=True)
    failed = False
    for drill in (drill for drill in DRILLS if drill.__name__ in only):
        with tempfile.TemporaryDirectory() as folder:
            outcome = asyncio.run(run_drill(drill, Path(folder)))
        failed |= outcome.failed
        print(outcome.row, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
