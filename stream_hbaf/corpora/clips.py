"""Reads the samples of clips: decoded whole, cut by times or by the live segmenter, augmented.

``Playlist`` plays a corpus's clips as one stream of audio, for evaluation through the live
pipeline. Digital silence separates the clips: enough to end an utterance, and between dialogues
enough to end the dialogue too.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from stream_hbaf.audio.file import read_audio
from stream_hbaf.config import SAMPLE_RATE_HZ, Config, SegmenterConfig, VadConfig
from stream_hbaf.corpora.augment import CLEAN, Condition, NoisesAndRooms, Samples, augment, level_db
from stream_hbaf.corpora.cache import digest_code, library_versions
from stream_hbaf.corpora.dialogue import Dialogue
from stream_hbaf.errors import AudioError
from stream_hbaf.speech.detector import UtteranceDetector
from stream_hbaf.speech.segmenter import Finish
from stream_hbaf.speech.vad import SpeechDetector, open_detector

# Of an utterance that the segmenter cut, at most so much is measured: as much as Whisper's encoder
# encodes at once. The segmenter's own limit is lower: only a change of speed can exceed this.
LONGEST = 30 * SAMPLE_RATE_HZ
# Modules and packages that compute a job's samples, by step.
CODE = {
    "decoding": (
        "stream_hbaf.audio.container",
        "stream_hbaf.audio.decode",
        "stream_hbaf.audio.file",
        "stream_hbaf.audio.source",
        "stream_hbaf.corpora.clips",
    ),
    "segmentation": (
        "stream_hbaf.speech.detector",
        "stream_hbaf.speech.segmenter",
        "stream_hbaf.speech.vad",
    ),
    "condition": ("stream_hbaf.corpora.augment",),
}
LIBRARIES = {
    "decoding": ("av", "soxr"),
    "segmentation": ("faster-whisper", "onnxruntime", "webrtcvad-wheels"),
    "condition": ("scipy",),
}
OVERLONG, OVERLONG_S = 3, 5.0  # times its table's length and so much more: it's another clip
OVERRUN_S = 0.5  # times are rounded, and encoders pad: a cut may end this far after its clip


@dataclass(frozen=True, slots=True)
class ClipJob:
    """One row of features: a clip, cut by times and possibly by the live segmenter, augmented.

    Jobs are equal if the same samples are measured, whatever their ids.
    """

    id: str = field(compare=False)  # of the utterance, named where the clip is skipped
    clip: Path | None  # None: the corpus names no clip
    start_s: float | None = None  # None: from its beginning
    end_s: float | None = None  # None: to its end
    segmented: bool = False  # the longest utterance that the segmenter finds in the cut
    condition: Condition = CLEAN
    length_s: float | None = None  # of the clip, as the corpus's table has it


@dataclass(frozen=True)
class Segmentation:
    """Settings of the live segmenter and its voice activity detector; the defaults are live's."""

    segmenter: SegmenterConfig = field(default_factory=SegmenterConfig)
    vad: VadConfig = field(default_factory=VadConfig)

    @cached_property
    def detector(self) -> SpeechDetector:
        """Opened when it is first needed. Raises ModelError if its weights are missing."""
        return open_detector(self.vad.engine)

    def longest_utterance(self, samples: Samples) -> Samples:
        """The longest utterance that the live segmenter finds in a clip; the clip if none is found.

        Live utterances never have the second of silence at either end that studio clips have.
        """
        config = Config(segmenter=self.segmenter, vad=self.vad)
        live = UtteranceDetector(config, vad=self.detector)
        actions = [*live.feed(samples), *live.flush(resume_at=0)]
        found = [action for action in actions if isinstance(action, Finish)]
        if not found:
            return samples
        longest = max(found, key=lambda utterance: utterance.end - utterance.start)
        return samples[longest.start : longest.end]


def decode_clip(clip: Path) -> Samples:
    """All samples of a clip. Raises AudioError with the reason alone if any of it is damaged: a
    label is of the whole clip."""
    complaints: list[str] = []
    try:
        samples = read_audio(clip, on_status=lambda _, complaint: complaints.append(complaint))
    except AudioError as error:
        complaints = [str(error)]
    if complaints:
        raise AudioError(complaints[0].removeprefix(f"{clip}: ").split(";")[0])
    return samples


def cut_clip(samples: Samples, start_s: float | None, end_s: float | None) -> Samples:
    """The samples between two times; None is the clip's beginning or end.

    Raises AudioError for times outside the clip.
    """
    start = 0 if start_s is None else round(start_s * SAMPLE_RATE_HZ)
    end = len(samples) if end_s is None else round(end_s * SAMPLE_RATE_HZ)
    if start >= len(samples) or end > len(samples) + OVERRUN_S * SAMPLE_RATE_HZ:
        length_s = len(samples) / SAMPLE_RATE_HZ
        raise AudioError(f"cut from {start_s} to {end_s} s, but the clip ends at {length_s:.2f} s")
    return samples[start:end]


def require_length(samples: Samples, length_s: float | None) -> None:
    """Raise AudioError for a clip that is far longer than the corpus's table says."""
    found_s = len(samples) / SAMPLE_RATE_HZ
    if length_s is not None and found_s > OVERLONG * length_s + OVERLONG_S:
        raise AudioError(f"{length_s:.1f} s by the table, but the clip lasts {found_s:.1f} s")


@dataclass(frozen=True, eq=False)  # compared by identity, as arrays have no equality
class Preparation:
    """How the clips of jobs are cut and augmented."""

    sounds: NoisesAndRooms
    segmentation: Segmentation

    @cached_property
    def sounds_digest(self) -> str:
        """SHA-256 of all noises and rooms, in their order."""
        digest = hashlib.sha256()
        for kind in (self.sounds.noises, self.sounds.rooms):
            digest.update(f"{[len(samples) for samples in kind]}".encode())
            for samples in kind:
                digest.update(samples.tobytes())
        return digest.hexdigest()

    def cut(self, samples: Samples, job: ClipJob) -> Samples:
        """The part of a clip's samples that a job is about.

        Raises AudioError for times outside the clip, or if its length isn't the table's.
        """
        require_length(samples, job.length_s)
        cut = cut_clip(samples, job.start_s, job.end_s)
        return self.segmentation.longest_utterance(cut) if job.segmented else cut

    def augment(self, cut: Samples, job: ClipJob) -> Samples:
        """The cut under the job's condition, at most LONGEST samples of it."""
        augmented = augment(cut, job.condition, self.sounds)
        return augmented[:LONGEST] if job.segmented else augmented

    def dependencies(self, job: ClipJob, *, content: str) -> dict[str, list[object]]:
        """Everything that decides a job's samples, by step; ``content`` is the digest of the clip.

        Settings, sounds, code and packages of steps that the job doesn't have are left out: they
        may change without a new extraction.
        """
        settings: dict[str, list[object]] = {"decoding": [content, job.start_s, job.end_s]}
        if job.segmented:
            segmenter, vad = self.segmentation.segmenter, self.segmentation.vad
            settings["segmentation"] = [segmenter.model_dump(), vad.model_dump()]
        if job.condition != CLEAN:
            settings["condition"] = [job.condition, self.sounds_digest]
        return {
            step: [*values, digest_code(*CODE[step]), *library_versions(*LIBRARIES[step])]
            for step, values in settings.items()
        }


MARGIN_S = 0.5  # of the clip's noise and room before and after it: real noise doesn't stop
TURN_S = 1.0  # between two clips of a dialogue; 0.6 s end an utterance
GAP_S = 20  # silence after which a dialogue ends; to be set where the playlist is played. Clips may
# begin and end with seconds of it, and one in which nothing is detected mustn't end a sitting
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
        utterance = self._turns[number][1]
        if utterance.audio is None:
            raise AudioError("the corpus names no clip")
        try:
            whole = decode_clip(utterance.audio)
            require_length(whole, utterance.length_s)
            clip = cut_clip(whole, utterance.start_s, utterance.end_s)
        except AudioError as error:
            raise AudioError(f"{utterance.audio}: {error}") from None
        margin = np.zeros(round(MARGIN_S * SAMPLE_RATE_HZ), np.int16)
        padded = np.concatenate([margin, clip, margin])
        condition = self._condition
        if condition != CLEAN:
            condition = replace(condition, seed=number)  # noise and room differ from clip to clip
        if condition.snr_db is not None:
            # The ratio is to the speech: silence around it would make the noise weaker.
            speech = self._segmentation.longest_utterance(clip)
            louder = level_db(speech) - level_db(padded)
            condition = replace(condition, snr_db=condition.snr_db - louder)
        return augment(padded, condition, self._sounds)
