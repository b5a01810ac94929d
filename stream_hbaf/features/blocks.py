"""Acoustic features that need the whole utterance, beside openSMILE's that are streamed.

An embedding of the voice takes milliseconds, so it is computed when speech pauses, as the words
are: if speech resumes it is computed again, else it is there when the utterance ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stream_hbaf.features.acoustic import Acoustic, AcousticFrontEnd, AcousticStream
from stream_hbaf.features.representations import AcousticRepresentation

Float32 = NDArray[np.float32]
Int16 = NDArray[np.int16]


class BlockFrontEnd:
    """A front end whose utterances have further representations, by name, in ``blocks``.

    One that an utterance is too short for is missing there. Closes what it was given.
    """

    def __init__(
        self, front_end: AcousticFrontEnd, representations: Sequence[AcousticRepresentation]
    ) -> None:
        self._front_end = front_end
        self._representations = representations

    def open(self) -> "BlockStream":
        """A stream for one utterance. Raises ModelError if openSMILE can't be started."""
        return BlockStream(self._front_end.open(), self)

    def extract(self, samples: Int16) -> Acoustic | None:
        """A whole utterance at once. None under 60 ms. Raises ModelError."""
        acoustic = self._front_end.extract(samples)
        return None if acoustic is None else replace(acoustic, blocks=self.measure(samples))

    def measure(self, samples: Int16) -> Mapping[str, Float32]:
        """The further representations of an utterance. Raises ModelError."""
        found = ((one.name, one.extract(samples)) for one in self._representations)
        return {name: features for name, features in found if features is not None}

    def close(self) -> None:
        """Close the front end and all representations."""
        self._front_end.close()
        for one in self._representations:
            one.close()


class BlockStream:
    """One utterance: openSMILE's stream, and its samples for the further representations.

    ``pause`` may run in another thread than the other methods, also while more samples come.
    """

    def __init__(self, stream: AcousticStream, front_end: BlockFrontEnd) -> None:
        self._stream = stream
        self._front_end = front_end
        self._pieces: list[Int16] = []
        self._measured: tuple[int, Mapping[str, Float32]] = 0, {}  # of the first so many pieces

    @property
    def lld(self) -> Float32:
        """openSMILE's rows so far."""
        return self._stream.lld

    def feed(self, samples: Int16) -> None:
        """Process the utterance's next samples. Raises ModelError."""
        self._stream.feed(samples)
        self._pieces.append(samples)

    def pause(self) -> None:
        """Compute what needs the whole utterance, in case that this is all of it."""
        pieces = tuple(self._pieces)
        if len(pieces) != self._measured[0]:
            self._measured = len(pieces), self._front_end.measure(np.concatenate(pieces))

    def finish(self) -> Acoustic | None:
        """All features. None under 60 ms. Raises ModelError."""
        acoustic = self._stream.finish()
        if acoustic is None:
            return None
        self.pause()
        return replace(acoustic, blocks=self._measured[1])

    def close(self) -> None:
        """Abandon the utterance, unless it is finished."""
        self._stream.close()
