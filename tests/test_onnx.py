"""Opening ONNX networks: what the library must not do beside."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import numpy as np
from stream_hbaf.speech.vad import open_detector
open_detector("silero").feed(np.zeros(16000, np.int16))
"""


def test_nothing_is_reported_to_microsoft(tmp_path: Path) -> None:
    """ONNX Runtime queues its reports in a database of the user's cache folder: there is none."""
    environment = os.environ | {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True)
    assert list(tmp_path.rglob("*")) == []
