#!/usr/bin/env python3
"""Show what fusion does in one dialogue, utterance by utterance, and both confusion matrices.

    tools/case_study.py configs/experiments/iemocap-ablation.yaml --corpora CORPORA \\
        --dialogue Ses01F_impro01 --out case

Two rows of an experiment, one network with fusion and one without, are trained with the
experiment's first seed. ``case/README.md`` shows for each utterance what both predict, the mean of
each modality's filter gate (equations 10 and 12: the share of its own, the rest is the other's),
and how bimodal attention spreads over the window, oldest utterance first (equations 8 and 9). The
confusion matrices are of the split that the dialogue is in.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import torch
from draw_embeddings import chosen_runs
from torch import Tensor, nn

from stream_hbaf.corpora.dataset import Dataset, all_features, pad_dialogues, predict
from stream_hbaf.corpora.dialogue import SPLITS, Dialogue, Split
from stream_hbaf.errors import ConfigError, StreamHbafError
from stream_hbaf.evaluation.metrics import confusion
from stream_hbaf.evaluation.plots import draw_confusion
from stream_hbaf.files import atomic_write_text
from stream_hbaf.networks.hbaf import HBAF, BimodalAttention, DynamicFilterGate
from stream_hbaf.training.experiment_file import Run
from stream_hbaf.training.fitting import fit_network
from stream_hbaf.training.preparation import prepare
from stream_hbaf.training.recipe_corpora import open_corpora

HEAD = ("speaker", "text", "gold", "with fusion", "without", "gate a", "gate l", "a to l", "l to a")


@dataclass(frozen=True)
class Case:
    """One network's answers for a dialogue, and the confusion of its whole split."""

    labels: list[str]  # predicted, of each utterance
    shares: list[str]  # the labels' probabilities, such as "63 %"
    gates: dict[str, list[str]]  # by modality, where there is a gate
    attention: dict[str, list[str]]  # "a-l" and "l-a", over the window
    picture: str  # the confusion matrix, SVG


def find(run: Run, corpora: Path, name: str) -> tuple[Split, int, Dialogue]:
    """Split and number of the dialogue of that name. Raises ConfigError if there is none."""
    corpus = next(iter(open_corpora(run.recipe, corpora).used.values()))
    places: dict[str, tuple[Split, int, Dialogue]] = {
        dialogue.id: (split, number, dialogue)
        for split in SPLITS[1:]
        for number, dialogue in enumerate(corpus.splits[split])
    }
    if name not in places:
        raise ConfigError(
            f"--dialogue: neither dev nor test of {corpus.name} has '{name}'; choose one such as "
            f"{', '.join(list(places)[:3])}"
        )
    return places[name]


@contextmanager
def watched(network: HBAF) -> Iterator[dict[str, Tensor]]:
    """What the gates and the attention of the last step were, by name, within the block."""
    seen: dict[str, Tensor] = {}
    attention = network.fusion.attention
    hooks = []

    def see_attention(module: nn.Module, given: tuple[dict[str, Tensor], ...], _: object) -> None:
        assert isinstance(module, BimodalAttention)
        targets, window = given
        for m, other in (("a", "l"), ("l", "a")):
            query = module.query[m](targets[m])
            seen[f"{m}-{other}"] = module.weights(query, window, other).flatten()

    def see_gate(module: nn.Module, given: tuple[Tensor, ...], _: object) -> None:
        assert isinstance(module, DynamicFilterGate)
        seen[of_gate[module]] = module.gate(*given).mean()

    of_gate = {gate: m for m, gate in network.fusion.gate.items()}
    if attention is not None and len(network.config.modalities) == 2:
        hooks.append(attention.register_forward_hook(see_attention))
    hooks += [gate.register_forward_hook(see_gate) for gate in of_gate]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def study(run: Run, dataset: Dataset, network: HBAF, number: int, labels: tuple[str, ...]) -> Case:
    """Step through the dialogue, and classify the whole split."""
    version = "" if network.config.use_audio else None
    whole = all_features(dataset, pad_dialogues([dataset.dialogues[number]]), version=version)
    state, names, shares = network.initial_state(), list[str](), list[str]()
    gates: dict[str, list[str]] = {"a": [], "l": []}
    attention: dict[str, list[str]] = {"a-l": [], "l-a": []}
    with watched(network) as seen:
        for turn in range(len(dataset.dialogues[number])):
            features = whole.map(itemgetter((0, turn)))
            logits, state = network.step(replace(features, utterance_mask=None), state)
            share, label = logits.softmax(-1).max(-1)
            names.append(labels[int(label)])
            shares.append(f"{100 * share.item():.0f} %")
            for m, values in gates.items():
                values.append(f"{seen[m].item():.2f}" if m in seen else "")
            for pair, values in attention.items():
                weights = seen.get(pair, torch.zeros(0)).tolist()
                values.append(" ".join(f"{weight:.2f}" for weight in weights))
    known = dataset.labelled
    answers = predict(network, dataset, version=version).argmax(1)
    table = confusion(dataset.labels[known], answers[known], classes=len(labels))
    name = f"confusion-{run.facts.row}"
    picture = draw_confusion(table, labels=labels, name=name)
    return Case(names, shares, gates, attention, picture)


def write_case(options: argparse.Namespace) -> None:
    runs = chosen_runs(options.experiment, options.rows)
    split, number, dialogue = find(runs[0], options.corpora, options.dialogue)
    cases: list[Case] = []
    for run in runs:
        prepared = prepare(run.recipe, options.corpora, cache=options.cache)
        fitted = fit_network(run.recipe, prepared, seed=run.facts.seed, splits=("dev",))
        if not isinstance(fitted.network, HBAF) or fitted.network.config.mode != "live":
            raise ConfigError(f"--rows: {run.facts.row} isn't HBAF, live; choose another row")
        dataset = prepared.scored[split][0].gold
        cases.append(study(run, dataset, fitted.network, number, prepared.labels))
    fused, plain = cases
    lines = [f"# {dialogue.id}, with fusion and without", "", "| " + " | ".join(HEAD) + " |"]
    lines.append("| --- " * len(HEAD) + "|")
    for n, one in enumerate(dialogue.utterances):
        gates = [fused.gates[m][n] for m in ("a", "l")]
        spread = [fused.attention[pair][n] for pair in ("a-l", "l-a")]
        text = one.text.replace("|", "\\|")
        predicted = [f"{case.labels[n]} {case.shares[n]}" for case in (fused, plain)]
        cells = (one.speaker, text, one.label or "", *predicted, *gates, *spread)
        lines.append("| " + " | ".join(cells) + " |")
    for run, case in zip(runs, cases, strict=True):
        picture = options.out / f"confusion-{run.facts.row}.svg"
        atomic_write_text(picture, case.picture)
        lines += ["", f"![Confusion of {run.facts.row} on {split}]({picture.name})"]
    page = "\n".join([*lines, ""])
    atomic_write_text(options.out / "README.md", page)
    labelled = [n for n, one in enumerate(dialogue.utterances) if one.label]
    right = [
        sum(case.labels[n] == dialogue.utterances[n].label for n in labelled) for case in cases
    ]
    print(
        f"{options.out / 'README.md'}: of {len(labelled)} labelled utterances of {dialogue.id} "
        f"{right[0]} are right with fusion, {right[1]} without"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path, help="such as configs/experiments/….yaml")
    parser.add_argument("--rows", nargs=2, default=["both", "without_fusion"], metavar="ROW")
    parser.add_argument("--dialogue", required=True, help="of dev or test")
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    options = parser.parse_args()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        write_case(options)
    except StreamHbafError as error:
        sys.exit(f"case_study: {error}")


if __name__ == "__main__":
    main()
