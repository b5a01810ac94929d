"""Decodes Opus packets as they come, without a container: what WebCodecs and RTP senders have."""

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from stream_hbaf.errors import AudioError

OPUS_HZ = 48_000  # what every Opus packet decodes to, whatever was encoded
LAYOUTS = {1: "mono", 2: "stereo"}  # without a container there is no mapping for more
LARGEST_PACKET = 1275 * 48  # bytes: of 120 ms in frames of 2.5 ms


class OpusDecoder:
    """One sender's packets, in their order. Raises AudioError for other than 1 or 2 channels."""

    def __init__(self, channels: int) -> None:
        if channels not in LAYOUTS:
            raise AudioError("a number of Opus channels that is neither 1 nor 2")
        self._channels = channels
        self._codec = av.CodecContext.create("libopus", "r")
        assert isinstance(self._codec, av.AudioCodecContext)
        self._codec.sample_rate = OPUS_HZ
        self._codec.layout = LAYOUTS[channels]

    def decode(self, packet: bytes) -> NDArray[np.float32]:
        """The packet's samples [n, channels] in [-1, 1]. Raises AudioError if it is no packet."""
        if not packet or len(packet) > LARGEST_PACKET:
            raise AudioError(f"{len(packet)} bytes are no Opus packet")
        try:
            frames = self._codec.decode(av.Packet(packet))
        except av.error.FFmpegError:
            raise AudioError(f"{len(packet)} bytes that are no Opus packet") from None
        samples = [frame.to_ndarray().reshape(-1, self._channels) for frame in frames]
        whole = np.concatenate(samples) if samples else np.zeros((0, self._channels), np.int16)
        return whole.astype(np.float32) / np.float32(32768)
