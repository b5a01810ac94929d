"""The command line: what it says when something is wrong, and how it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from stream_hbaf.cli import main

RECORDINGS = Path(__file__).parent / "recordings"
SPEECH = RECORDINGS / "sense_and_sensibility_01_austen_64kb-0880.flac"


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must fail with status 2."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    last = printed.err.splitlines()[-1]
    assert last.startswith("stream-hbaf: ")
    assert "Traceback" not in printed.err
    return last


def test_help_imports_no_heavy_library() -> None:
    """``--help`` answers at once because nothing that is slow to import is imported for it."""
    heavy = "torch transformers numpy faster_whisper opensmile pydantic rich"
    code = (
        "import sys\n"
        "from stream_hbaf.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        f"found = [name for name in '{heavy}'.split() if name in sys.modules]\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--mic" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--file", "absent.wav", "--mqtt", "none"], "absent.wav"),
        (["--speed", "fast"], "--speed fast: must be 'max' or a number above 0"),
        (["--set", "vad.engin=silero"], "did you mean 'vad.engine'?"),
        (["--set", "speaker"], "write it as KEY=VALUE"),
        (["--config", "absent.yaml"], "absent.yaml: can't be read"),
        (["--file", str(SPEECH), "--mqtt", "none", "--model", "absent"], "absent"),
        (["--file", str(SPEECH), "--mqtt", "mqtt://127.0.0.1:1"], "127.0.0.1:1"),
        (["--file", str(SPEECH), "--mqtt", "http://x"], "http://x"),
        (["--file", str(SPEECH), "--mqtt", "none", "--language", "de"], "--asr base"),
    ],
)
def test_wrong_argument_ends_in_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each wrong argument is answered by one clear line and status 2."""
    assert said in complaint(capsys, *arguments)


def test_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """--device cuda never falls back in silence."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments = ["--file", str(SPEECH), "--mqtt", "none", "--device", "cuda"]
    assert "torch finds no GPU here; use --device auto or cpu" in complaint(capsys, *arguments)
