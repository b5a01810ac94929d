"""The commands that read corpora: extract, train, evaluate, experiment."""

import argparse
from pathlib import Path

from stream_hbaf.commands.evaluate import add_evaluate_command
from stream_hbaf.commands.options import (
    CORPORA,
    Commands,
    add_command,
    device_of,
    limit_library_threads,
    print_line,
)
from stream_hbaf.errors import ConfigError


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
    _add_corpora(train, models=False)

    add_evaluate_command(commands)

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


def _extract(options: argparse.Namespace) -> int:
    from stream_hbaf.corpora.extraction import extract_corpus
    from stream_hbaf.corpora.open_corpus import open_corpus
    from stream_hbaf.publish.terminal import show_progress

    corpus = open_corpus(options.corpus, options.corpora, all_splits=False)
    for representation in options.features.split(","):
        with show_progress(f"{corpus.name}, {representation}") as progress:
            extracted = extract_corpus(
                corpus,
                representation=representation,
                cache=options.cache / "audio",
                workers=options.workers,
                device=device_of(options),
                progress=progress,
            )
        if extracted.leftovers:
            print_line(extracted.leftovers)
        for skipped in extracted.skipped:
            print_line(f"skipped: {skipped}")
        count = len(extracted.skipped)
        measured = sum(len(rows) for rows in extracted.features.values()) - count
        print_line(f"{representation}: {measured} utterances measured, {count} skipped")
    return 0


def _train(options: argparse.Namespace) -> int:
    from stream_hbaf.training.recipe import find_recipe
    from stream_hbaf.training.train import train

    devices = options.devices
    if devices not in (None, "auto"):
        if not devices.isdigit() or not int(devices):
            raise ConfigError(f"--devices {devices}: must be 'auto' or a number of GPUs, such as 1")
        devices = int(devices)
    train(
        find_recipe(options.recipe),
        options.corpora,
        options.out,
        cache=options.cache,
        devices=devices,
        nodes=options.nodes,
        progress=print_line,
    )
    return 0


def _experiment(options: argparse.Namespace) -> int:
    limit_library_threads()
    from stream_hbaf.training.experiment import run_experiment
    from stream_hbaf.training.recipe import find_recipe

    run_experiment(
        find_recipe(options.file),
        corpora=options.corpora,
        results=options.results,
        cache=options.cache,
        workers=options.workers,
        device=device_of(options),
        test=options.test,
        progress=print_line,
    )
    return 0
