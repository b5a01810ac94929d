"""Training: a bundle's model card, written from what was measured and nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

CONDITION_NAMES = {
    "clean": "as recorded",
    "noise_10db": "noise at 10 dB SNR",
    "noise_10db_room": "noise at 10 dB SNR and a room",
    "gain_minus_20db": "20 dB quieter",
    "gain_plus_20db": "20 dB louder, clipped",
}

TEMPLATE = """\
# {id}

Says which of seven emotions an English utterance expresses
({labels}),
from its sound, its words, and the utterances before it. Causal: it sees nothing of the future. A
first bundle, meant to be honest rather than good.

## What it was trained on

- **Words and dialogues**: MELD, train part, text only (a television comedy). The top
  {layers} layers of {encoder} were fine-tuned on it.
- **Voices**: RAVDESS, actors 01-18, cut by the live segmenter, each clip as recorded and in
  {copies} versions with the level drawn between {quietest} and {loudest} dBFS, noise at 0 to 30 dB
  SNR or none, and at times a room response.
- **Both at once**: nobody's. In training only, {pair} % of MELD's dialogues had the voices of
  RAVDESS clips, {same} % of them *of the same labels* and the others of any, so that words can
  win; {statement} % of RAVDESS's clips came with their statement's text. No test figure rests on
  such pairs.
- **Commonsense**: three heads trained on Event2Mind, in place of COMET.

The paper is HBAF (Luo et al.), in the `live` mode of this project.

## What was measured

Seed {shipped} of {seeds} is shipped, the best on dev; test was read once, by all of them, after
that. Beside it mean ± standard deviation over the {seeds} seeds. Figures × 100. Gold text for
MELD; for RAVDESS each clip by itself, cut by the live segmenter, and its true statement as text.

### MELD, words alone, dialogues in order

{meld}

### RAVDESS, dev is actors 19-20, test is actors 21-24

{ravdess}

ECE is the expected calibration error over 15 bins, after one temperature ({temperature:.2f}) fitted
on dev.

### Per label, F1 on test

{classes}

### Commonsense heads, Event2Mind's test part

Where the best-ranked true phrase stands among all phrases of the test part.

{commonsense}

A head by itself says what is special about an event; with how often a phrase is written at all it
says what annotators would write. The network gets the head's vector.

## Limits

- The voices are {actors} actors speaking two sentences in a studio: expect much less on a
  stranger's voice, on spontaneous speech, on another microphone. No corpus other than RAVDESS was
  measured.
- No conversation with both its sound and its words was available for training or for testing.
- Context is MELD's: a scripted comedy. Half of it is labelled neutral, and so leans the bundle
  where words decide. Disgust and fear are rare there.
  {unheard}
- English only. Figures by sex, age, accent or language were not measured.
- Acted emotion is not felt emotion: the output is how an utterance comes across, at best.

## What it may be used for

Research and private experiments, with the consent of everybody who is heard.

It must not be used to infer emotions of people at work or in education: the European Union
prohibits that (Artificial Intelligence Act, Art. 5(1)(f)); nor for any decision about a person.

Licence of the weights: CC BY-NC-SA 4.0, non-commercial, through RAVDESS. openSMILE, which computes
the acoustic features, is licensed for research and private use only. MELD is for research use.
Event2Mind: MIT. {encoder}: Apache-2.0; its untouched layers are not part of the bundle.
"""


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
SOUNDS = {
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

The paper is HBAF (Luo et al.); `metrics.json` holds the whole recipe.

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


def model_card(metrics: Mapping[str, Any]) -> str:
    """The card of a bundle, from its metrics.json."""
    recipe, shipped = metrics["recipe"], metrics["shipped_seed"]
    return TEMPLATE.format(
        id=metrics["id"],
        labels=", ".join(metrics["labels"]),
        layers=recipe["tuning"]["layers"],
        encoder=recipe["encoder"],
        copies=recipe["acoustics"]["copies"],
        quietest=round(recipe["acoustics"]["quietest_dbfs"]),
        loudest=round(recipe["acoustics"]["loudest_dbfs"]),
        pair=round(100 * recipe["fitting"]["pair"]),
        same=round(100 - 100 * recipe["fitting"]["mismatch"]),
        statement=round(100 * recipe["fitting"]["statement"]),
        shipped=shipped,
        seeds=len(metrics["seeds"]),
        meld=_meld_table(metrics),
        ravdess=_ravdess_table(metrics),
        temperature=metrics["seeds"][str(shipped)]["temperature"],
        classes=_class_table(metrics),
        commonsense=_commonsense_table(metrics["commonsense"]["test"]),
        actors=18,
        unheard=_unheard(metrics),
    )


def corpus_card(metrics: Mapping[str, Any]) -> str:
    """The card of a bundle that was trained on one corpus, from its metrics.json."""
    recipe, spread = metrics["recipe"], metrics["spread"]
    own = metrics["seeds"][str(metrics["seed"])]
    rows = [["", "weighted F1", "macro F1", "accuracy", "UAR", "ECE"]]
    for split in ("dev", "test"):
        rows.append([split, *_cells({"shipped": own[split], "seeds": spread[split]}, FIGURES)])
        majority = (f"{100 * metrics['majority'][split][figure]:.1f}" for figure in FIGURES)
        rows.append([f"{split}, always the majority", *majority])
    by_class = [["", *metrics["labels"]]]
    for split in ("dev", "test"):
        by_class.append([split, *(f"{100 * value:.0f}" for value in own[split]["class_f1"])])
    return CORPUS_TEMPLATE.format(
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
        scores=_table(rows),
        classes=_table(by_class),
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


def _meld_table(metrics: Mapping[str, Any]) -> str:
    figures = ("weighted_f1", "macro_f1", "accuracy", "ece")
    rows = [["", "weighted F1", "macro F1", "accuracy", "ECE"]]
    for split in ("dev", "test"):
        rows.append([split, *_cells(metrics[split]["meld/text"], figures)])
        rows.append([f"{split}, always the majority", *_plain(metrics[split], "meld", figures)])
    return _table(rows)


def _ravdess_table(metrics: Mapping[str, Any]) -> str:
    figures = ("uar", "accuracy", "ece")
    rows = [["", "dev UAR", "test UAR", "test accuracy", "test ECE"]]
    for given, name in (("audio", "sound alone"), ("audio+text", "sound and words")):
        for condition, told in CONDITION_NAMES.items():
            key = f"ravdess/{given}/{condition}"
            dev, test = metrics["dev"][key], metrics["test"][key]
            rows.append([f"{name}, {told}", *_cells(dev, ("uar",)), *_cells(test, figures)])
    dev = _plain(metrics["dev"], "ravdess", ("uar",))
    rows.append(["always the majority", *dev, *_plain(metrics["test"], "ravdess", figures)])
    return _table(rows)


def _unheard(metrics: Mapping[str, Any]) -> str:
    scores = metrics["test"]["meld/text"]["shipped"]["class_f1"]
    never = [label for label, f1 in zip(metrics["labels"], scores, strict=True) if f1 == 0.0]
    if not never:
        return "Every label was found at least once by words alone."
    return f"By words alone it never rightly said {' or '.join(never)} on the whole test part."


def _class_table(metrics: Mapping[str, Any]) -> str:
    keys = {"MELD, words": "meld/text", "RAVDESS, sound": "ravdess/audio/clean"}
    rows = [["", *metrics["labels"]]]
    for name, key in keys.items():
        scores = metrics["test"][key]["shipped"]["class_f1"]
        rows.append([name, *(f"{100 * value:.0f}" for value in scores)])
    return _table(rows)


def _commonsense_table(ways: Mapping[str, Any]) -> str:
    rows = [["ranked by", "relation", "phrases", "median rank", "MRR", "recall at 10"]]
    for way, relations in ways.items():
        for relation, found in relations.items():
            rows.append(
                [
                    way.replace("_", " "),
                    relation,
                    str(found["candidates"]),
                    f"{found['median_rank']:.0f}",
                    f"{found['mrr']:.3f}",
                    f"{found['recall_at_10']:.3f}",
                ]
            )
    return _table(rows)


def _cells(measured: Mapping[str, Any], figures: tuple[str, ...]) -> list[str]:
    """'shipped (mean ± deviation)' of each figure."""
    cells = []
    for figure in figures:
        spread = measured["seeds"][figure]
        own = 100 * measured["shipped"][figure]
        cells.append(f"{own:.1f} ({100 * spread['mean']:.1f} ± {100 * spread['sd']:.1f})")
    return cells


def _plain(split: Mapping[str, Any], corpus: str, figures: tuple[str, ...]) -> list[str]:
    return [f"{100 * split['majority'][corpus][figure]:.1f}" for figure in figures]


def _table(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "| --- " * len(rows[0]) + "|", *body])
