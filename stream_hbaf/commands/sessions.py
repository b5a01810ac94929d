"""The commands for recorded sessions: replay, and sessions list, export, import."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from stream_hbaf.commands.options import (
    Commands,
    add_command,
    add_verbose,
    limit_library_threads,
    print_line,
    print_status,
)

if TYPE_CHECKING:
    from stream_hbaf.events import DialogueSummary, Utterance
    from stream_hbaf.sessions.session import SessionSummary

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


def _replay(options: argparse.Namespace) -> int:
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
    return 0


def _list(options: argparse.Namespace) -> int:
    from stream_hbaf.sessions.session import list_sessions

    found = list_sessions(options.folder)
    for summary in found:
        print_line(_line(summary))
    if not found:
        print_line(f"{options.folder}: no session yet; --record {options.folder} writes one")
    return 0


def _line(summary: "SessionSummary") -> str:
    if summary.error:
        return f"{summary.folder.name}  {summary.error}"
    minutes, seconds = divmod(round(summary.length_s), 60)
    speakers = f"  {', '.join(summary.speakers)}" if summary.speakers else ""
    return (
        f"{summary.folder.name}  {minutes}:{seconds:02}  {summary.utterances} utterances  "
        f"{summary.corrections} corrections{speakers}"
    )


def _export(options: argparse.Namespace) -> int:
    from stream_hbaf.corpora.audformat import export_audformat
    from stream_hbaf.corpora.audiofolder import export_audiofolder
    from stream_hbaf.corpora.session_corpus import export_manifest

    writers = dict(
        zip(FORMATS, (export_manifest, export_audformat, export_audiofolder), strict=True)
    )
    count = writers[options.format](options.folder, options.out, own_labels=options.own_labels)
    print_line(f"{options.out}: {count} utterances")
    return 0


def _import(options: argparse.Namespace) -> int:
    from stream_hbaf.corpora.audformat import import_audformat
    from stream_hbaf.corpora.audiofolder import import_audiofolder
    from stream_hbaf.corpora.session_corpus import import_corrections

    if options.format == "corrections":
        print_line(
            f"{options.folder}: {import_corrections(options.folder, options.table)} corrections"
        )
        return 0
    read = import_audformat if options.format == "audformat" else import_audiofolder
    print_line(f"{options.table}: {read(options.folder, options.table)} utterances")
    return 0
