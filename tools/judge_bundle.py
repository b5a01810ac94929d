#!/usr/bin/env python3
"""Everything that a bundle of talk and voices promises, measured live and kept beside it.

    tools/judge_bundle.py models/live-en --corpora DIR [--without DIR] [--plain] [--out DIR]

Plays the test parts of RAVDESS and nEMO into the recogniser and reads MELD's to it, as `stream-hbaf
evaluate --live` does. With --without, a folder of bundles named <id>-without-<corpus>, each of
these corpora is also played, whole, into the bundle that never heard it; and <id>-audio-only and
<id>-text-only there are judged, to stand beside the bundle without words and without sound. With
--plain each corpus is heard in one way only, as recorded or as written: minutes, not an hour. The
figures go into the bundle's metrics.json under "live", a key for each promise, and into its card.
The reports stay in --out; one that is there, of the same bundle, isn't made again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from stream_hbaf.bundle import METRICS, Bundle
from stream_hbaf.evaluation.conditions import CLEAN_ROW, GOLD_ROW, evaluate_live
from stream_hbaf.evaluation.summary import live_figures
from stream_hbaf.training.mixture_card import model_card

JUDGED = {"ravdess": CLEAN_ROW, "nemo": CLEAN_ROW, "meld": GOLD_ROW}  # the plainest way of each
UNHEARD = ("ravdess", "nemo", "tess")
ALONE = (("audio-only", "ravdess", "clean"), ("text-only", "meld", "words"))


def judge(bundle: Path, corpus: str, out: Path, **how: Any) -> dict[str, Any]:
    """A report's metrics; from its file if it is of the same bundle."""
    if (out / METRICS).is_file():
        known: dict[str, Any] = json.loads((out / METRICS).read_text())
        if known["bundle"]["sha256"] == Bundle.load(str(bundle)).sha256:
            return known
    return evaluate_live(str(bundle), corpus=corpus, out=out, **how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--without", type=Path, help="folder of <id>-without-<corpus>")
    parser.add_argument("--out", type=Path, default=Path("judged"))
    parser.add_argument("--plain", action="store_true", help="as recorded and as written only")
    options = parser.parse_args()
    reports = {
        corpus: judge(
            options.bundle,
            corpus,
            options.out / corpus,
            corpora=options.corpora,
            rows=[plainest] if options.plain else [],
        )
        for corpus, plainest in JUDGED.items()
    }
    unheard, alone = {}, {}
    if options.without is not None:
        for kind, corpus, row in ALONE:
            name = f"{options.bundle.name}-{kind}"
            alone[corpus] = judge(
                options.without / name,
                corpus,
                options.out / name,
                corpora=options.corpora,
                rows=[row],
            )
        for corpus in UNHEARD:
            name = f"{options.bundle.name}-without-{corpus}"
            unheard[corpus] = judge(
                options.without / name,
                corpus,
                options.out / name,
                corpora=options.corpora,
                split="all",
                rows=["clean"],
            )
    metrics = json.loads((options.bundle / METRICS).read_text())
    metrics["live"] = live_figures(reports, unheard=unheard, alone=alone)
    Bundle.describe(options.bundle, metrics=metrics, card=model_card(metrics))
    print(json.dumps(metrics["live"], indent=1))


if __name__ == "__main__":
    main()
