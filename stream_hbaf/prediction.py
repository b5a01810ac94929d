"""Turns an utterance's features and the dialogue's state into a prediction, and explains it.

Pure functions of a loaded bundle: the network's input, one step of the network with all inputs or
with every coalition of them, and what the bundle's calibration makes of the logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np
import torch
from numpy.typing import NDArray

from stream_hbaf.affect import affect_of
from stream_hbaf.bundle import Bundle
from stream_hbaf.bundle_config import NONE, BundleConfig
from stream_hbaf.events import Contributions, Emotion, Inferred
from stream_hbaf.features.acoustic import LLD_MS, Acoustic
from stream_hbaf.features.baseline import VoicePast
from stream_hbaf.features.representations import (
    CAMPPLUS,
    GE2E,
    LLD,
    PROSODY,
    WHISPER,
    frames_to_tokens,
    join_parts,
)
from stream_hbaf.features.text import EMPTY_WINDOW, TurnWindow
from stream_hbaf.features.whisper import Transcript
from stream_hbaf.networks.calibration import (
    NOTHING_SUMMED,
    Modality,
    Probabilities,
    RunningSums,
    coalitions,
    pattern_of,
    shapley,
)
from stream_hbaf.networks.network import Features, State
from stream_hbaf.networks.prior import adjust

Float32 = NDArray[np.float32]

# Acoustic inputs that can be computed while sound comes in: ComParE's low-level descriptors as
# tokens, or, joined by "+", its functionals, the mean state of a Whisper model's encoder, and
# blocks of whole utterances.
FUNCTIONALS = "compare"
BLOCKS = (GE2E, PROSODY, CAMPPLUS)
NOTHING_HEARD = VoicePast()


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """A transcript with what the text encoder and the commonsense model make of it."""

    transcript: Transcript
    embedding: Float32 | None  # [D]; None without text in the bundle's language
    commonsense: Float32 | None  # [3, K]: external, internal, purpose
    window_before: TurnWindow = EMPTY_WINDOW  # the dialogue's text that it was encoded with
    window_after: TurnWindow = EMPTY_WINDOW  # the one that the next utterance is encoded with
    speaker: str = ""  # by whom it was thought to be spoken


@dataclass(frozen=True, slots=True)
class Prediction:
    """The emotion of one utterance."""

    probabilities: dict[str, float]
    modalities: tuple[Modality, ...]
    abstained: bool  # the best label isn't probable enough to be an answer
    labels_in_set: tuple[str, ...]  # the conformal set, most probable first; never empty
    contributions: Contributions | None = None  # where an explanation was asked for
    conflict: bool | None = None  # likewise, if there were both audio and text
    familiarity: float | None = None  # of the voice; None without audio or statistics
    telling: float | None = None  # how much the words tell; None without words, or with no voice
    arousal: float | None = None  # of the voice; None without audio or a head for it
    inferences: Inferred | None = None  # likewise, if there was text and the settings ask for them

    @property
    def label(self) -> str:
        """The most probable label."""
        return max(self.probabilities, key=self.probabilities.__getitem__)


def network_input(
    bundle: Bundle,
    acoustic: Acoustic | None,
    text: TextFeatures | None,
    *,
    speaker: int = 0,
    voices: VoicePast = NOTHING_HEARD,
) -> Features:
    """The network's input for one utterance, on its device.

    ``speaker`` is its speaker's number, ``voices`` what its sound is relative to.
    """
    audio = _audio_input(bundle, acoustic, text)
    if audio is not None and bundle.baseline is not None:
        audio = bundle.baseline.relative(audio, speaker=speaker, past=voices)
    features = Features(
        audio=_tensor(audio),
        text=_tensor(None if text is None else text.embedding),
        commonsense=_tensor(None if text is None else text.commonsense),
        speaker=torch.tensor(speaker),
    )
    return features.map(lambda tensor: tensor.to(_device(bundle)))


def remember_voice(
    bundle: Bundle,
    acoustic: Acoustic | None,
    text: TextFeatures | None,
    *,
    speaker: int,
    voices: VoicePast,
) -> VoicePast:
    """``voices`` with an utterance that is over; as they were, where a bundle has no baseline."""
    audio = None if bundle.baseline is None else _audio_input(bundle, acoustic, text)
    return voices if audio is None else voices.add(audio, speaker=speaker)


def _audio_input(
    bundle: Bundle, acoustic: Acoustic | None, text: TextFeatures | None
) -> Float32 | None:
    """The network's acoustic input, [A] or tokens [F, A]; None if what it needs is missing."""
    if acoustic is None or bundle.scaling is None:
        return None
    if bundle.config.acoustic_input == LLD:
        tokens = frames_to_tokens(acoustic.lld, frame_ms=LLD_MS)
        return bundle.scale(tokens) if len(tokens) else None
    parts = [_part(part, acoustic, text) for part in bundle.config.acoustic_input.split("+")]
    measured = join_parts(parts, bundle.config.acoustic_widths)
    if measured is None:
        return None
    scaled: Float32 = bundle.scale(measured[None])
    return scaled if bundle.config.network.takes_tokens else scaled[0]


def _part(name: str, acoustic: Acoustic, text: TextFeatures | None) -> Float32 | None:
    """One representation of the acoustic input; None if the utterance has it not."""
    if name == FUNCTIONALS:
        return acoustic.functionals
    if name.startswith(WHISPER):
        return None if text is None else text.transcript.encoder_mean
    return acoustic.blocks.get(name)


def whisper_encoder_of(config: BundleConfig) -> str | None:
    """The Whisper model whose encoder is part of the bundle's acoustic input, if one is."""
    parts = config.acoustic_input.split("+")
    return next((part.removeprefix(WHISPER) for part in parts if part.startswith(WHISPER)), None)


def blocks_of(config: BundleConfig) -> list[str]:
    """The parts of the bundle's acoustic input that are computed of whole utterances."""
    return [part for part in config.acoustic_input.split("+") if part in BLOCKS]


def is_live(config: BundleConfig) -> bool:
    """Whether the bundle's acoustic input can be computed while sound comes in."""
    acoustic = config.acoustic_input
    return acoustic in (LLD, NONE) or all(
        part in (FUNCTIONALS, *BLOCKS) or part.startswith(WHISPER) for part in acoustic.split("+")
    )


def initial_state(bundle: Bundle) -> State:
    """The state of a dialogue before its first utterance.

    Of a bundle that weighs voices it has two streams: all that the dialogue brings, and its words
    alone. These answer where there is no sound, and what sound adds is added to them.
    """
    return bundle.network.initial_state(2 if bundle.weighs_voices else None)


@torch.inference_mode()
def predict(
    bundle: Bundle,
    features: Features,
    *,
    state: State,
    explain: bool,
    odds: Probabilities | None = None,
    set_shift: float = 0.0,
    sums: RunningSums = NOTHING_SUMMED,
) -> tuple[Prediction, State]:
    """One step of the network: the prediction and the state after it.

    To ``explain``, the same step is computed for every coalition of the inputs, in one batch. All
    probabilities are adjusted by ``odds`` [C], of a deployment's shares of labels to training's,
    and the label set by ``set_shift``, what the deployment's corrections say of it. ``sums`` are
    those of the dialogue's utterances before this one.
    """
    given: list[Modality] = ["audio"] if features.audio is not None else []
    if features.text is not None:
        given.append("text")
    parts = [*given, "context"]
    if explain and state == initial_state(bundle):
        parts.remove("context")
    every = coalitions(parts) if explain else [frozenset(parts)]
    familiarity = _familiarity(bundle, features)
    predicted, after, telling = _step_with(
        bundle, every, features=features, state=state, familiarity=familiarity, sums=sums
    )
    if odds is not None:
        predicted = {parts: adjust(found, odds) for parts, found in predicted.items()}
    whole = predicted[every[-1]]
    pattern = pattern_of(audio="audio" in given, text="text" in given)
    labels, calibration = bundle.labels, bundle.calibration
    inside = calibration.label_sets(whole, pattern=pattern, shift=set_shift)
    prediction = Prediction(
        dict(zip(labels, map(float, whole), strict=True)),
        tuple(given),
        abstained=bool(calibration.abstains(whole, pattern=pattern)),
        labels_in_set=tuple(labels[n] for n in np.argsort(-whole) if inside[n]),
        familiarity=familiarity,
        telling=telling if "text" in given else None,
        arousal=_arousal(bundle, features),
    )
    return (_explained(bundle, prediction, predicted) if explain else prediction), after


def _familiarity(bundle: Bundle, features: Features) -> float | None:
    """How familiar the audio [A] is; None without audio or statistics."""
    if bundle.familiarity is None or features.audio is None:
        return None
    [found] = bundle.familiarity(features.audio.numpy(force=True)[None])
    return float(found) if np.isfinite(found) else None


def _arousal(bundle: Bundle, features: Features) -> float | None:
    """How aroused the voice sounds; None without audio or a head for it."""
    if bundle.arousal is None or features.audio is None:
        return None
    return float(bundle.arousal(features.audio.numpy(force=True)))


def _step_with(
    bundle: Bundle,
    every: Sequence[frozenset[str]],
    *,
    features: Features,
    state: State,
    familiarity: float | None,
    sums: RunningSums,
) -> tuple[dict[frozenset[str], Probabilities], State, float | None]:
    """Probabilities [C] for each coalition of inputs, the state after the last, and how much the
    words of this one tell, where voices are weighed.

    Without "context" the network starts from its initial state. Text features stay as they are:
    encoded with the dialogue's earlier text, if the encoder does that. Where voices are weighed,
    the network also steps without this utterance's audio from the words' own stream of the state,
    which alone decides for coalitions without audio.
    """
    whole, weighs = every[-1], bundle.weighs_voices
    steps = [(parts, 0) for parts in every if not weighs or "audio" in parts or parts == whole]
    if weighs:
        steps += [(parts, 1) for parts in dict.fromkeys(parts - {"audio"} for parts in every)]
    streams = [state.map(itemgetter(n)) for n in (0, 1)] if weighs else [state]
    logits, after = _step_streams(bundle, steps, features=features, streams=streams)
    words = np.stack([logits[parts - {"audio"}, 1] for parts in every]) if weighs else None
    familiar, means, telling = _means(
        bundle, every, words=words, familiarity=familiarity, sums=sums
    )
    found = bundle.calibration.probabilities(
        np.stack([logits[parts, int(weighs and "audio" not in parts)] for parts in every]),
        pattern=[pattern_of(audio="audio" in parts, text="text" in parts) for parts in every],
        words=words,
        familiarity=familiar,
        mean_telling=means,
    )
    last = [steps.index((whole, 0))]
    if weighs:
        last.append(steps.index((whole - {"audio"}, 1)))
    kept = after.map(lambda part: part[last if weighs else last[0]].clone())
    return dict(zip(every, found, strict=True)), kept, telling


def _means(
    bundle: Bundle,
    every: Sequence[frozenset[str]],
    *,
    words: NDArray[np.floating] | None,
    familiarity: float | None,
    sums: RunningSums,
) -> tuple[Probabilities | None, Probabilities | None, float | None]:
    """The running means of familiarity and of how much words tell, [P] each, for P coalitions of
    inputs, and how much the last one's words tell. None where that isn't weighed.

    What was heard before is part of the "context".
    """
    reliability = bundle.calibration.reliability
    if reliability is None:
        return None, None, None
    before = [sums if "context" in parts else NOTHING_SUMMED for parts in every]
    familiar = [reliability.mean_familiarity(familiarity, one) for one in before]
    known = np.array(familiar, np.float64)  # None: NaN
    if words is None:
        return known, None, None
    telling = bundle.calibration.telling(words)
    means = [
        reliability.mean_telling(float(own) if "text" in parts else None, one)
        for own, parts, one in zip(telling, every, before, strict=True)
    ]
    return known, np.array(means, np.float64), float(telling[-1])


def _step_streams(
    bundle: Bundle,
    steps: Sequence[tuple[frozenset[str], int]],
    *,
    features: Features,
    streams: Sequence[State],
) -> tuple[dict[tuple[frozenset[str], int], NDArray[np.floating]], State]:
    """Logits [C] of each step, coalition and stream, in one batch, and the states after them."""

    def mask(part: str) -> torch.Tensor:
        return torch.tensor([part in parts for parts, _ in steps], device=_device(bundle))

    network = bundle.network
    given = replace(
        features.map(lambda tensor: tensor.expand(len(steps), *tensor.shape)),
        audio_mask=mask("audio"),
        text_mask=mask("text"),
    )
    initial = network.initial_state()
    before = [streams[n] if "context" in parts else initial for parts, n in steps]
    logits, after = network.step(given, initial.stack(before))
    return dict(zip(steps, logits.numpy(force=True), strict=True)), after


def _explained(
    bundle: Bundle, prediction: Prediction, predicted: Mapping[frozenset[str], Probabilities]
) -> Prediction:
    """The prediction with the exact Shapley value of each input.

    The worth of a coalition is the label's probability given that coalition alone. An input that
    is absent adds exactly 0, as does the context of a dialogue's first utterance.
    """
    label = bundle.labels.index(prediction.label)
    shares = shapley({parts: float(p[label]) for parts, p in predicted.items()})
    every = max(predicted, key=len)
    conflict = None
    if {"audio", "text"} <= every:
        conflict = bundle.calibration.conflicts(
            bundle.labels, audio=predicted[every - {"text"}], text=predicted[every - {"audio"}]
        )
    none = {"audio": 0.0, "text": 0.0, "context": 0.0}
    return replace(prediction, contributions=Contributions(**none | shares), conflict=conflict)


def emotion_of(prediction: Prediction) -> Emotion:
    """A prediction as it is published."""
    return Emotion(
        label=prediction.label,
        score=prediction.probabilities[prediction.label],
        abstained=prediction.abstained,
        set=list(prediction.labels_in_set),
        probabilities=prediction.probabilities,
        familiarity=prediction.familiarity,
        affect=affect_of(prediction.probabilities, prediction.arousal),
    )


def _device(bundle: Bundle) -> torch.device:
    return next(bundle.network.parameters()).device


def _tensor(array: Float32 | None) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array)
