"""Promises of tools/fuzz.py, with a few inputs of each kind: no crash, no hang."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "fuzz.py"


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="apt-get install ffmpeg")
def test_a_few_inputs_of_each_kind() -> None:
    """Read or refused in one line, the seeds beyond the fixed hostile texts."""
    options = ["--inputs", "360", "--seed", "40", "--commands", "0"]
    done = subprocess.run([sys.executable, str(TOOL), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0][:5] == ["kind", "inputs", "commands", "tracebacks", "hangs"]
    assert [row[1:5] for row in rows[1:]] == [["30", "0", "0", "0"]] * 12


FAULTS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fuzz

class Faulty:
    def __init__(self, folder): ...
    def write(self, seed): self.seed = seed
    def read(self):
        match self.seed:
            case 1: return {}["a"]
            case 2: return "two\\nlines"
            case 3: import os; os._exit(1)
            case 4: import time; time.sleep(9)
            case 5: return bytes(2 << 30)
        return "one line"

fuzz.KINDS, fuzz.WITHOUT_COMMAND, fuzz.CASE_S = {"faulty": Faulty}, ("faulty",), 1.0
sys.argv = ["fuzz.py", "--inputs", "7"]
sys.exit(fuzz.main())
"""


def test_each_fault_is_found() -> None:
    """An error, a complaint of two lines, a death, a hang, too much memory: with their seeds."""
    command = [sys.executable, "-c", FAULTS, str(TOOL.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    _, row, *faults = done.stdout.splitlines()
    assert row.split()[:5] == ["faulty", "7", "0", "4", "1"]
    assert [line.split(":")[0] for line in faults[::2]] == [
        f"faulty {seed}" for seed in range(1, 6)
    ]
    assert "KeyError: 'a'" in faults[0]
    assert "not one short line: 'two" in faults[2]
    assert "the process died" in faults[4]
    assert "hangs for more than 1 s" in faults[6]
    assert "MemoryError" in faults[8]
    assert faults[9] == "    tools/fuzz.py --kinds faulty --seed 5 --inputs 1 --commands 0"
