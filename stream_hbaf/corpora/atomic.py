"""A recorded corpus: ATOMIC, if-then knowledge of everyday events (Sap et al. 2019).

The same three relations as Event2Mind's, read into the same shape.
"""

from pathlib import Path

from stream_hbaf.corpora.dialogue import Split, read_rows, read_utf8, require_file
from stream_hbaf.corpora.event2mind import CommonsenseEvent, in_first_person, read_phrases

# Our relation: its column.
RELATIONS = {"external": "oReact", "internal": "xReact", "purpose": "xIntent"}
TRAIN, DEV, TEST = "v4_atomic_trn.csv", "v4_atomic_dev.csv", "v4_atomic_tst.csv"


def read_atomic(folder: Path, split: Split) -> list[CommonsenseEvent]:
    """Read one split, each event once with all its annotators' phrases, in the first person.

    Where ``v4_atomic_trn.csv`` is missing, ``v4_atomic_dev.csv`` is the train split and there are
    no dev events. An event of which nothing was inferred under our relations is left out.
    CorpusError names file and line.
    """
    whole = (folder / TRAIN).is_file()
    if split == "dev" and not whole:
        return []
    names: dict[Split, str] = {"train": TRAIN if whole else DEV, "dev": DEV, "test": TEST}
    path = require_file(folder / names[split], corpus="ATOMIC")
    content = read_utf8(path)
    inferred: dict[str, dict[str, list[str]]] = {}
    for where, row in read_rows(content, path=path, columns=("event", *RELATIONS.values())):
        event = inferred.setdefault(in_first_person(row["event"]), {name: [] for name in RELATIONS})
        for relation, column in RELATIONS.items():
            event[relation] += read_phrases(row[column], where=where)
    return [
        CommonsenseEvent(text, **{name: tuple(found) for name, found in phrases.items()})
        for text, phrases in inferred.items()
        if any(phrases.values())
    ]
