"""The commands around recorded sessions: replay, and sessions list, export, import."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream_hbaf.commands.options import say, share_the_cores

if TYPE_CHECKING:
    from stream_hbaf.events import DialogueSummary, Utterance
    from stream_hbaf.sessions.session import Summary

FORMATS = ("manifest", "audformat", "audiofolder")


def add_sessions(commands: Any) -> None:
    """What becomes of a recording."""
    replay = commands.add_parser("replay", help="recognise a recorded session again")
    replay.add_argument("session", type=Path, help="its folder")
    replay.add_argument("--json", action="store_true", help="one JSON object a line, no more")
    replay.add_argument("--model", metavar="BUNDLE", help="another bundle than the one it had")
    replay.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    replay.set_defaults(run=_replay)

    sessions = commands.add_parser("sessions", help="list, export and correct recorded sessions")
    kinds = sessions.add_subparsers(required=True, metavar="list|export|import")
    listed = kinds.add_parser("list", help="when, how long, how many utterances and corrections")
    listed.add_argument("folder", type=Path, help="of sessions")
    listed.set_defaults(run=_list)

    exported = kinds.add_parser("export", help="write a corpus that others can read")
    exported.add_argument("folder", type=Path, help="a session, or a folder of sessions")
    exported.add_argument("out", type=Path, help="folder of the corpus")
    exported.add_argument("--format", choices=FORMATS, default="manifest")
    exported.add_argument(
        "--own-labels",
        action="store_true",
        help="the recogniser's labels, marked as such, where nobody corrected",
    )
    exported.set_defaults(run=_export)

    taken = kinds.add_parser("import", help="add corrections, or make a manifest of a corpus")
    taken.add_argument("folder", type=Path, help="sessions; or an audformat or audio folder")
    taken.add_argument("table", type=Path, help="corrections, id,label,by; or the new manifest")
    taken.add_argument("--format", choices=("corrections", *FORMATS[1:]), default="corrections")
    taken.set_defaults(run=_import)


def _replay(options: argparse.Namespace) -> int:
    share_the_cores()
    from stream_hbaf.live.replay import replay_session
    from stream_hbaf.sessions.session import open_session

    def tell(event: "Utterance | DialogueSummary") -> None:
        if options.json:
            fields = event.model_dump(mode="json", by_alias=True, exclude_none=True)
            kind = type(event).__name__.lower()
            say(json.dumps({"event": kind, **fields}, ensure_ascii=False))
        elif (emotion := getattr(event, "emotion", None)) is not None:
            doubt = "?" if emotion.abstained else ""
            said = getattr(event, "text", "") or "(no words)"
            say(f"{emotion.label}{doubt} {emotion.score:.0%} {said}")

    def remark(line: str) -> None:
        sys.stderr.write(f"stream-hbaf: {line}\n")

    replayed = replay_session(
        open_session(options.session),
        on_event=tell,
        progress=remark,
        model=options.model,
        device=options.device,
    )
    remark(f"{replayed.matched} utterances replayed")
    return 0


def _list(options: argparse.Namespace) -> int:
    from stream_hbaf.sessions.session import list_sessions

    found = list_sessions(options.folder)
    for summary in found:
        say(_line(summary))
    if not found:
        say(f"{options.folder}: no session yet; --record {options.folder} writes one")
    return 0


def _line(summary: "Summary") -> str:
    if summary.complaint:
        return f"{summary.folder.name}  {summary.complaint}"
    minutes, seconds = divmod(round(summary.length_s), 60)
    speakers = f"  {', '.join(summary.speakers)}" if summary.speakers else ""
    return (
        f"{summary.folder.name}  {minutes}:{seconds:02}  {summary.utterances} utterances  "
        f"{summary.corrections} corrections{speakers}"
    )


def _export(options: argparse.Namespace) -> int:
    from stream_hbaf.corpora.audformat import export_audformat
    from stream_hbaf.corpora.audiofolder import export_audiofolder
    from stream_hbaf.corpora.exchange import export_manifest

    writers = dict(
        zip(FORMATS, (export_manifest, export_audformat, export_audiofolder), strict=True)
    )
    count = writers[options.format](options.folder, options.out, own_labels=options.own_labels)
    say(f"{options.out}: {count} utterances")
    return 0


def _import(options: argparse.Namespace) -> int:
    from stream_hbaf.corpora.audformat import import_audformat
    from stream_hbaf.corpora.audiofolder import import_audiofolder
    from stream_hbaf.corpora.exchange import import_corrections

    if options.format == "corrections":
        say(f"{options.folder}: {import_corrections(options.folder, options.table)} corrections")
        return 0
    read = import_audformat if options.format == "audformat" else import_audiofolder
    say(f"{options.table}: {read(options.folder, options.table)} utterances")
    return 0
