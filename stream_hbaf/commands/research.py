"""The commands on corpora and recorded sessions: extract, train, experiment, replay, sessions."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from stream_hbaf.commands import (
    CORPORA,
    Commands,
    add_command,
    add_verbose,
    device_of,
    limit_library_threads,
    print_line,
    print_status,
)
from stream_hbaf.commands.evaluate import add_evaluate_command
from stream_hbaf.errors import ConfigError

if TYPE_CHECKING:
    from stream_hbaf.events import DialogueSummary, Utterance
    from stream_hbaf.sessions.session import SessionSummary


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


def _extract(options: argparse.Namespace) -> None:
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


def _train(options: argparse.Namespace) -> None:
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


def _experiment(options: argparse.Namespace) -> None:
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


FORMATS = ("manifest", "audformat", "audiofolder")


def add_session_commands(commands: Commands) -> None:
    """Add replay and sessions."""
    replay = add_command(commands, "replay", _replay, help="recognise a recorded session again")
    replay.add_argument("session", type=Path, help="folder of the session")
    replay.add_argument("--json", action="store_true", help="one JSON object a line, no more")
    replay.add_argument("--model", metavar="BUNDLE", help="another bundle than the recorded one")
    replay.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")

    sessions = commands.add_parser("sessions", help="list, export and correct recorded sessions")
    add_verbose(sessions)
    kinds = sessions.add_subparsers(required=True, metavar="list|export|import")
    listed = add_command(
        kinds, "list", _list, help="show each session's time, length, utterances and corrections"
    )
    listed.add_argument("folder", type=Path, help="folder of sessions")

    exported = add_command(kinds, "export", _export, help="write a corpus in a common format")
    exported.add_argument("folder", type=Path, help="folder of a session, or of several")
    exported.add_argument("out", type=Path, help="folder of the new corpus")
    exported.add_argument("--format", choices=FORMATS, default="manifest")
    exported.add_argument(
        "--own-labels",
        action="store_true",
        help="label utterances that nobody corrected with the predictions, marked as such",
    )

    imported = add_command(
        kinds, "import", _import, help="add corrections to sessions, or a corpus's manifest"
    )
    imported.add_argument("folder", type=Path, help="folder of sessions, or of the corpus")
    imported.add_argument("table", type=Path, help="corrections (id,label,by), or the new manifest")
    imported.add_argument("--format", choices=("corrections", *FORMATS[1:]), default="corrections")


def _replay(options: argparse.Namespace) -> None:
    limit_library_threads()
    from stream_hbaf.live.replay import replay_session
    from stream_hbaf.sessions.session import open_session

    def show(event: "Utterance | DialogueSummary") -> None:
        if options.json:
            fields = event.model_dump(mode="json", by_alias=True, exclude_none=True)
            kind = type(event).__name__.lower()
            print_line(json.dumps({"event": kind, **fields}, ensure_ascii=False))
        elif (emotion := getattr(event, "emotion", None)) is not None:
            doubt = "?" if emotion.abstained else ""
            text = getattr(event, "text", "") or "(no words)"
            print_line(f"{emotion.label}{doubt} {emotion.score:.0%} {text}")

    replayed = replay_session(
        open_session(options.session),
        on_event=show,
        progress=print_status,
        model=options.model,
        device=options.device,
    )
    print_status(f"{replayed.matched} utterances replayed")


def _list(options: argparse.Namespace) -> None:
    from stream_hbaf.sessions.session import list_sessions

    found = list_sessions(options.folder)
    for summary in found:
        print_line(_line(summary))
    if not found:
        print_line(f"{options.folder}: no session yet; --record {options.folder} writes one")


def _line(summary: "SessionSummary") -> str:
    if summary.error:
        return f"{summary.folder.name}  {summary.error}"
    minutes, seconds = divmod(round(summary.length_s), 60)
    speakers = f"  {', '.join(summary.speakers)}" if summary.speakers else ""
    return (
        f"{summary.folder.name}  {minutes}:{seconds:02}  {summary.utterances} utterances  "
        f"{summary.corrections} corrections{speakers}"
    )


def _export(options: argparse.Namespace) -> None:
    from stream_hbaf.corpora.exchange import export_audformat, export_audiofolder
    from stream_hbaf.corpora.session_corpus import export_manifest

    writers = dict(
        zip(FORMATS, (export_manifest, export_audformat, export_audiofolder), strict=True)
    )
    count = writers[options.format](options.folder, options.out, own_labels=options.own_labels)
    print_line(f"{options.out}: {count} utterances")


def _import(options: argparse.Namespace) -> None:
    from stream_hbaf.corpora.exchange import import_audformat, import_audiofolder
    from stream_hbaf.corpora.session_corpus import import_corrections

    if options.format == "corrections":
        print_line(
            f"{options.folder}: {import_corrections(options.folder, options.table)} corrections"
        )
        return
    read = import_audformat if options.format == "audformat" else import_audiofolder
    print_line(f"{options.table}: {read(options.folder, options.table)} utterances")
