"""Promises of tools/drill.py, by three of its drills: nothing that was reported is lost."""

import subprocess
import sys
from pathlib import Path

from mosquitto import require_mosquitto

TOOL = Path(__file__).parent.parent / "tools" / "drill.py"


def test_nothing_is_lost() -> None:
    """The broker is killed and comes back; others refuse, each in one line."""
    require_mosquitto()
    command = [sys.executable, str(TOOL), "--only", "kill_broker,refuse_user,tls"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["drill", "reported", "lost", "what", "happened"]
    killed, refused, tls = (row.split(maxsplit=3) for row in rows)
    assert killed[1:] == ["6", "0", "the broker is killed after 2, and started after 4"]
    assert refused[3].endswith("set mqtt.username and STREAM_HBAF_MQTT__PASSWORD")
    assert "does not speak TLS at this port" in tls[3]
    assert "its certificate is not trusted" in tls[3]


LOSES = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import drill

async def loses(stage):
    class Run:
        reported = [("u1", 1)]
        async def kill(self): ...
    stage.runs.append(Run())
    return "an utterance that never arrives"

async def fails(stage):
    raise drill.Failed("ended with status 1")

async def skips(stage):
    raise drill.Skipped("no faketime")

async def none(received, reported): ...
drill.DRILLS, drill.settle, sys.argv = (loses, fails, skips), none, ["drill.py"]
sys.exit(drill.main())
"""


def test_what_is_lost_is_said() -> None:
    """An utterance that never arrives fails a drill, as does a run that ends otherwise."""
    require_mosquitto()
    command = [sys.executable, "-c", LOSES, str(TOOL.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert [row.split(maxsplit=3) for row in done.stdout.splitlines()[1:]] == [
        ["loses", "1", "1", "FAILED an utterance that never arrives"],
        ["fails", "0", "0", "FAILED ended with status 1"],
        ["skips", "0", "0", "skipped: no faketime"],
    ]
