"""A recorded corpus, by name: the reader that knows its files, and what all corpora must hold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stream_hbaf.corpora.dialogue import LABELS, SPLITS, Corpus, Dialogue, Split
from stream_hbaf.corpora.emorynlp import read_emorynlp
from stream_hbaf.corpora.goemotions import read_goemotions
from stream_hbaf.corpora.iemocap import IEMOCAP_LABELS, read_iemocap
from stream_hbaf.corpora.manifest import read_manifest
from stream_hbaf.corpora.meld import read_meld
from stream_hbaf.corpora.nemo import read_nemo
from stream_hbaf.corpora.ravdess import read_ravdess
from stream_hbaf.corpora.session import holds_sessions, read_sessions
from stream_hbaf.corpora.tess import read_tess
from stream_hbaf.errors import ConfigError, CorpusError


@dataclass(frozen=True, slots=True)
class _Published:
    labels: tuple[str, ...]
    read: Callable[[Path, Split], list[Dialogue]]


_PUBLISHED: Mapping[str, _Published] = {
    "emorynlp": _Published(LABELS, read_emorynlp),
    "goemotions": _Published(LABELS, read_goemotions),
    "iemocap": _Published(IEMOCAP_LABELS, read_iemocap),
    "meld": _Published(LABELS, read_meld),
    "nemo": _Published(LABELS, read_nemo),
    "ravdess": _Published(LABELS, read_ravdess),
    "tess": _Published(LABELS, read_tess),
}
CORPORA = tuple(_PUBLISHED)
MANIFEST = ".csv"  # how the name of a corpus of one's own ends
SESSIONS = "/"  # how the name of a folder of recorded sessions ends, or of one session


def open_corpus(
    name: str, corpora: Path, *, whole: bool = True, labels: Sequence[str] = ()
) -> Corpus:
    """Read all splits of a corpus under ``corpora``: one of CORPORA, or a manifest or a folder of
    recorded sessions by its name.

    The latter two may also be paths of their own. Raises ConfigError for an unknown name, and
    CorpusError with file and line for what can't be read, an empty split, an empty dialogue, or a
    split without any label. Not ``whole``: dev and test may be empty, as TESS's are. ``labels``,
    those of a trained bundle, let a manifest be without train rows; see ``read_manifest``.
    """
    if name.endswith(MANIFEST):
        place = Path(name) if Path(name).is_file() else corpora / name
        corpus = read_manifest(place, labels=labels)
    elif name in _PUBLISHED:
        place, known = corpora / name, _PUBLISHED[name]
        corpus = Corpus(
            name, known.labels, {split: tuple(known.read(place, split)) for split in SPLITS}
        )
    elif name.endswith(SESSIONS) or any(map(holds_sessions, (Path(name), corpora / name))):
        place = Path(name) if Path(name).is_dir() else corpora / name
        corpus = read_sessions(place)
    else:
        published = ", ".join(CORPORA)
        raise ConfigError(
            f"unknown corpus '{name}'; choose {published}, a manifest's .csv, or a folder of "
            "sessions"
        )
    for split, dialogues in corpus.splits.items():
        if not dialogues and not whole and (split != "train" or labels):
            continue
        _require_turns(dialogues, where=f"{place}: {corpus.name}'s {split} split")
    return corpus


def _require_turns(dialogues: tuple[Dialogue, ...], *, where: str) -> None:
    if not dialogues:
        raise CorpusError(f"{where} is empty; add its dialogues, or choose another corpus")
    for dialogue in dialogues:
        if not dialogue.utterances:
            raise CorpusError(
                f"{where}: dialogue {dialogue.id} has no utterances; remove or mend it"
            )
    if all(said.label is None for dialogue in dialogues for said in dialogue.utterances):
        raise CorpusError(f"{where} has no labelled utterance; label some of them")
