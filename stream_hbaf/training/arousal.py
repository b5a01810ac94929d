"""Fits a bundle's head for arousal, and judges it on corpora and speakers that it hasn't heard.

What is fitted is what annotators rated, where a corpus has ratings; else the place of the label on
the scale of arousal, and besides how strongly it was acted, where that is known.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from stream_hbaf.affect import PLACES
from stream_hbaf.bundle import CARD, METRICS, Bundle, resolve_bundle
from stream_hbaf.corpora.dataset import number_speakers, rows_of
from stream_hbaf.corpora.dialogue import (
    Corpus,
    LabelledUtterance,
    Split,
    sittings,
    utterances_of,
)
from stream_hbaf.corpora.open_corpus import open_corpus
from stream_hbaf.errors import BundleError, ConfigError, CorpusError
from stream_hbaf.evaluation.offline import measure_audio
from stream_hbaf.features.baseline import VoicePast
from stream_hbaf.networks.arousal import ArousalHead, fit_head
from stream_hbaf.training.card import model_card

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Strings = NDArray[np.str_]
Progress = Callable[[str], None]

STRENGTH = 0.3  # of arousal, by which a strongly acted emotion is above its place, a normal below
FOLDS = 4  # of speakers
FITTED: tuple[Split, ...] = ("train", "dev")


@dataclass(frozen=True)
class Voices:
    """N utterances of one corpus, with the arousal that is fitted, and what it is judged by."""

    audio: Float32  # [N, A], as the network is given it
    targets: Float64  # [N]
    speakers: Strings  # [N]
    judged: Float64  # [N], strength, rating or place: its order within a group is to be found
    groups: Strings  # [N]: by speaker, and by label where strength is judged

    def of(self, rows: NDArray[np.bool_]) -> "Voices":
        """Some of them."""
        return Voices(
            self.audio[rows],
            self.targets[rows],
            self.speakers[rows],
            self.judged[rows],
            self.groups[rows],
        )


@dataclass(frozen=True)
class Judged:
    """Spearman's rank correlation with what a corpus says of arousal, mean over groups."""

    corpus_out: Mapping[str, float]  # of a head that was fitted without the corpus
    speakers_out: Mapping[str, float]  # without a quarter of its speakers, each in turn


def fit_arousal(
    name: str,
    corpora: Sequence[str],
    *,
    folder: Path,
    out: Path,
    cache: Path,
    device: str = "cpu",
    workers: int = 2,
    progress: Progress = print,
) -> Judged:
    """Write the bundle with a head fitted on corpora under ``folder``, as the new folder ``out``.

    Their train and dev splits are taken. Raises ConfigError if ``out`` exists or fewer than two
    corpora are given, BundleError for a bundle without features of whole utterances, and
    CorpusError for a corpus without audio or without labels that have a place.
    """
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; give a folder that doesn't")
    if len(set(corpora)) < 2:
        raise ConfigError("arousal: give two corpora at least, so that each can be left out")
    bundle = Bundle.load(name, device=device)
    if bundle.scaling is None or bundle.config.network.takes_tokens:
        raise BundleError(
            f"bundle {bundle.id}: its network takes no features of whole utterances, of which "
            "arousal is told; take another, such as live-en"
        )
    voices: dict[str, list[Voices]] = {}
    for one in dict.fromkeys(corpora):
        corpus = open_corpus(one, folder, all_splits=False)
        for split in FITTED:
            if corpus.splits.get(split):
                seated = sittings(corpus.splits[split])
                given = replace(corpus, splits={split: seated})
                audio = measure_audio(
                    bundle,
                    given,
                    split,
                    cache=cache,
                    device=device,
                    workers=workers,
                    progress=progress,
                )
                voices.setdefault(one, []).append(voices_of(bundle, given, split, audio=audio))
    joined = {one: _join(own, corpus=one) for one, own in voices.items()}
    judged = judge(joined)
    save_arousal(bundle, fit([*joined.values()]), judged, out=out, source=resolve_bundle(name))
    return judged


def voices_of(bundle: Bundle, corpus: Corpus, split: Split, *, audio: Float32 | None) -> Voices:
    """The utterances with scaled audio [N, A] and with an arousal to be fitted."""
    utterances, audio = utterances_of(corpus.splits[split]), _relative(bundle, corpus, split, audio)
    targets = np.array([_target(one) for one in utterances])
    known = np.isfinite(targets) & np.isfinite(audio).all(1)
    strengths = [one for one in utterances if one.strong is not None]
    judged = [one.strong if strengths else _target(one) for one in utterances]
    groups = [f"{one.speaker} {one.label}" if strengths else one.speaker for one in utterances]
    return Voices(
        audio[known],
        targets[known],
        np.array([one.speaker for one in utterances])[known],
        np.array(judged, dtype=np.float64)[known],  # None: NaN
        np.array(groups)[known],
    )


def _target(one: LabelledUtterance) -> float:
    """The arousal to be fitted; NaN where nothing says it."""
    if one.arousal is not None:
        return one.arousal
    place = PLACES.get(one.label or "", (np.nan, np.nan))[1]
    return place if one.strong is None else place + (STRENGTH if one.strong else -STRENGTH)


def _relative(bundle: Bundle, corpus: Corpus, split: Split, audio: Float32 | None) -> Float32:
    """Scaled audio [N, A] as the network is given it: relative to its speaker's past."""
    if audio is None:
        raise CorpusError(f"{corpus.name}: has no audio; leave it out")
    if bundle.baseline is None:
        return audio
    dialogues = corpus.splits[split]
    relative, speakers = np.full_like(audio, np.nan), number_speakers(dialogues)
    for rows in rows_of(dialogues):
        past = VoicePast()
        for row in rows:
            if np.isfinite(audio[row]).all():
                speaker = int(speakers[row])
                relative[row] = bundle.baseline.relative(audio[row], speaker=speaker, past=past)
                past = past.add(audio[row], speaker=speaker)
    return relative


def _join(parts: Sequence[Voices], *, corpus: str) -> Voices:
    fields = ("audio", "targets", "speakers", "judged", "groups")
    joined = Voices(*(np.concatenate([getattr(one, name) for one in parts]) for name in fields))
    if not len(joined.audio):
        raise CorpusError(f"{corpus}: no utterance with audio has a label of known arousal")
    return joined


def fit(voices: Sequence[Voices]) -> ArousalHead:
    """The head, of corpora which weigh the same."""
    counts = [np.full(len(one.audio), 1 / len(one.audio)) for one in voices if len(one.audio)]
    return fit_head(
        np.concatenate([one.audio for one in voices]),
        np.concatenate([one.targets for one in voices]),
        np.concatenate(counts),
    )


def judge(voices: Mapping[str, Voices]) -> Judged:
    """How well heads order what they weren't fitted on."""
    corpus_out, speakers_out = {}, {}
    for corpus, own in voices.items():
        others = [one for name, one in voices.items() if name != corpus]
        corpus_out[corpus] = _order(fit(others)(own.audio), own)
        found = np.full(len(own.audio), np.nan)
        number = np.unique(own.speakers, return_inverse=True)[1]
        for fold in range(min(FOLDS, number.max() + 1)):
            held = number % FOLDS == fold
            found[held] = fit([*others, own.of(~held)])(own.audio[held])
        speakers_out[corpus] = _order(found, own)
    return Judged(corpus_out, speakers_out)


def _order(found: Float64, voices: Voices) -> float:
    """The mean rank correlation within groups; NaN if no group has an order."""
    correlations = []
    for group in np.unique(voices.groups):
        own = (voices.groups == group) & np.isfinite(voices.judged)
        if len(np.unique(voices.judged[own])) > 1 and np.ptp(found[own]) > 0:
            correlations.append(float(spearmanr(found[own], voices.judged[own])[0]))
    return float(np.mean(correlations)) if correlations else float("nan")


def save_arousal(
    bundle: Bundle, head: ArousalHead, judged: Judged, *, out: Path, source: Path
) -> None:
    """Write the bundle with the head, its figures and, where it has a card of ours, a new one."""
    try:
        metrics = json.loads((source / METRICS).read_text(encoding="utf-8"))
        card = (source / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise BundleError(
            f"bundle {source}: {METRICS} or {CARD} can't be read; get the bundle again"
        ) from None
    metrics |= {"id": out.name, "arousal": asdict(judged)}
    if "recipe" in metrics and "adapted" not in metrics:
        card = model_card(metrics)
    config = bundle.config.model_copy(update={"id": out.name, "replaces": ()})
    replace(bundle, config=config, arousal=head).save(out, metrics=metrics, card=card)
