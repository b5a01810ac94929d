"""Names, contents and terms of the published corpora, for whoever uses what was trained on them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Publication:
    """What a model card says of a corpus."""

    title: str
    content: str
    terms: str  # what may be done with it
    language: str | None = "en"  # of its texts; None: not known


PUBLICATIONS: Mapping[str, Publication] = {
    "atomic": Publication("ATOMIC", "annotated events", "CC BY 4.0"),
    "emorynlp": Publication("EmoryNLP", "dialogues of a television comedy", "research use"),
    "event2mind": Publication("Event2Mind", "annotated events", "MIT"),
    "goemotions": Publication("GoEmotions", "comments on the web", "Apache-2.0"),
    "iemocap": Publication(
        "IEMOCAP",
        "dyadic dialogues of actors in a studio",
        "its release form, research use, no redistribution without its owners' leave",
    ),
    "meld": Publication("MELD", "dialogues of a television comedy", "research use"),
    "nemo": Publication(
        "nEMO", "Polish sentences by actors", "CC BY-NC-SA 4.0, non-commercial", language="pl"
    ),
    "ravdess": Publication(
        "RAVDESS", "two sentences by actors in a studio", "CC BY-NC-SA 4.0, non-commercial"
    ),
    "tess": Publication("TESS", "one sentence by two actresses", "CC BY-NC-ND 4.0, non-commercial"),
}


def publication_of(name: str) -> Publication:
    """What is known of a corpus by the name that recipes give it; of one's own, next to nothing."""
    own = Publication(name, "a corpus of one's own", "the corpus's own terms", language=None)
    return PUBLICATIONS.get(name, own)
