"""Plays a corpus's clips as one stream of audio, for evaluation through the live pipeline.

Digital silence separates the clips: enough to end an utterance, and between dialogues enough to end
the dialogue too. Sample numbers tell which clip a part of the stream belongs to.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from stream_hbaf.config import SAMPLE_RATE_HZ
from stream_hbaf.corpora.augment import CLEAN, Condition, NoisesAndRooms, Samples, augment
from stream_hbaf.corpora.clips import Segmentation, cut_clip, decode_clip
from stream_hbaf.corpora.dialogue import Dialogue, LabelledUtterance
from stream_hbaf.errors import AudioError

MARGIN_S = 0.5  # of the clip's noise and room before and after it: real noise doesn't stop
TURN_S = 1.0  # between two clips of a dialogue; 0.6 s end an utterance
GAP_S = 3  # silence after which a dialogue ends; to be set where the playlist is played
DIALOGUE_S = GAP_S + 1.0  # utterances reach into the silence by 0.4 s, pre-roll and post-roll
PROGRESS_EVERY = 20  # clips


class Playlist:
    """The clips of dialogues under one acoustic condition; iterating yields the stream, once.

    Utterances are numbered through all dialogues. A clip that is missing, damaged or cut beyond its
    end is left out; ``unread`` has the reason by its number.
    """

    def __init__(
        self,
        dialogues: Sequence[Dialogue],
        *,
        condition: Condition = CLEAN,
        sounds: NoisesAndRooms | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.unread: dict[int, str] = {}
        self._turns = [
            (turn, utterance)
            for dialogue in dialogues
            for turn, utterance in enumerate(dialogue.utterances)
        ]
        self._condition = condition
        self._sounds = sounds or NoisesAndRooms()
        self._progress = progress
        self._segmentation = Segmentation()
        self._detector = self._segmentation.open_detector()
        self._starts: list[int] = []  # the first sample of each clip that was played
        self._played: list[int] = []  # and the number of its utterance

    def __iter__(self) -> Iterator[Samples]:
        position = 0
        for number, (turn, utterance) in enumerate(self._turns):
            try:
                clip = self.clip(number)
            except AudioError as error:
                self.unread[number] = " ".join(str(error).split())
                self._progress(f"not played: {utterance.id}: {self.unread[number]}")
                continue
            silence = np.zeros(round((TURN_S if turn else DIALOGUE_S) * SAMPLE_RATE_HZ), np.int16)
            self._starts.append(position + len(silence))
            self._played.append(number)
            yield np.concatenate([silence, clip])
            position += len(silence) + len(clip)
            if (number + 1) % PROGRESS_EVERY == 0 or number + 1 == len(self._turns):
                self._progress(f"{number + 1} of {len(self._turns)} clips, {utterance.id}")

    def number_at(self, sample: int) -> int:
        """The number of the utterance whose clip holds this sample, or was the last before it."""
        return self._played[max(0, bisect_right(self._starts, sample) - 1)]

    def start_of(self, number: int) -> int:
        """The first sample of an utterance's clip in the stream; ValueError if it was left out."""
        return self._starts[self._played.index(number)]

    def clip(self, number: int) -> Samples:
        """An utterance's clip as it is played. Raises AudioError if it can't be read whole."""
        clip = _read(self._turns[number][1])
        margin = np.zeros(round(MARGIN_S * SAMPLE_RATE_HZ), np.int16)
        padded = np.concatenate([margin, clip, margin])
        condition = self._condition
        if condition != CLEAN:
            condition = replace(condition, seed=number)  # noise and room differ from clip to clip
        if condition.snr_db is not None:
            # The ratio is to the speech: silence around it would make the noise weaker.
            speech = self._segmentation.longest_utterance(clip, self._detector)
            louder = _level_db(speech) - _level_db(padded)
            condition = replace(condition, snr_db=condition.snr_db - louder)
        return augment(padded, condition, self._sounds)


def _read(utterance: LabelledUtterance) -> Samples:
    if utterance.audio is None:
        raise AudioError("the corpus names no clip")
    try:
        return cut_clip(decode_clip(utterance.audio), utterance.start_s, utterance.end_s)
    except AudioError as error:
        raise AudioError(f"{utterance.audio}: {error}") from None


def _level_db(samples: Samples) -> float:
    power = float(np.mean(np.square(samples.astype(np.float64))))
    return 10 * float(np.log10(max(power, 1e-9)))
