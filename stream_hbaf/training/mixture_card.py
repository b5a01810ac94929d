"""Training: the model card of a mixture's bundle, written from what was measured alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from stream_hbaf.evaluation.summary import (
    class_table,
    condition_table,
    markdown_table,
    summary_table,
)
from stream_hbaf.networks.registry import read_network
from stream_hbaf.training.card import SOUNDS, cells, paper_of

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
from its sound{seen}. Causal: it sees nothing of the future.

## What it was trained on

- **Dialogues**: MELD, train part, text only (a television comedy), as written and in {misheard}
  {versions} as a recogniser might understand it.{beside} The top {layers} layers of {encoder} were
  fine-tuned on these words{soup}{adapters}.
- **Voices**: {voices}: {clips:,} train clips, cut by the live segmenter, each as recorded and in
  {copies} versions with the level drawn between {quietest} and {loudest} dBFS, noise at 0 to 30 dB
  SNR or none, and at times a room response. Every class of every corpus weighs the same.
- **Sound**: {sound}.
- **Both at once**: nobody's. In training only, {pair} % of the dialogues had the voices of acted
  clips, {same} % of them *of the same labels* and the others of any, so that words can win; but
  beside neutral words, which settle nothing, the voice was any and its label counted. {statement} %
  of the clips came with words: {own} % of these with their own statement, where it is English, the
  others with anybody's neutral words. No figure rests on such pairs.
- **Commonsense**: {commonsense}.

{paper}, in the `live` mode of this project. There is no head for valence,
arousal or dominance: none of these corpora rates them.

## What was measured

Figures × 100. Test is measured through the live path alone: real sound played into the recogniser,
Whisper's words, the segmenter's utterances.

{live}

Below is dev, by which epochs were picked and probabilities calibrated: {members}, beside it mean ±
standard deviation over the seeds' networks by themselves.

### MELD dev, words alone, dialogues in order

{meld}

### Voices, dev, each clip by itself under every condition

{clips_table}

ECE is the expected calibration error over 15 bins, after temperatures fitted on dev:
{temperatures}.

### Per label, F1 on dev

{classes}

{heads}## How sure it is

Probabilities, label sets and abstention are fitted on dev for each of: sound alone, words alone,
both. Sets hold the right label {coverage} times in 100; it abstains where more than {risk} of 100
answers would be wrong. Both hold for utterances like dev's, and promise nothing elsewhere.

## Limits

- The voices are actors speaking given sentences in a studio: expect much less on a stranger's
  voice, on spontaneous speech, on another microphone.
- No conversation with both its sound and its words was available for training.
- Context is MELD's: a scripted comedy. Half of it is labelled neutral, and so leans the bundle
  where words decide. Disgust and fear are rare there.
  {unheard}
- Words are read as English; in any other language only the voice counts. Figures by age and accent
  were not measured.
- Acted emotion is not felt emotion: the output is how an utterance comes across, at best.

## What it may be used for

Research and private experiments, with the consent of everybody who is heard.

It must not be used to infer emotions of people at work or in education: the European Union
prohibits that (Artificial Intelligence Act, Art. 5(1)(f)); nor for any decision about a person.

Licence of the weights: {licence}. openSMILE, which computes acoustic features, is licensed for
research and private use only. Words: {word_terms}. {encoder}: Apache-2.0; its untouched layers are
not part of the bundle.
"""

HEADS = """\
### Commonsense heads, Event2Mind's test part

Where the best-ranked true phrase stands among all phrases of the test part.

{table}

A head by itself says what is special about an event; with how often a phrase is written at all it
says what annotators would write. The network gets the head's vector.

"""

VOICE_TERMS = {
    "ravdess": "RAVDESS: CC BY-NC-SA 4.0",
    "nemo": "nEMO: CC BY-NC-SA 4.0",
    "tess": "TESS: CC BY-NC-ND 4.0",
}
CORPUS_TITLES = {"ravdess": "RAVDESS", "nemo": "nEMO", "tess": "TESS"}
VOICE_NAMES = {
    "ravdess": "RAVDESS (actors 01-18)",
    "nemo": "nEMO (four Polish actors)",
    "tess": "TESS (two actresses)",
}
WORD_NAMES = {
    "goemotions": "GoEmotions (comments on the web)",
    "emorynlp": "EmoryNLP (another part of the series)",
}
WORD_TERMS = {
    "meld": "MELD, research use",
    "goemotions": "GoEmotions, Apache-2.0",
    "emorynlp": "EmoryNLP, research use",
    "event2mind": "Event2Mind, MIT",
    "atomic": "ATOMIC, CC BY 4.0",
}


def model_card(metrics: Mapping[str, Any]) -> str:
    """The card of a mixture's bundle, from its metrics.json."""
    recipe, calibration = metrics["recipe"], metrics["calibration"]
    seeds = len(metrics["seeds"])
    fitting, acoustics = recipe["fitting"], recipe["acoustics"]
    names = recipe["words"]["corpora"] if recipe["words"] else ["meld"]
    others = [WORD_NAMES.get(name, name) for name in names if name != "meld"]
    alone = not read_network(recipe["network"]).remembers
    return TEMPLATE.format(
        id=metrics["id"],
        labels=", ".join(metrics["labels"]),
        misheard=fitting["misheard"],
        versions="version" if fitting["misheard"] == 1 else "versions",
        beside=f" Beside it {' and '.join(others)}." if others else "",
        layers=recipe["tuning"]["layers"],
        encoder=recipe["encoder"],
        soup="; their weights are the mean of a tuning on all and one on MELD"
        * bool(recipe["soup"]),
        voices=", ".join(VOICE_NAMES[name] for name in recipe["voices"]),
        clips=metrics["clips"],
        copies=acoustics["copies"],
        quietest=round(acoustics["quietest_dbfs"]),
        loudest=round(acoustics["loudest_dbfs"]),
        sound=_mixture_sound(recipe["audio"], components=recipe["components"]),
        pair=round(100 * fitting["pair"]),
        same=round(100 - 100 * fitting["mismatch"]),
        statement=round(100 * fitting["statement"]),
        own=round(100 - 100 * fitting["others_words"]),
        adapters=f", and kept as changes of rank {recipe.get('adapters')}"
        * bool(recipe.get("adapters")),
        commonsense=_commonsense(recipe),
        paper=paper_of(recipe),
        seen=" and its words, each utterance by itself"
        if alone
        else ", its words, and the utterances before it",
        live=_live(metrics),
        members=f"the mean probability of {seeds} networks, one a seed"
        if seeds > 1
        else "one network",
        meld=_meld_table(metrics["dev"]),
        clips_table=_clips_table(metrics["dev"]),
        temperatures=", ".join(
            f"{pattern} {value:.2f}"
            for pattern, value in calibration["temperatures"].items()
            if pattern
        ),
        classes=_class_table(metrics),
        heads=_heads(metrics["commonsense"]),
        coverage=round(100 * calibration["coverage"]),
        risk=round(100 * calibration["risk"]),
        unheard=_unheard(metrics),
        licence=mixture_licence(recipe["voices"], audio=recipe["audio"]),
        word_terms="; ".join(WORD_TERMS[name] for name in [*names, *_annotations(recipe)]),
    )


def _annotations(recipe: Mapping[str, Any]) -> list[str]:
    """What the commonsense heads learnt from."""
    if recipe.get("commonsense") == "none":
        return []
    return [*(["atomic"] * recipe["heads"]["atomic"]), "event2mind"]


def _commonsense(recipe: Mapping[str, Any]) -> str:
    titles = {"event2mind": "Event2Mind", "atomic": "ATOMIC"}
    read = sorted((titles[name] for name in _annotations(recipe)), reverse=True)
    if not read:
        return "none; the network has no use for it"
    return f"three heads trained on {' and '.join(read)}, in place of COMET"


def _heads(figures: Mapping[str, Any]) -> str:
    return HEADS.format(table=_commonsense_table(figures["test"])) if figures else ""


def _live(metrics: Mapping[str, Any]) -> str:
    if "live" not in metrics:
        return "Not measured: `stream-hbaf evaluate BUNDLE --live … --update-card` does that."
    figures, labels = metrics["live"], metrics["labels"]
    return "\n\n".join(
        [
            summary_table(figures),
            "F1 by class, as recorded or as written:",
            class_table(figures, labels),
            "Every condition, and by the speakers' sex:",
            condition_table(figures),
        ]
    )


def mixture_licence(voices: Sequence[str], *, audio: str) -> str:
    """One line on what may be done with a bundle that was trained on these voices."""
    terms = [VOICE_TERMS[name] for name in voices]
    if "compare" in audio or "lld" in audio:
        terms.append("openSMILE's licence: research and private use only")
    return "non-commercial: " + "; ".join(terms)


def _mixture_sound(audio: str, *, components: int | None) -> str:
    told = []
    for part in audio.split("+"):
        name = SOUNDS.get(part, f"the speech encoder {part}")
        if part.startswith("whisper:"):
            name = f"the mean of the states of Whisper's encoder ({part.removeprefix('whisper:')})"
        if part == "compare":
            name = "openSMILE's ComParE 2016, 6373 functionals"
            if components:
                name += f", joined into their first {components} principal components"
        told.append(name)
    return ", and ".join(told)


def _meld_table(dev: Mapping[str, Any]) -> str:
    figures = ("weighted_f1", "macro_f1", "accuracy", "ece")
    rows = [["", "weighted F1", "macro F1", "accuracy", "ECE"]]
    for heard, told in (("gold", "as written"), ("misheard", "15 % of the words misheard")):
        rows.append([told, *cells(dev[f"meld/text/{heard}"], figures)])
    majority = (f"{100 * dev['majority'][figure]:.1f}" for figure in figures)
    return markdown_table([*rows, ["always the majority", *majority]])


def _clips_table(dev: Mapping[str, Any]) -> str:
    figures = ("uar", "accuracy", "ece")
    rows = [["", "UAR", "accuracy", "ECE"]]
    for key, measured in dev.items():
        corpus, _, rest = key.partition("/")
        pattern, _, condition = rest.partition("/")
        if condition in CONDITION_NAMES:
            given = "sound and words" if pattern == "audio+text" else "sound alone"
            told = f"{CORPUS_TITLES[corpus]}, {given}, {CONDITION_NAMES[condition]}"
            rows.append([told, *cells(measured, figures)])
    return markdown_table(rows)


def _unheard(metrics: Mapping[str, Any]) -> str:
    scores = metrics["dev"]["meld/text/gold"]["shipped"]["class_f1"]
    never = [label for label, f1 in zip(metrics["labels"], scores, strict=True) if f1 == 0.0]
    if not never:
        return "Every label was found at least once by words alone."
    return f"By words alone it never rightly said {' or '.join(never)} on the whole dev part."


def _class_table(metrics: Mapping[str, Any]) -> str:
    rows = [["", *metrics["labels"]]]
    keys = {"MELD, words": "meld/text/gold"}
    keys |= {f"{title}, sound": f"{name}/audio/clean" for name, title in CORPUS_TITLES.items()}
    for name, key in keys.items():
        if key in metrics["dev"]:
            scores = metrics["dev"][key]["shipped"]["class_f1"]
            rows.append([name, *(f"{100 * value:.0f}" for value in scores)])
    return markdown_table(rows)


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
    return markdown_table(rows)
