#!/usr/bin/env python3
"""Measure how well commonsense heads retrieve annotators' inferences, on Event2Mind and ATOMIC.

    tools/measure_commonsense.py --corpora FOLDER --cache FOLDER [--encoder NAME] [--json FILE]

The heads are trained three times on the encoder's untuned features: on Event2Mind, and on
Event2Mind with ATOMIC, both without any event of either test split; and on Event2Mind without the
events of its own test split only. That one has no figures on ATOMIC, whose test split holds events
that it was trained on. Encoded texts are kept in the cache.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stream_hbaf.corpora.cache import EncodeTexts, cached_dialogue_encoder
from stream_hbaf.corpora.commonsense import Annotations, read_annotations
from stream_hbaf.errors import StreamHbafError
from stream_hbaf.features.commonsense import RELATIONS
from stream_hbaf.features.pretrained import DEFAULT_ENCODER
from stream_hbaf.features.text import TextEncoder, Turn
from stream_hbaf.training.commonsense_heads import Float32, distil
from stream_hbaf.training.recipe import CommonsenseConfig

RANKINGS = ("heads", "heads_and_frequency", "frequency", "event_feature", "chance")


def main() -> int:
    options = _parse()
    try:
        encode = _encoding(options.encoder, cache=options.cache / "text")
        both = read_annotations(options.corpora, atomic=True)
        alone = read_annotations(options.corpora, atomic=False)
    except StreamHbafError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for part, count in both.left_out.items():
        print(f"{part}: {count} events left out, which are in a test split or in dev")
    runs = {
        "Event2Mind": replace(both, train={"event2mind": both.train["event2mind"]}),
        "Event2Mind + ATOMIC": both,
        "Event2Mind, whole": alone,
    }
    figures = {name: _measure(name, run, encode=encode) for name, run in runs.items()}
    print()
    _print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the commonsense heads.")
    parser.add_argument("--corpora", type=Path, required=True, help="holds event2mind/ and atomic/")
    parser.add_argument("--cache", type=Path, default=Path("cache"))
    parser.add_argument("--encoder", default=DEFAULT_ENCODER)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser.parse_args()


def _encoding(name: str, *, cache: Path) -> EncodeTexts:
    """The encoder, cached on disk and by single text in memory: the runs share most texts."""
    cached = cached_dialogue_encoder(TextEncoder(name), cache)
    known: dict[str, Float32] = {}

    def encode(texts: Sequence[str]) -> Float32:
        new = sorted(set(texts) - known.keys())
        if new:
            known.update(zip(new, cached([(Turn("", text),) for text in new]), strict=True))
        return np.stack([known[text] for text in texts])

    return encode


def _measure(name: str, annotations: Annotations, *, encode: EncodeTexts) -> dict[str, Any]:
    began = time.perf_counter()
    _, figures = distil(
        annotations,
        plan=CommonsenseConfig(),
        encode=encode,
        encode_phrases=encode,
        progress=lambda line: print(f"{name}: {line}", file=sys.stderr),
    )
    size = {corpus: len({event.text for event in e}) for corpus, e in annotations.train.items()}
    print(f"{name}: trained on events {size}, {time.perf_counter() - began:.0f} s")
    return figures


def _print_table(figures: Mapping[str, Mapping[str, Any]]) -> None:
    print("| test | trained on | ranked by | relation | phrases | median rank | MRR | R@10 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for test, title in (("test", "Event2Mind"), ("atomic_test", "ATOMIC")):
        for run, measured in figures.items():
            if test not in measured:
                continue
            for ranking in RANKINGS if run == "Event2Mind" else RANKINGS[:2]:
                for relation in RELATIONS:
                    found = measured[test][ranking][relation]
                    print(
                        f"| {title} | {run} | {ranking} | {relation} | {found['candidates']} | "
                        f"{found['median_rank']:g} | {found['mrr']:.4f} | "
                        f"{found['recall_at_10']:.4f} |"
                    )


if __name__ == "__main__":
    sys.exit(main())
