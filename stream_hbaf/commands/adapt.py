"""The command that adapts a bundle to where it runs: adapt."""

import argparse
from pathlib import Path

from stream_hbaf.commands import (
    Commands,
    add_command,
    device_of,
    limit_library_threads,
    print_line,
    print_status,
)


def add_adapt_command(commands: Commands) -> None:
    """Add adapt."""
    adapt = add_command(
        commands, "adapt", _adapt, help="adapt a bundle to the corrections of recorded sessions"
    )
    adapt.add_argument("bundle", help="its name or folder")
    adapt.add_argument("sessions", type=Path, help="folder of a session, or of several")
    adapt.add_argument("--out", type=Path, required=True, help="new folder of the adapted bundle")
    adapt.add_argument(
        "--cache",
        type=Path,
        default=Path("cache"),
        help="folder of intermediate results (default: cache)",
    )
    adapt.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    adapt.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


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
