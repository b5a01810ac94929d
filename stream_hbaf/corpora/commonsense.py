"""Reads commonsense annotations of everyday events: Event2Mind and ATOMIC, in one form.

ATOMIC took over Event2Mind's events with their annotations and split them anew: four fifths of
its test part stand in Event2Mind's train part. So what is tested is left out by event.
"""

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stream_hbaf.corpora.dialogue import Split, read_rows, read_utf8, require_file
from stream_hbaf.errors import CorpusError

# Our relation: its column. The order is that of every commonsense vector in this project.
RELATIONS = {"external": "Otheremotion", "internal": "Xemotion", "purpose": "Xintent"}
ATOMIC_RELATIONS = {"external": "oReact", "internal": "xReact", "purpose": "xIntent"}
ATOMIC_FILES: dict[Split, str] = {
    "train": "v4_atomic_trn.csv",
    "dev": "v4_atomic_dev.csv",
    "test": "v4_atomic_tst.csv",
}
Phrases = tuple[str, ...]
Events = Sequence["CommonsenseEvent"]
NOTHING = frozenset({"none", "n/a", "nothing", ""})  # how annotators write 'no inference'


@dataclass(frozen=True, slots=True)
class CommonsenseEvent:
    """An event and annotators' inferences from it; a relation without inference has no phrases."""

    text: str
    external: Phrases  # what others feel
    internal: Phrases  # what the speaker feels
    purpose: Phrases  # what the speaker intended

    def phrases(self, relation: str) -> Phrases:
        """The phrases of one of RELATIONS."""
        found: Phrases = getattr(self, relation)
        return found


@dataclass(frozen=True)
class Annotations:
    """What people inferred, split so that no event is in two parts."""

    train: Mapping[str, Events]  # by corpus
    dev: Events
    tests: Mapping[str, Events]  # by corpus
    left_out: Mapping[str, int]  # part: how many of its events stand in dev or a test part


def read_event2mind(folder: Path, split: Split) -> list[CommonsenseEvent]:
    """Read one split of Event2Mind (Rashkin et al. 2018), one event a line.

    Raises CorpusError with file and line for what can't be read.
    """
    path = require_file(folder / f"{split}.csv", corpus="Event2Mind")
    rows = _read_table(path, event="Event", relations=RELATIONS)
    return [CommonsenseEvent(text, **phrases) for text, phrases in rows]


def read_atomic(folder: Path, split: Split) -> list[CommonsenseEvent]:
    """Read one split of ATOMIC (Sap et al. 2019), each event once with all annotators' phrases.

    Where ``v4_atomic_trn.csv`` is missing, ``v4_atomic_dev.csv`` is the train split and there are
    no dev events. An event without inferences under our relations is left out. Raises CorpusError
    with file and line for what can't be read.
    """
    has_train = (folder / ATOMIC_FILES["train"]).is_file()
    if split == "dev" and not has_train:
        return []
    file = ATOMIC_FILES[split if has_train or split == "test" else "dev"]
    path = require_file(folder / file, corpus="ATOMIC")
    events: dict[str, CommonsenseEvent] = {}
    for text, found in _read_table(path, event="event", relations=ATOMIC_RELATIONS):
        before = events.get(text, CommonsenseEvent(text, (), (), ()))
        phrases = {relation: before.phrases(relation) + new for relation, new in found.items()}
        events[text] = CommonsenseEvent(text, **phrases)
    return [event for event in events.values() if any(map(event.phrases, RELATIONS))]


def read_annotations(corpora: Path, *, atomic: bool) -> Annotations:
    """Read ``corpora``/event2mind and, if asked, ``corpora``/atomic; dev is Event2Mind's.

    An event of a test part is left out of dev, one of dev or a test part is left out of train,
    whichever corpus it comes from. Raises CorpusError.
    """
    folder = corpora / "event2mind"
    train: dict[str, Events] = {"event2mind": read_event2mind(folder, "train")}
    tests: dict[str, Events] = {"event2mind": read_event2mind(folder, "test")}
    if atomic:
        train["atomic"] = read_atomic(corpora / "atomic", "train")
        tests["atomic"] = read_atomic(corpora / "atomic", "test")
    tested = _distinct(*tests.values())
    read_dev = read_event2mind(folder, "dev")
    dev = _without(read_dev, tested)
    kept = {corpus: _without(events, tested | _distinct(dev)) for corpus, events in train.items()}
    left_out = {
        f"{corpus} train": len(_distinct(train[corpus])) - len(_distinct(events))
        for corpus, events in kept.items()
    }
    left_out["event2mind dev"] = len(_distinct(read_dev)) - len(_distinct(dev))
    return Annotations(kept, dev, tests, left_out)


def same_event(text: str) -> str:
    """What two wordings of an event have in common: its words, without case and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def in_first_person(event: str) -> str:
    """'PersonX spills ___' as its speaker would say it, 'I spills something': utterances are in the
    first person.

    Verbs keep their form: inflecting them would make other errors, and the encoder tolerates it.
    """
    event = re.sub(r"\bPersonX's\b", "my", event, flags=re.IGNORECASE)
    event = re.sub(r"\bPersonX\b", "I", event, flags=re.IGNORECASE)
    event = re.sub(r"\bPerson[YZ]\b", "them", event, flags=re.IGNORECASE)
    event = event.replace("them's", "their").replace("___", "something")
    return " ".join(event.split())


def _distinct(*sources: Events) -> set[str]:
    return {same_event(event.text) for event in itertools.chain(*sources)}


def _without(events: Events, known: Collection[str]) -> list[CommonsenseEvent]:
    return [event for event in events if same_event(event.text) not in known]


def _read_table(
    path: Path, *, event: str, relations: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Phrases]]]:
    """Each row's event in the first person, and its phrases by relation."""
    for where, row in read_rows(read_utf8(path), path=path, columns=(event, *relations.values())):
        named = relations.items()
        phrases = {relation: _read_phrases(row[column], where=where) for relation, column in named}
        yield in_first_person(row[event]), phrases


def _read_phrases(cell: str, *, where: str) -> Phrases:
    """The phrases of a cell that holds a JSON list, in plain lower case; 'none' is no phrase."""
    try:
        listed = json.loads(cell)
    except json.JSONDecodeError:
        listed = None
    if not isinstance(listed, list) or not all(isinstance(phrase, str) for phrase in listed):
        raise CorpusError(f"{where}: {cell!r} isn't a list of phrases; mend that line")
    plain = (" ".join(phrase.lower().strip(" .!").split()) for phrase in listed)
    return tuple(phrase for phrase in plain if phrase not in NOTHING)
