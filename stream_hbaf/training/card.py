"""Training: the model card of a bundle of one corpus, written from what was measured alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from stream_hbaf.evaluation.summary import markdown_table

CORPUS_NAMES = {
    "meld": "MELD, dialogues of a television comedy",
    "iemocap": "IEMOCAP, dyadic dialogues of actors in a studio",
    "ravdess": "RAVDESS, two sentences acted in a studio",
}
CORPUS_TERMS = {
    "meld": "MELD: research use",
    "iemocap": "IEMOCAP's release form: research use, no redistribution without its owners' leave",
    "ravdess": "RAVDESS: CC BY-NC-SA 4.0, non-commercial",
}
SEEN = {
    "live": "Causal: it sees nothing after the utterance that it judges.",
    "offline": "Offline, as the paper: it sees the whole dialogue, the future included, and can't "
    "be used live.",
}
PAPERS = {  # by the kind of the network; the baselines ship in no bundle of their own
    "hbaf": "The paper is HBAF (Luo et al.)",
    "mgcma": "The network is MGCMA (Wang et al., ICASSP 2025), its forms this project's own where "
    "the paper's summary,\nall that was to be had, gives none",
}
SOUNDS = {
    "lld": "openSMILE's 65 low-level descriptors of ComParE 2016, a token each 80 ms",
    "compare": "openSMILE's ComParE 2016 functionals, selected by a linear SVM",
    "egemaps": "openSMILE's eGeMAPS functionals",
    "mfcc": "openSMILE's MFCC",
}
FIGURES = ("weighted_f1", "macro_f1", "accuracy", "uar", "ece")

CORPUS_TEMPLATE = """\
# {id}

Says which emotion an English utterance of a dialogue expresses
({labels}).
{seen}

## What it was trained on

- **Corpus**: {corpus}. Train, dev, test: {utterances} labelled utterances in
  {dialogues} dialogues.{skipped}
- **Words**: {words}. Gold transcripts, in training and in every figure here.
- **Sound**: {sound}.
- **Commonsense**: {commonsense}.

{paper}; `metrics.json` holds the whole recipe.

## What was measured

Seed {seed} of {seeds}; seed {shipped} is the best on dev. Test was read once, by all of them,
after that. Beside each figure mean ± standard deviation over the seeds. Figures × 100.

{scores}

The epoch was picked by dev's weighted F1; the one of the lowest dev loss has {by_loss:.1f}. ECE is
the expected calibration error over 15 bins, after one temperature ({temperature:.2f}) fitted on
dev.

F1 by label:

{classes}

## Limits

- One corpus: expect less elsewhere, and with recognised instead of gold words.
- Figures by sex, age, accent or language were not measured.
- Acted emotion is not felt emotion: the output is how an utterance comes across, at best.

## What it may be used for

Research and private experiments, with the consent of everybody who is heard.

It must not be used to infer emotions of people at work or in education: the European Union
prohibits that (Artificial Intelligence Act, Art. 5(1)(f)); nor for any decision about a person.

Licence of the weights: {licence}.
"""


def cells(measured: Mapping[str, Any], figures: tuple[str, ...]) -> list[str]:
    """'shipped (mean ± deviation)' of each figure."""
    cells = []
    for figure in figures:
        spread = measured["seeds"][figure]
        own = 100 * measured["shipped"][figure]
        cells.append(f"{own:.1f} ({100 * spread['mean']:.1f} ± {100 * spread['sd']:.1f})")
    return cells


def paper_of(recipe: Mapping[str, Any]) -> str:
    """Whose network it is."""
    kind = recipe["network"].get("kind", "hbaf")
    return PAPERS.get(kind, f"The network is the baseline {kind}")


def corpus_card(metrics: Mapping[str, Any]) -> str:
    """The card of a bundle that was trained on one corpus, from its metrics.json."""
    recipe, spread = metrics["recipe"], metrics["spread"]
    own = metrics["seeds"][str(metrics["seed"])]
    rows = [["", "weighted F1", "macro F1", "accuracy", "UAR", "ECE"]]
    for split in ("dev", "test"):
        rows.append([split, *cells({"shipped": own[split], "seeds": spread[split]}, FIGURES)])
        majority = (f"{100 * metrics['majority'][split][figure]:.1f}" for figure in FIGURES)
        rows.append([f"{split}, always the majority", *majority])
    by_class = [["", *metrics["labels"]]]
    for split in ("dev", "test"):
        by_class.append([split, *(f"{100 * value:.0f}" for value in own[split]["class_f1"])])
    return CORPUS_TEMPLATE.format(
        paper=paper_of(recipe),
        id=metrics["id"],
        labels=", ".join(metrics["labels"]),
        corpus=CORPUS_NAMES.get(recipe["corpus"], recipe["corpus"]),
        seen=SEEN[metrics["mode"]],
        words=_words(recipe),
        sound=_sound(recipe),
        commonsense=_inferences(recipe["commonsense"]),
        utterances=_counts(metrics["utterances"]),
        dialogues=_counts(metrics["dialogues"]),
        skipped=_without_sound(metrics["skipped"]),
        seed=metrics["seed"],
        shipped=metrics["shipped_seed"],
        seeds=len(metrics["seeds"]),
        scores=markdown_table(rows),
        classes=markdown_table(by_class),
        by_loss=100 * own["dev_by_loss"]["weighted_f1"],
        temperature=own["temperature"],
        licence=licence_of(recipe["corpus"], audio=recipe["audio"]),
    )


def licence_of(corpus: str, *, audio: str) -> str:
    """One line on what may be done with a bundle that was trained on ``corpus``."""
    terms = [CORPUS_TERMS.get(corpus, "the corpus's own terms hold for the weights")]
    if audio in ("compare", "egemaps", "mfcc"):
        terms.append("openSMILE's licence: research and private use only")
    return "; ".join(terms)


def _words(recipe: Mapping[str, Any]) -> str:
    tuning = recipe["tuning"]
    told = f"each utterance by {recipe['encoder']}"
    if tuning["epochs"] and tuning["adapter_rank"]:
        told += f", adapted to the train split (rank {tuning['adapter_rank']})"
    elif tuning["epochs"] and tuning["layers"]:
        told += f", its top {tuning['layers']} layers fine-tuned on the train split"
    context = tuning["context"]
    if context["tokens"]:
        told += f", which reads it after earlier turns, {context['tokens']} tokens at most"
        told += ", with speakers' names" if context["speakers"] else ""
    return told


def _sound(recipe: Mapping[str, Any]) -> str:
    audio = recipe["audio"]
    if audio == "none" or not recipe["network"].get("use_audio", True):
        return "none"
    if audio == "prosody":
        return "eight published prosody measurements, relative to the dialogue's past"
    return SOUNDS.get(audio, f"the speech encoder {audio}")


def _inferences(commonsense: str) -> str:
    if commonsense == "event2mind":
        return "three heads trained on Event2Mind, in place of COMET"
    return "none" if commonsense == "none" else commonsense


def _counts(by_split: Mapping[str, int]) -> str:
    return " / ".join(f"{by_split[split]:,}" for split in ("train", "dev", "test"))


def _without_sound(skipped: Sequence[str]) -> str:
    return f" {len(skipped):,} utterances had no sound to measure." if skipped else ""
