"""Loads all models of a recogniser, and classifies the utterances of dialogues.

Plain calls without a clock or an event loop. The live pipeline, the replay of sessions and the
evaluation call the same code.
"""

import logging
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from stream_hbaf.bundle import Bundle, read_bundle_config
from stream_hbaf.bundle_config import NONE, BundleConfig
from stream_hbaf.config import SAMPLE_RATE_HZ, Config
from stream_hbaf.dialogue import LiveDialogue
from stream_hbaf.errors import BundleError, ConfigError, shorten
from stream_hbaf.events import Inferred, Model
from stream_hbaf.features import ge2e, speaker
from stream_hbaf.features.acoustic import Acoustic, AcousticExtractor, AcousticFrontEnd
from stream_hbaf.features.baseline import VoicePast
from stream_hbaf.features.blocks import BlockFrontEnd
from stream_hbaf.features.ge2e import find_ge2e
from stream_hbaf.features.prosody import ProsodyPast, describe_next
from stream_hbaf.features.representations import (
    CAMPPLUS,
    GE2E,
    LLD,
    PROSODY,
    WHISPER,
    open_representation,
)
from stream_hbaf.features.speaker import SpeakerEncoder, find_campplus, open_speaker_encoder
from stream_hbaf.features.text import EMPTY_WINDOW, Turn, TurnWindow
from stream_hbaf.features.whisper import Transcriber, Transcribing, Transcript
from stream_hbaf.features.whisper_encoder import decoders
from stream_hbaf.networks.adaptive_sets import AdaptiveSets
from stream_hbaf.networks.calibration import (
    MODALITIES,
    NOTHING_SUMMED,
    Modality,
    Probabilities,
    RunningSums,
)
from stream_hbaf.networks.network import State
from stream_hbaf.networks.prior import Prior, open_prior
from stream_hbaf.prediction import (
    BLOCKS,
    FUNCTIONALS,
    NOTHING_HEARD,
    Prediction,
    TextFeatures,
    blocks_of,
    initial_state,
    is_live,
    network_input,
    predict,
    remember_voice,
    whisper_encoder_of,
)
from stream_hbaf.weights import combine, digest_parts

LOG = logging.getLogger(__name__)
# Blocks whose weights a package brings: how these are found, and the package is installed.
ENCODERS = {GE2E: (find_ge2e, ge2e.INSTALL), CAMPPLUS: (find_campplus, speaker.INSTALL)}

Int16 = NDArray[np.int16]


class Recognizer(AbstractContextManager["Recognizer"]):
    """All models of one recogniser, loaded once. A context manager: openSMILE holds threads."""

    acoustic: AcousticFrontEnd | None  # None: the bundle takes text only
    speaker_encoder: SpeakerEncoder | None  # None: speakers aren't told apart by their voices
    prior: Prior | None  # of the deployment; None: as in training
    sets: AdaptiveSets | None  # by the deployment's corrections; None: as calibrated
    decoders: int  # transcripts, or embeddings of sound, that are computed at once

    def __init__(self, config: Config, *, transcriber: Transcribing | None = None) -> None:
        """Load all models, in parallel; raises ModelError, BundleError or ConfigError.

        A ``transcriber`` that is given takes the place of Whisper here.
        """
        self.config = config
        self.decoders = decoders()
        self._warned_of_other_language = False
        device = resolve_device(config.device)
        torch.set_num_threads(1)  # the network is small; Whisper makes better use of the cores
        settings = read_bundle_config(config.model)
        require_live(settings)
        encoder = whisper_encoder_of(settings)
        with ThreadPoolExecutor() as pool:
            whisper = pool.submit(
                lambda: (
                    transcriber
                    or Transcriber(config.transcript, acoustic_encoder=encoder, device=device)
                )
            )
            bundle = pool.submit(Bundle.load, config.model, device=device)
            extra = [f"whisper:{config.transcript.model}", f"vad:{config.vad.engine}"]
            if config.speakers.engine != NONE:
                extra.append(f"speaker:{config.speakers.engine}")
            parts = [*settings.parts, *extra]
            verify = partial(digest_parts, parts, known=settings.digests, bundle=settings.id)
            verified = pool.submit(verify)
            voices = pool.submit(_open_speaker_encoder, config, device=device)
            self.acoustic = self._open_front_end(settings, device=device)
            try:
                self.transcriber: Transcribing = whisper.result()
                # The encoder has its own copy of the tuned layers: 40 MB that only saving needs.
                self.bundle = replace(bundle.result(), tuned={})
                self.prior = _open_prior(config, self.bundle)
                self.sets = _open_sets(config, self.bundle)
                self.speaker_encoder = voices.result()
                verified.result()
                self._digests = verify()  # remembered, but for what was downloaded meanwhile
                require_inferences(config, self.bundle)
                self._warn_of_unread_language()
                self._warm_up()
            except BaseException:
                self.close()
                raise

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop openSMILE's threads; no utterance can be recognised after that."""
        if self.acoustic is not None:
            self.acoustic.close()

    def _open_front_end(self, settings: BundleConfig, *, device: str) -> AcousticFrontEnd | None:
        return open_front_end(settings, device=device)

    def _warn_of_unread_language(self) -> None:
        transcribed, read = self.config.transcript.language, self.bundle.config.language
        if transcribed != read and self.bundle.config.network.use_text:
            LOG.warning(
                "bundle %s reads '%s' only: words in '%s' are shown, but emotion comes from the "
                "sound alone",
                self.bundle.id,
                read,
                transcribed,
            )

    def _warm_up(self) -> None:
        """Run each model once: the first call takes longer (the transcriber has done so)."""
        mean = np.zeros(self.transcriber.encoder_width, np.float32)
        transcript = Transcript("hello", self.bundle.config.language, 0.0, 0.0, mean)
        text = self.encode_text(transcript)
        acoustic = None
        if self.acoustic is not None:
            acoustic = self.acoustic.extract(_noise())
        if self.speaker_encoder is not None:
            self.speaker_encoder.embed(_noise())
        dialogue = self.new_dialogue()
        acoustic, _ = _described(acoustic, speaker="", past=dialogue.prosody)
        try:
            self.classify(acoustic=acoustic, text=text, state=dialogue.state, explain=True)
        except (LookupError, RuntimeError, ValueError) as error:
            reason = shorten(str(error))
            raise BundleError(
                f"bundle {self.bundle.id}: its network takes other features than "
                f"'{self.bundle.config.acoustic_input}' are here ({reason}); train it again"
            ) from error

    @property
    def model(self) -> Model:
        """The bundle's id, with one SHA-256 of all weights that take part."""
        return Model(id=self.bundle.id, sha256=combine(self.bundle.sha256, self._digests))

    def new_dialogue(self) -> LiveDialogue:
        """A dialogue without any utterance yet."""
        return LiveDialogue(initial_state(self.bundle))

    def encode_text(
        self, transcript: Transcript, *, speaker: str = "", window: TurnWindow = EMPTY_WINDOW
    ) -> TextFeatures:
        """The features of a transcript, encoded with the dialogue's ``window`` before it.

        Empty text, and text of a language that the bundle doesn't read, has no features.
        """
        own = self.bundle.config
        reads = own.network.use_text and transcript.language == own.language
        if not (transcript.text and reads):
            return TextFeatures(transcript, None, None, window, window, speaker)
        turn = Turn(speaker, transcript.text)
        embedding, after = self.bundle.encoder.encode_next(turn, window)
        [inferred] = self.bundle.commonsense.infer_texts(
            [transcript.text], features=embedding[None]
        )
        return TextFeatures(transcript, embedding, inferred, window, after, speaker)

    def classify_final(
        self,
        *,
        acoustic: Acoustic | None,
        text: TextFeatures | None,
        dialogue: LiveDialogue,
        speaker: str = "",
        turn: int = 0,
        explain: bool = False,
        modalities: Collection[Modality] = MODALITIES,
        odds: Probabilities | None = None,
    ) -> Prediction:
        """The emotion of the dialogue's next utterance, which moves the dialogue on.

        Text that was encoded before an earlier utterance was final, or before its speaker was
        known, is encoded again. Text that is withheld isn't context of later utterances either.
        When one of the models fails, the dialogue stays as it was. With the number of its ``turn``,
        the utterance can be revised. ``explain`` and ``modalities`` as in ``classify``. With
        ``odds``, the deployment's prior stays as it is; otherwise it learns from the answer.
        """
        learns = odds is None
        if odds is None:
            odds = self._odds()
        if text is not None:
            self._warn_of_other_language(text.transcript)
            named = self.bundle.config.context.speakers and text.speaker != speaker
            if named or text.window_before != dialogue.window:
                text = self.encode_text(text.transcript, speaker=speaker, window=dialogue.window)
        described, prosody = _described(acoustic, speaker=speaker, past=dialogue.prosody)
        number, voices = dialogue.number_of(speaker), dialogue.voices_with(speaker)
        prediction, state = self.classify(
            acoustic=described,
            text=text,
            state=dialogue.state,
            speaker=number,
            explain=explain,
            modalities=modalities,
            odds=odds,
            voices=voices,
            sums=dialogue.sums,
        )
        if turn:
            dialogue.keep(
                turn,
                (self._without_unused(acoustic), text),
                speaker=speaker,
                explain=explain,
                modalities=modalities,
                odds=odds,
            )
        answered = f"{dialogue.id}-{turn}" if turn else ""
        self._learn(prediction, utterance=answered, odds=odds if learns else None)
        dialogue.state = state
        dialogue.prosody = prosody
        dialogue.sums = dialogue.sums.add(
            familiarity=prediction.familiarity, telling=prediction.telling
        )
        dialogue.voices = voices
        if "audio" in modalities:
            dialogue.voices = remember_voice(
                self.bundle, described, text, speaker=number, voices=voices
            )
        if number == len(dialogue.speakers):
            dialogue.speakers.append(speaker)
        if text is not None and "text" in modalities:
            dialogue.window = text.window_after
        return prediction

    def _without_unused(self, acoustic: Acoustic | None) -> Acoustic | None:
        """The features without low-level descriptors, unless the network takes them."""
        if acoustic is None or self.bundle.config.acoustic_input == LLD:
            return acoustic
        return replace(acoustic, lld=acoustic.lld[:0])

    def revise(self, dialogue: LiveDialogue, speakers: Mapping[int, str]) -> dict[int, Prediction]:
        """Classify a dialogue again from the first turn that somebody else has spoken.

        ``speakers`` holds the speakers of turns whose speaker may have changed. Returns the
        predictions of that turn and all after it, by turn; they, and the dialogue, are as if these
        speakers had been known from the start. Only the latest turns can be revised. When one of
        the models fails, the dialogue stays as it was.
        """
        changed = [
            one.turn for one in dialogue.past if speakers.get(one.turn, one.speaker) != one.speaker
        ]
        with dialogue.restored_on_failure():
            return {
                one.turn: self.classify_final(
                    acoustic=one.acoustic,
                    text=one.text,
                    dialogue=dialogue,
                    speaker=speakers.get(one.turn, one.speaker),
                    turn=one.turn,
                    explain=one.explain,
                    modalities=one.modalities,
                    odds=one.odds,
                )
                for one in dialogue.rewind(changed)
            }

    def _learn(self, prediction: Prediction, *, utterance: str, odds: Probabilities | None) -> None:
        """Let label sets and the prior, where the settings have them, learn from an answer.

        The sets learn from utterances that have an id, the prior where there are its ``odds``.
        """
        if utterance and self.sets is not None:
            self.sets.remember(utterance, prediction)
        if self.prior is not None and odds is not None and prediction.modalities:
            self.prior.learn(np.array([*prediction.probabilities.values()]), odds=odds)

    def _odds(self) -> Probabilities | None:
        return None if self.prior is None else self.prior.odds

    def _warn_of_other_language(self, transcript: Transcript) -> None:
        """Warn once that text in another language is left out."""
        expected = self.config.transcript.language
        if transcript.language == expected or self._warned_of_other_language:
            return
        self._warned_of_other_language = True
        LOG.warning(
            "that sounded like language '%s', not '%s': its words are left out; "
            "--language %s writes them down",
            transcript.language,
            expected,
            transcript.language,
        )

    def classify(
        self,
        *,
        acoustic: Acoustic | None,
        text: TextFeatures | None,
        state: State,
        speaker: int = 0,
        explain: bool = False,
        modalities: Collection[Modality] = MODALITIES,
        odds: Probabilities | None = None,
        voices: VoicePast = NOTHING_HEARD,
        sums: RunningSums = NOTHING_SUMMED,
    ) -> tuple[Prediction, State]:
        """The utterance's emotion and the dialogue's state after it; the dialogue stays as it is.

        Either modality may be missing; one that isn't among ``modalities`` is withheld from the
        network. Prosody among the blocks must be described relative to the dialogue's past, as
        ``classify_final`` does; ``voices`` is what other parts are relative to, ``sums`` those of
        the utterances before. ``speaker`` is the number of a speaker in the dialogue. With
        ``explain``, the prediction has contributions and inferences. ``odds`` of labels are those
        of the deployment's prior unless they are given.
        """
        if "audio" not in modalities:
            acoustic = None
        if "text" not in modalities and text is not None:
            # The mean of Whisper's encoder is part of the acoustic input and stays.
            text = replace(text, embedding=None, commonsense=None)
        features = network_input(self.bundle, acoustic, text, speaker=speaker, voices=voices)
        odds = self._odds() if odds is None else odds
        prediction, after = predict(
            self.bundle,
            features,
            state=state,
            explain=explain,
            odds=odds,
            set_shift=0.0 if self.sets is None else self.sets.shift,
            sums=sums,
        )
        if explain:
            known = self.bundle.inferences if self.config.inferences else None
            if known is not None and text is not None and text.commonsense is not None:
                inferred = Inferred(**known.nearest(text.commonsense))
                prediction = replace(prediction, inferences=inferred)
        return prediction, after


def _noise() -> Int16:
    """A second that is not silence, of which nothing would be computed."""
    return np.random.default_rng(0).integers(-99, 99, SAMPLE_RATE_HZ, np.int16)


def open_front_end(config: BundleConfig, *, device: str) -> AcousticFrontEnd | None:
    """What computes a bundle's acoustic input; None for a bundle of text. Raises ModelError."""
    if config.acoustic_input == NONE:
        return None
    blocks = [
        open_representation(name, device=device)
        for name in blocks_of(config)
        if not _is_left_out(name, config)
    ]
    return BlockFrontEnd(AcousticExtractor(), blocks) if blocks else AcousticExtractor()


def _is_left_out(block: str, config: BundleConfig) -> bool:
    """Whether an utterance may lack this block and the package with its weights isn't installed."""
    find, install = ENCODERS.get(block, (None, ""))
    if find is None or find() is not None or not config.acoustic_widths:
        return False
    LOG.warning(
        "bundle %s also listens with %s, whose weights are missing: the sound will tell less; %s",
        config.id,
        block,
        install,
    )
    return True


def _open_speaker_encoder(config: Config, *, device: str) -> SpeakerEncoder | None:
    return None if config.speakers.engine == NONE else open_speaker_encoder(device)


def _described(
    acoustic: Acoustic | None, *, speaker: str, past: ProsodyPast
) -> tuple[Acoustic | None, ProsodyPast]:
    """The features with prosody relative to the dialogue's past, and the past after them."""
    measured = None if acoustic is None else acoustic.blocks.get(PROSODY)
    if acoustic is None or measured is None:
        return acoustic, past
    described, after = describe_next(measured, speaker=speaker, past=past)
    return replace(acoustic, blocks={**acoustic.blocks, PROSODY: described}), after


def _open_prior(config: Config, bundle: Bundle) -> Prior | None:
    own = bundle.config
    return open_prior(config.prior, labels=own.labels, training=own.shares, bundle=own.id)


def _open_sets(config: Config, bundle: Bundle) -> AdaptiveSets | None:
    return AdaptiveSets(bundle.calibration, bundle=bundle.id) if config.adaptive_sets else None


def require_inferences(config: Config, bundle: Bundle) -> None:
    """Raise ConfigError if inferences are asked for and the bundle has no phrases for them."""
    if config.inferences and bundle.inferences is None:
        raise ConfigError(
            f"inferences: bundle {bundle.id} has no phrases for them; leave --inferences "
            "out, or take a bundle that has them, such as one trained by configs/live-en.yaml"
        )


def require_live(config: BundleConfig) -> None:
    """Raise BundleError if the network's input can't be computed while sound comes in."""
    if not is_live(config):
        live = ", ".join((FUNCTIONALS, *BLOCKS, f"{WHISPER}NAME"))
        raise BundleError(
            f"bundle {config.id}: its features '{config.acoustic_input}' can't be computed live; "
            f"evaluate it offline, or choose one with {LLD}, {NONE}, or {live} joined by +, such "
            "as live-en"
        )
    if config.network.mode != "live":
        raise BundleError(
            f"bundle {config.id}: was trained offline and sees the future, so it can't be used "
            "live, only evaluated; take one of mode live, such as live-en"
        )


def resolve_device(device: str) -> str:
    """``cuda`` or ``cpu``; ``auto`` takes the GPU where there is one. Raises ConfigError."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device 'cuda': torch finds no GPU here; use --device auto or cpu")
    return "cuda" if device != "cpu" and has_gpu else "cpu"
