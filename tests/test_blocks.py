"""Representations of whole utterances, computed at pauses in another thread."""

import threading

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.features.acoustic import AcousticExtractor
from stream_hbaf.features.blocks import BlockFrontEnd

Sound = NDArray[np.int16]


class Gated:
    """A representation, the number of samples, whose first computation waits for the gate."""

    name, version, width = "gated", "1", 1

    def __init__(self) -> None:
        self.computed: list[int] = []
        self.gate, self.began = threading.Event(), threading.Event()

    def extract(self, samples: Sound) -> NDArray[np.float32]:
        self.began.set()
        self.gate.wait(10)
        self.computed.append(len(samples))
        return np.array([len(samples)], np.float32)

    def close(self) -> None:
        pass


def test_samples_that_come_while_a_pause_is_computed_count() -> None:
    """What was computed without them is computed again at the end; else it isn't."""
    sound = np.random.default_rng(0).normal(scale=1000, size=16_000).astype(np.int16)
    gated = Gated()
    front_end = BlockFrontEnd(AcousticExtractor(), [gated])
    stream = front_end.open()
    stream.feed(sound)
    pause = threading.Thread(target=stream.pause)
    pause.start()
    assert gated.began.wait(10)
    stream.feed(sound)
    gated.gate.set()
    pause.join()
    stream.pause()
    acoustic = stream.finish()
    front_end.close()
    assert gated.computed == [16_000, 32_000]
    assert acoustic is not None
    assert acoustic.blocks["gated"] == [32_000]
