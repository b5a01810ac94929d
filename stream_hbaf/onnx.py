"""Opens small ONNX networks, which run on one thread of the processor."""

import os
from collections.abc import Sequence
from pathlib import Path

# ONNX Runtime reports what it is used for, and on what machine, to Microsoft, unless this is set
# before it is imported; its own function disable_telemetry_events doesn't keep it from that.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

from stream_hbaf.errors import ModelError


def open_network(
    network: Path, *, inputs: Sequence[str], use: str, remedy: str
) -> onnxruntime.InferenceSession:
    """Load a network that takes ``inputs``.

    Raises ModelError if it is missing, damaged or takes others; ``use`` begins the message, which
    says what the network is for, and ``remedy`` ends it.
    """
    if not network.is_file():
        raise ModelError(f"{use}: {network} is missing; {remedy}")
    options = onnxruntime.SessionOptions()
    # Such a network is far too small to share out, and a spinning thread would eat a core.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            str(network), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # noqa: BLE001  onnxruntime's errors share no narrower class
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{use}: {network} can't be loaded ({reason}); {remedy}") from None
    taken = [value.name for value in session.get_inputs()]
    if taken != list(inputs):
        raise ModelError(
            f"{use}: {network} takes {', '.join(taken)}, not {', '.join(inputs)}; {remedy}"
        )
    return session
