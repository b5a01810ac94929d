"""A recorded corpus: GoEmotions, comments of an internet forum (Demszky et al. 2020).

Read as its authors give it, mapped to Ekman's six emotions and neutral: ``{train,dev,test}.tsv``
of text, label indices and id, and ``labels.txt``, which names the indices line by line.
"""

from pathlib import Path

from stream_hbaf.corpora.dialogue import (
    LABELS,
    Dialogue,
    LabelledUtterance,
    Split,
    read_tabbed,
    read_utf8,
    require_file,
)
from stream_hbaf.corpora.meld import repair
from stream_hbaf.errors import CorpusError

# What the corpus put in the place of names; people say names.
MASKED = {"[NAME]": "Alex", "[RELIGION]": "Christian"}


def read_goemotions(folder: Path, split: Split) -> list[Dialogue]:
    """Read one split's comments, each a dialogue of its own.

    A comment with several labels has none unless all but neutral name one emotion. Raises
    CorpusError with file and line for a line that isn't text, indices and id, an index that
    labels.txt doesn't name, or an id that stands there twice.
    """
    names = _read_names(require_file(folder / "labels.txt", corpus="GoEmotions"))
    path = require_file(folder / f"{split}.tsv", corpus="GoEmotions")
    dialogues: dict[str, Dialogue] = {}
    for where, (text, indices, name) in read_tabbed(path, columns=3):
        if name in dialogues:
            raise CorpusError(f"{where}: comment {name} stands here twice; remove one")
        label = _label(indices, names=names, where=where)
        said = LabelledUtterance(id=name, speaker="", text=_unmask(text), label=label)
        dialogues[name] = Dialogue(f"{split}/{name}", (said,))
    return list(dialogues.values())


def _read_names(path: Path) -> list[str]:
    names = read_utf8(path).split()
    for line, name in enumerate(names, start=1):
        if name not in LABELS:
            raise CorpusError(
                f"{path}:{line}: unknown emotion '{name}'; labels.txt must name those of "
                f"{', '.join(LABELS)}, one a line"
            )
    return names


def _label(indices: str, *, names: list[str], where: str) -> str | None:
    try:
        told = {names[int(index)] for index in indices.split(",") if int(index) >= 0}
    except (ValueError, IndexError):
        told = set()
    if not told:
        raise CorpusError(
            f"{where}: '{indices}' isn't a list of indices below {len(names)}, with commas "
            "between; mend that line or labels.txt"
        )
    emotions = told - {"neutral"} or told
    return emotions.pop() if len(emotions) == 1 else None


def _unmask(text: str) -> str:
    for mask, word in MASKED.items():
        text = text.replace(mask, word)
    return repair(text)
