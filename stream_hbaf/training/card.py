"""Writes a bundle's model card from its metrics.json alone, by the template beside this file."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from stream_hbaf.bundle import EVENT2MIND, NONE
from stream_hbaf.corpora.open_corpus import publication_of
from stream_hbaf.evaluation.summary import (
    AS_RECORDED,
    CONDITION_TITLES,
    REFERENCE_TEXT,
    class_table,
    condition_table,
    summary_table,
)
from stream_hbaf.networks.registry import read_network
from stream_hbaf.training.scoring import ASR_ERRORS, GOLD

TEMPLATE = "card.md.jinja"
WIDTH = 100  # of the card's lines, tables aside
FIGURES = ("weighted_f1", "macro_f1", "accuracy", "uar", "ece")
GIVEN = {"audio": "audio", "text": "text", "audio+text": "audio and text"}
NETWORKS = {  # by kind; baselines ship in no bundle of their own
    "hbaf": "HBAF (Luo et al.)",
    "mgcma": "MGCMA (Wang et al., ICASSP 2025), in a form of this project's where the paper's "
    "summary gives none",
}
REPRESENTATIONS = {
    "none": "none",
    "prosody": "eight prosodic measurements, relative to the dialogue's past",
    "ge2e": "the GE2E speaker encoder's embedding",
    "compare": "openSMILE's ComParE 2016 functionals",
    "egemaps": "openSMILE's eGeMAPS functionals",
    "mfcc": "openSMILE's MFCC",
    "lld": "openSMILE's 65 low-level descriptors of ComParE 2016, a token each 80 ms",
}
PLAIN = (CONDITION_TITLES[AS_RECORDED], CONDITION_TITLES[REFERENCE_TEXT])
OPENSMILE = {"compare", "egemaps", "mfcc", "lld"}


def model_card(metrics: Mapping[str, Any]) -> str:
    """The card of a bundle: what it was trained on, what was measured, what it may be used for.

    Raises LookupError for metrics that lack what the card says.
    """
    return render(TEMPLATE, _context(metrics))


def render(template: str, context: Mapping[str, Any]) -> str:
    """The Markdown of a template beside this file, its paragraphs in lines of one width.

    Raises LookupError for a context that lacks what the template names.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    try:
        return _reflow(environment.get_template(template).render(**context))
    except jinja2.UndefinedError as error:
        raise LookupError(str(error)) from None


def _context(metrics: Mapping[str, Any]) -> dict[str, Any]:
    recipe, corpora = metrics["recipe"], metrics["corpora"]
    network, representation = read_network(recipe["network"]), recipe["audio"]["representation"]
    clips = [name for name, one in corpora.items() if one["kind"] == "clips"]
    dialogues = [name for name in corpora if name not in clips]
    uses_audio = network.use_audio and representation != NONE
    temperatures = metrics["calibration"]["temperatures"].items()
    return {
        **metrics,
        "main": next(iter(dialogues), None),
        "clips": clips,
        "network": network,
        "network_title": NETWORKS.get(network.kind, f"the baseline {network.kind}"),
        "modalities": _and(["audio"] * uses_audio + ["text"] * network.use_text),
        "audio": _audio(recipe) if uses_audio else "none",
        "opensmile": bool(OPENSMILE & set(representation.split("+"))),
        "tuned_on": _titles(recipe["text_encoder"]["corpora"] or dialogues or clips),
        "commonsense": _commonsense(recipe),
        "seeds": len(metrics["seeds"]),
        "shipped": metrics["shipped_seeds"],
        "of_seed": metrics["seeds"][str(metrics["shipped_seeds"][0])],
        "measured": {s: list(_conditions(metrics, s)) for s in ("dev", "test") if s in metrics},
        "figures": FIGURES,
        "plain": PLAIN,
        "never": _never(metrics),
        "commonest": metrics["majority"]["dev"]["accuracy"],
        "temperatures": ", ".join(f"{name} {value:.2f}" for name, value in temperatures if name),
        "heads": (metrics["commonsense"] or {}).get("test"),
        "live": metrics.get("live"),
        "summary_table": summary_table,
        "class_table": class_table,
        "condition_table": condition_table,
        "licence": licence_of(recipe),
        "publication": publication_of,
    }


def licence_of(recipe: Mapping[str, Any]) -> str:
    """One line on what may be done with a bundle of a recipe, given as metrics.json has it."""
    names = [*recipe["corpora"], *_annotations(recipe)]
    terms = [f"{publication_of(name).title}: {publication_of(name).terms}" for name in names]
    if OPENSMILE & set(recipe["audio"]["representation"].split("+")):
        terms.append("openSMILE's licence: research and private use only")
    return "; ".join(terms)


def _annotations(recipe: Mapping[str, Any]) -> list[str]:
    """The corpora that the commonsense heads were trained on."""
    if recipe["commonsense"]["source"] != EVENT2MIND:
        return []
    return ["event2mind", *(["atomic"] * recipe["commonsense"]["atomic"])]


def _commonsense(recipe: Mapping[str, Any]) -> str:
    annotations = _annotations(recipe)
    if annotations:
        return f"three heads trained on {_titles(annotations)}, in place of COMET"
    source: str = recipe["commonsense"]["source"]
    return source


def _audio(recipe: Mapping[str, Any]) -> str:
    audio, parts = recipe["audio"], []
    for name in audio["representation"].split("+"):
        kind, _, model = name.partition(":")
        title = REPRESENTATIONS.get(name, f"the speech encoder {name}")
        if kind == "whisper":
            title = f"the mean state of Whisper's encoder ({model})"
        if kind == "tokens":
            title = f"the states of the speech encoder {model} as tokens"
        if name == "compare" and audio["components"]:
            title += f", reduced to {audio['components']} principal components"
        elif name == audio["representation"] == "compare" and audio["selection"]:
            title += f", of which a linear SVM selected {audio['selection']['width']}"
        parts.append(title)
    return _and(parts)


def _conditions(
    metrics: Mapping[str, Any], split: str
) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """Title of the corpus, modalities, name of the condition, and what was measured."""
    rate = metrics["recipe"]["asr_errors"]["dev_error_rate"]
    errors = f"{100 * rate:.0f} % simulated ASR errors"
    names = {**CONDITION_TITLES, GOLD: CONDITION_TITLES[REFERENCE_TEXT], ASR_ERRORS: errors}
    for key, measured in metrics.get(split, {}).items():
        corpus, given, name = key.rsplit("/", 2)
        yield publication_of(corpus).title, GIVEN[given], names[name], measured


def _never(metrics: Mapping[str, Any]) -> str:
    """Labels that were never predicted rightly in the main condition of dev."""
    scores = next(iter(metrics["dev"].values()))["shipped"]["class_f1"]
    return _and([label for label, f1 in zip(metrics["labels"], scores, strict=True) if f1 == 0.0])


def _reflow(text: str) -> str:
    """Paragraphs and list items in lines of one width; tables and headings as they are."""
    blocks = re.split(r"\n\n+", text)
    flowed = []
    for block in blocks:
        if block.startswith(("|", "#")):
            flowed.append(block)
            continue
        items = re.split(r"\n(?=- )", " ".join(block.split("\n  ")))
        flowed.append("\n".join(_fill(item) for item in items))
    return "\n\n".join(flowed) + "\n"


def _fill(item: str) -> str:
    return textwrap.fill(
        item,
        WIDTH,
        subsequent_indent="  " * item.startswith("- "),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _titles(names: Sequence[str]) -> str:
    return _and([publication_of(name).title for name in names])


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
