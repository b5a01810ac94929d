"""The commands on corpora: extract, train, evaluate, experiment."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stream_hbaf.cluster import FOUND, work_on
from stream_hbaf.commands import (
    CORPORA,
    Commands,
    add_command,
    device_of,
    limit_library_threads,
    print_line,
    read_speed,
)
from stream_hbaf.errors import BundleError, ConfigError, shorten

OFFLINE_ONLY = ("against", "cache", "workers")
METRICS_BYTES = 1 << 24  # of a bundle's metrics.json; those shipped have at most 50 kB
LIVE_ONLY = ("conditions", "speed", "held_out", "single_modality", "resume", "update_card")


def add_research_commands(commands: Commands) -> None:
    """Add extract, train, evaluate and experiment."""
    extract = add_command(
        commands, "extract", _extract, help="compute a corpus's acoustic features, into the cache"
    )
    extract.add_argument("corpus", help=CORPORA)
    extract.add_argument(
        "--features",
        default="compare",
        metavar="NAME[,NAME]",
        help="compare (default), egemaps, mfcc, prosody, whisper:NAME, or a speech encoder's name",
    )
    _add_corpora(extract)

    train = add_command(commands, "train", _train, help="train bundles from corpora, one a seed")
    train.add_argument("recipe", help="a file, or a name in configs/, such as meld")
    train.add_argument("--out", type=Path, required=True, help="folder of the new bundle")
    train.add_argument("--devices", metavar="N|auto", help="GPUs to train on, of each node")
    train.add_argument("--nodes", type=int, metavar="N", help="machines to train on")
    train.add_argument(
        "--weigh-voice",
        action="store_true",
        help="train again without each corpus of clips, and fit what a voice is worth on strangers",
    )
    _add_corpora(train, models=False)

    _add_evaluate(commands)

    experiment = add_command(
        commands, "experiment", _experiment, help="run a grid of trainings, over seeds"
    )
    experiment.add_argument("file", help="a file, or a name in configs/, such as experiments/meld")
    experiment.add_argument(
        "--results", type=Path, default=Path("models/results"), help="folder of the figures"
    )
    experiment.add_argument(
        "--test",
        action="store_true",
        help="measure test, too, as 'test: true' in the file (default: dev alone)",
    )
    _add_corpora(experiment)


def _add_corpora(parser: argparse.ArgumentParser, *, models: bool = True) -> None:
    parser.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("cache"),
        help="folder of intermediate results (default: cache)",
    )
    if models:
        parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
        parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        _add_ray(parser)


def _add_ray(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ray",
        nargs="?",
        const=FOUND,
        metavar="HOST:PORT",
        help="work on the CPUs of a Ray cluster (default: this machine's, or a new one)",
    )


def _device(options: argparse.Namespace) -> str:
    """The device of features. Raises ConfigError for one that isn't there."""
    if options.ray is None:
        return device_of(options)
    if options.device == "cuda":
        raise ConfigError("--device cuda: --ray works on CPUs; leave one of them out")
    return "cpu"


def _add_evaluate(commands: Commands) -> None:
    evaluate = add_command(
        commands, "evaluate", _evaluate, help="evaluate bundles on corpora, with a report"
    )
    evaluate.add_argument("bundle", nargs="+", help="a system: its bundles, one a seed")
    how = evaluate.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--corpus", help=f"offline, on the reference texts and the files of one: {CORPORA}"
    )
    how.add_argument(
        "--live",
        nargs="+",
        metavar="CORPUS",
        help="one bundle through the live path, which is given the clips of these corpora; your "
        "own is a table .csv with the columns audio and label",
    )
    evaluate.add_argument(
        "--corpora", type=Path, default=Path(), help="folder of the corpora (default: .)"
    )
    evaluate.add_argument(
        "--split",
        choices=("train", "dev", "test", "all"),
        default="test",
        help="of the corpora (default: test); all: with --live, if none was trained on",
    )
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    evaluate.add_argument(
        "--out",
        type=Path,
        default=Path("report"),
        help="folder of the report (default: report), or of a folder for each if there are several",
    )
    _add_ray(evaluate)
    _add_offline(evaluate.add_argument_group("with --corpus"))
    _add_live(evaluate.add_argument_group("with --live"))


def _add_offline(options: "argparse._ArgumentGroup") -> None:
    options.add_argument("--against", nargs="+", metavar="BUNDLE", help="another system's bundles")
    options.add_argument("--cache", type=Path, help="folder of features (default: cache)")
    options.add_argument("--workers", type=int, help="processes (default: 2)")


def _add_live(options: "argparse._ArgumentGroup") -> None:
    options.add_argument(
        "--conditions",
        metavar="NAME[,NAME]",
        help="such as clean,noise_10db_room or reference_text (default: all that a corpus allows)",
    )
    options.add_argument("--speed", metavar="N|max", help="times real time (default: max)")
    options.add_argument(
        "--held-out",
        nargs="+",
        metavar="CORPUS=BUNDLE",
        help="for comparison: bundles trained without the corpus, on all of it",
    )
    options.add_argument(
        "--single-modality",
        nargs="+",
        metavar="CORPUS=BUNDLE",
        help="for comparison: bundles that take audio alone or text alone",
    )
    options.add_argument(
        "--resume",
        action="store_true",
        help="keep reports in --out that were made of the same bundle in the same way",
    )
    options.add_argument(
        "--update-card",
        action="store_true",
        help="replace the figures under 'live' in the bundle's metrics.json, and its model card",
    )


def _extract(options: argparse.Namespace) -> None:
    from stream_hbaf.corpora.extraction import extract_corpus
    from stream_hbaf.corpora.open_corpus import open_corpus
    from stream_hbaf.publish.terminal import show_progress

    corpus = open_corpus(options.corpus, options.corpora, all_splits=False)
    for representation in options.features.split(","):
        title = f"{corpus.name}, {representation}"
        with work_on(options.ray), show_progress(title) as progress:
            extracted = extract_corpus(
                corpus,
                representation=representation,
                cache=options.cache / "audio",
                workers=options.workers,
                device=_device(options),
                progress=progress,
            )
        if extracted.leftovers:
            print_line(extracted.leftovers)
        for skipped in extracted.skipped:
            print_line(f"skipped: {skipped}")
        count = len(extracted.skipped)
        measured = sum(len(rows) for rows in extracted.features.values()) - count
        print_line(f"{representation}: {measured} utterances measured, {count} skipped")


def _train(options: argparse.Namespace) -> None:
    from stream_hbaf.training.recipe import find_recipe
    from stream_hbaf.training.train import train

    devices = options.devices
    if devices not in (None, "auto"):
        if not devices.isdigit() or not int(devices):
            raise ConfigError(f"--devices {devices}: must be 'auto' or a number of GPUs, such as 1")
        devices = int(devices)
    recipe, cache = find_recipe(options.recipe), options.cache
    train(
        recipe,
        options.corpora,
        options.out,
        cache=cache,
        devices=devices,
        nodes=options.nodes,
        progress=print_line,
    )
    if options.weigh_voice:
        from stream_hbaf.training.weighing import weigh_trained

        weigh_trained(recipe, options.corpora, options.out, cache=cache, progress=print_line)


def _experiment(options: argparse.Namespace) -> None:
    limit_library_threads()
    from stream_hbaf.training.experiment import run_experiment
    from stream_hbaf.training.recipe import find_recipe

    with work_on(options.ray):
        run_experiment(
            find_recipe(options.file),
            corpora=options.corpora,
            results=options.results,
            cache=options.cache,
            workers=options.workers,
            device=_device(options),
            test=options.test,
            progress=print_line,
        )


def _evaluate(options: argparse.Namespace) -> None:
    limit_library_threads()
    wrong, other = (LIVE_ONLY, "--live") if options.live is None else (OFFLINE_ONLY, "--corpus")
    for name in wrong:
        if getattr(options, name) not in (None, False):
            option = name.replace("_", "-")
            raise ConfigError(f"--{option}: goes with {other} only; leave it out")
    evaluate = _evaluate_offline if options.live is None else _evaluate_live
    with work_on(options.ray):
        evaluate(options)


def _evaluate_offline(options: argparse.Namespace) -> None:
    if options.split == "all":
        raise ConfigError("--split all: goes with --live only; choose train, dev or test")
    from stream_hbaf.evaluation.report import evaluate_offline

    evaluate_offline(
        options.bundle,
        corpus=options.corpus,
        corpora=options.corpora,
        split=options.split,
        against=options.against or (),
        out=options.out,
        cache=options.cache or Path("cache"),
        device=_device(options),
        workers=options.workers or 2,
        progress=print_line,
    )


def _evaluate_live(options: argparse.Namespace) -> None:
    if len(options.bundle) > 1:
        raise ConfigError(
            f"--live: takes one bundle, not {len(options.bundle)}; evaluate each by itself"
        )
    speed = read_speed("max" if options.speed is None else options.speed)
    held_out = _by_corpus("--held-out", options.held_out or ())
    single_modality = _by_corpus("--single-modality", options.single_modality or ())
    # Before an evaluation that may take an hour.
    metrics = _read_metrics(options.bundle[0]) if options.update_card else {}
    from stream_hbaf.config import load_config
    from stream_hbaf.evaluation.conditions import evaluate_streaming

    device = options.device if options.ray is None else _device(options)
    live = evaluate_streaming(
        options.bundle[0],
        options.live,
        corpora=options.corpora,
        split=options.split,
        conditions=options.conditions.split(",") if options.conditions else (),
        held_out=held_out,
        single_modality=single_modality,
        speed=speed,
        resume=options.resume,
        out=options.out,
        config=load_config(environ=os.environ, overrides={"device": device}),
        progress=print_line,
    )
    if options.update_card:
        _update_card(options.bundle[0], {**metrics, "live": live})


def _by_corpus(option: str, given: Sequence[str]) -> dict[str, str]:
    """The bundle of each corpus, from ``CORPUS=BUNDLE``."""
    found: dict[str, str] = {}
    for text in given:
        corpus, _, bundle = text.partition("=")
        if not corpus or not bundle:
            raise ConfigError(f"{option} {text}: write it as CORPUS=BUNDLE")
        if corpus in found:
            raise ConfigError(f"{option}: {corpus} has two bundles; choose one of them")
        found[corpus] = bundle
    return found


def _read_metrics(bundle: str) -> dict[str, Any]:
    """A bundle's metrics.json; BundleError if no model card can be written from it."""
    from stream_hbaf.bundle import METRICS, resolve_bundle
    from stream_hbaf.training.card import model_card
    from stream_hbaf.untrusted import parse_json, read_limited

    file = resolve_bundle(bundle) / METRICS
    try:
        metrics: dict[str, Any] = parse_json(read_limited(file, limit=METRICS_BYTES))
        model_card(metrics)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {shorten(str(error))}"
        raise BundleError(
            f"--update-card: {file} isn't what a model card is written from ({reason}); "
            "train the bundle with 'stream-hbaf train'"
        ) from None
    return metrics


def _update_card(bundle: str, metrics: Mapping[str, Any]) -> None:
    """Write the bundle's metrics.json, and the model card that follows from it."""
    from stream_hbaf.bundle import Bundle, resolve_bundle
    from stream_hbaf.training.card import model_card

    folder = resolve_bundle(bundle)
    Bundle.describe(folder, metrics=metrics, card=model_card(metrics))
    print_line(f"{folder}: metrics.json and README.md updated")
