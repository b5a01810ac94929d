"""The commands that fit a part of a bundle, and write a new one: adapt, arousal."""

import argparse
from pathlib import Path

from stream_hbaf.commands import (
    CORPORA,
    Commands,
    add_command,
    device_of,
    limit_library_threads,
    print_line,
    print_status,
)


def add_adapt_command(commands: Commands) -> None:
    """Add adapt and arousal."""
    adapt = add_command(
        commands, "adapt", _adapt, help="adapt a bundle to the corrections of recorded sessions"
    )
    adapt.add_argument("bundle", help="its name or folder")
    adapt.add_argument("sessions", type=Path, help="folder of a session, or of several")
    _add_measuring(adapt)
    arousal = add_command(
        commands, "arousal", _arousal, help="fit a bundle's head for the arousal of voices"
    )
    arousal.add_argument("bundle", help="its name or folder")
    arousal.add_argument("corpus", nargs="+", help=CORPORA)
    arousal.add_argument("--corpora", type=Path, required=True, help="folder of the corpora")
    _add_measuring(arousal)


def _add_measuring(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, help="folder of the new bundle")
    command.add_argument(
        "--cache",
        type=Path,
        default=Path("cache"),
        help="folder of intermediate results (default: cache)",
    )
    command.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _adapt(options: argparse.Namespace) -> None:
    limit_library_threads()
    from stream_hbaf.training.adapt import FOLDS, adapt

    found = adapt(
        options.bundle,
        options.sessions,
        out=options.out,
        cache=options.cache,
        device=device_of(options),
        workers=options.workers,
        progress=print_status,
    )
    (loss, new_loss), (right, new_right) = found.loss, found.accuracy
    print_line(
        f"{options.out}: adapted to {sum(found.corrected.values())} corrections; in {FOLDS} folds "
        f"right {right:.0%} before, {new_right:.0%} after, log loss {loss:.2f} before, "
        f"{new_loss:.2f} after"
    )


def _arousal(options: argparse.Namespace) -> None:
    limit_library_threads()
    from stream_hbaf.training.arousal import fit_arousal

    judged = fit_arousal(
        options.bundle,
        options.corpus,
        folder=options.corpora,
        out=options.out,
        cache=options.cache,
        device=device_of(options),
        workers=options.workers,
        progress=print_status,
    )
    for corpus, found in judged.corpus_out.items():
        print_line(
            f"{corpus}: rank correlation {found:.2f} with the corpus left out, "
            f"{judged.speakers_out[corpus]:.2f} with the speakers left out"
        )
