"""Training: a bundle's model card, written from what was measured and nothing else."""

from collections.abc import Mapping
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
