"""A recorded corpus: Event2Mind, what people mean and feel in everyday events (Rashkin 2018)."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stream_hbaf.corpora.dialogue import Split, read_rows, read_utf8, require_file
from stream_hbaf.errors import CorpusError

# Our relation: its column. The order is that of every commonsense vector in this project.
RELATIONS = {"external": "Otheremotion", "internal": "Xemotion", "purpose": "Xintent"}
NOTHING = frozenset({"none", "n/a", "nothing", ""})  # the annotators' ways of saying 'no inference'


@dataclass(frozen=True, slots=True)
class CommonsenseEvent:
    """An event and what annotators inferred; a relation without inference has no phrases."""

    text: str
    external: tuple[str, ...]  # what others feel
    internal: tuple[str, ...]  # what the speaker feels
    purpose: tuple[str, ...]  # what the speaker meant to do

    def phrases(self, relation: str) -> tuple[str, ...]:
        found: tuple[str, ...] = getattr(self, relation)
        return found


def read_event2mind(folder: Path, split: Split) -> list[CommonsenseEvent]:
    """Read one split, one event a line, in the first person; CorpusError names file and line."""
    path = require_file(folder / f"{split}.csv", corpus="Event2Mind")
    content = read_utf8(path)
    events = []
    for where, row in read_rows(content, path=path, columns=("Event", *RELATIONS.values())):
        inferred = {
            relation: read_phrases(row[column], where=where)
            for relation, column in RELATIONS.items()
        }
        events.append(CommonsenseEvent(in_first_person(row["Event"]), **inferred))
    return events


def hold_out(
    events: Sequence[CommonsenseEvent], held: Iterable[CommonsenseEvent]
) -> list[CommonsenseEvent]:
    """``events`` without those that stand in ``held``, so that no tested event is trained on.

    ATOMIC shares most of its events with Event2Mind: 198 of ATOMIC's 2,198 dev events stand
    in Event2Mind's test split too.
    """
    texts = {event.text.casefold() for event in held}
    return [event for event in events if event.text.casefold() not in texts]


def in_first_person(event: str) -> str:
    """Say 'PersonX spills ___' as a speaker would, 'I spills something': utterances are ours.

    Verbs keep their form; the encoder doesn't mind and inflecting them would make other errors.
    """
    event = re.sub(r"\bPersonX's\b", "my", event, flags=re.IGNORECASE)
    event = re.sub(r"\bPersonX\b", "I", event, flags=re.IGNORECASE)
    event = re.sub(r"\bPerson[YZ]\b", "them", event, flags=re.IGNORECASE)
    event = event.replace("them's", "their").replace("___", "something")
    return " ".join(event.split())


def read_phrases(cell: str, *, where: str) -> tuple[str, ...]:
    """The phrases of a cell that holds a JSON list, in plain lower case; 'none' is no phrase."""
    try:
        listed = json.loads(cell)
    except json.JSONDecodeError:
        listed = None
    if not isinstance(listed, list) or not all(isinstance(phrase, str) for phrase in listed):
        raise CorpusError(f"{where}: {cell!r} isn't a list of phrases; mend that line")
    plain = (" ".join(phrase.lower().strip(" .!").split()) for phrase in listed)
    return tuple(phrase for phrase in plain if phrase not in NOTHING)
