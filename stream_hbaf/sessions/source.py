"""A session's sound as a source: what was heard live, to be played into a live pipeline."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Self

from stream_hbaf.audio.source import Chunk
from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.sessions.session import Samples, Session, Stretch


class SessionSource:
    """The sound of one source of a session, numbered as it was and with the gaps it had: at
    ``speed`` times real time, or as fast as it is taken (None). Gaps take no time.

    What was cut off live by a wish is cut off by a gap.
    """

    def __init__(
        self, session: Session, source: str, *, speed: float | None, chunk_ms: int
    ) -> None:
        self.name = source
        self._session = session
        self._speed = speed
        self._chunk_samples = chunk_ms * SAMPLE_RATE_HZ // 1000

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        pass

    async def chunks(self) -> AsyncIterator[Chunk]:
        pieces = self._pieces()
        due = time.monotonic()
        start, after_gap = 0, False
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            if isinstance(piece, Stretch):
                start, after_gap = piece.start, True
                continue
            if self._speed is not None:
                due += len(piece) / SAMPLE_RATE_HZ / self._speed
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            captured_at = time.monotonic() if self._speed is None else due
            yield Chunk(start, piece, captured_at, after_gap=after_gap)
            start, after_gap = start + len(piece), False

    def _pieces(self) -> Iterator[Stretch | Samples]:
        for piece in self._session.heard(self.name):
            if isinstance(piece, Stretch):
                yield piece
                continue
            for start in range(0, len(piece), self._chunk_samples):
                yield piece[start : start + self._chunk_samples]
