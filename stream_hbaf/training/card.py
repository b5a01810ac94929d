"""Writes a bundle's model card from its metrics.json alone, by the template beside this file."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from stream_hbaf.bundle_config import EVENT2MIND, NONE
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
    "campplus": "activations of the CAM++ speaker encoder, their mean and deviation over time",
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
    front_matter = yaml.safe_dump(_front_matter(metrics), sort_keys=False, allow_unicode=True)
    return f"---\n{front_matter}---\n\n{render(TEMPLATE, _context(metrics))}"


def _front_matter(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the Hugging Face hub reads of a card, with test figures of the live path as results."""
    live = metrics.get("live") or {}
    results = [
        {
            "task": {"type": "audio-classification", "name": "Emotion recognition"},
            "dataset": {
                "type": corpus,
                "name": publication_of(corpus).title,
                "split": live["splits"][corpus],
            },
            "metrics": [
                {"type": kind, "name": f"{title} × 100", "value": round(100 * live[name], 1)}
                for kind, title in (("uar", "UAR"), ("weighted_f1", "weighted F1"))
                if (name := f"{corpus}_{kind}") in live
            ],
        }
        for corpus in live.get("splits", {})
    ]
    matter: dict[str, Any] = {
        "language": ["en"],
        "license": "other",
        "license_name": "research-only",
        "library_name": "stream-hbaf",
        "pipeline_tag": "audio-classification",
        "tags": ["emotion-recognition", "speech", "conversation", "streaming"],
        "datasets": list(metrics["corpora"]),
    }
    if results:
        matter["model-index"] = [{"name": metrics["id"], "results": results}]
    return matter


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
        "spoken": _and(_spoken(corpora)) or "no dialogue here",
        "has_spoken": bool(_spoken(corpora)),
        "baseline": _and([_part(name) for name in _relative_parts(recipe)]),
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
        "strangers": metrics.get("strangers"),
        "arousal": metrics.get("arousal"),
        "summary_table": summary_table,
        "class_table": class_table,
        "condition_table": condition_table,
        "licence": licence_of(recipe),
        "publication": publication_of,
    }


def _spoken(corpora: Mapping[str, Any]) -> list[str]:
    """Titles of the dialogues that have sound of their own."""
    with_audio = [name for name, one in corpora.items() if one.get("audio")]
    return [publication_of(n).title for n in with_audio if corpora[n]["kind"] == "dialogues"]


def _relative_parts(recipe: Mapping[str, Any]) -> list[str]:
    baseline = recipe["audio"].get("baseline")  # which earlier recipes don't have
    return list(baseline["parts"]) if baseline else []


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
        title = _part(name)
        if name == "compare" and audio["components"]:
            title += f", reduced to {audio['components']} principal components"
        elif name == audio["representation"] == "compare" and audio["selection"]:
            title += f", of which a linear SVM selected {audio['selection']['width']}"
        parts.append(title)
    return _and(parts)


def _part(name: str) -> str:
    """What a representation is."""
    kind, _, model = name.partition(":")
    if kind == "whisper":
        return f"the mean state of Whisper's encoder ({model})"
    if kind == "tokens":
        return f"the states of the speech encoder {model} as tokens"
    return REPRESENTATIONS.get(name, f"the speech encoder {name}")


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
