"""Identifies the pretrained weights that a recogniser builds on by their SHA-256.

A part is named by its kind and its model: ``text:all-MiniLM-L6-v2``, ``whisper:base``,
``ge2e:resemblyzer``, ``speaker:campplus``, ``vad:silero``, ``comet:<name>`` or ``speech:<name>``.
Packages, folders and the hub bring these weights; a bundle only names them, with the digests that
they had when it was trained and evaluated.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from stream_hbaf.errors import BundleError
from stream_hbaf.features import ge2e, speaker
from stream_hbaf.features.pretrained import find_weights, resolve_encoder
from stream_hbaf.speech.vad import find_silero

REINSTALL = "pip install --force-reinstall 'stream-hbaf[offline]'"


def find_part(part: str) -> tuple[Path, ...]:
    """The files with a part's weights on this machine; () if they are not there, or it has none."""
    kind, _, name = part.partition(":")
    match kind:
        case "text":
            return find_weights(resolve_encoder(name))
        case "whisper":
            # Importing it takes a second, which only this kind should cost.
            from stream_hbaf.features.whisper_encoder import find_whisper

            folder = find_whisper(name)
            return () if folder is None else (folder / "model.bin",)
        case "ge2e":
            weights = ge2e.find_ge2e()
            return () if weights is None else (weights,)
        case "speaker":
            weights = speaker.find_campplus()
            return () if weights is None else (weights,)
        case "vad":
            return (find_silero(),) if name == "silero" else ()
        case _:
            return find_weights(name)


def digest_part(part: str) -> str | None:
    """The SHA-256 of a part's weights, in hex; None if they are not on this machine.

    Of several files, that of their digests in order.
    """
    digests = [_digest_file(path, path.stat().st_mtime_ns) for path in find_part(part)]
    return _digest_lines(digests) if len(digests) > 1 else next(iter(digests), None)


def digest_parts(parts: Sequence[str], *, known: Mapping[str, str], bundle: str) -> dict[str, str]:
    """The digests of those ``parts`` that are on this machine.

    Raises BundleError for one whose digest is not the ``known`` one of ``bundle``. A part that the
    bundle does not know, such as another speech recogniser, is not compared.
    """
    found = {}
    for part in parts:
        digest = digest_part(part)
        if digest is None:
            continue
        if digest != known.get(part, digest):
            raise BundleError(
                f"bundle {bundle}: the weights {part} in {find_part(part)[0].parent} have SHA-256 "
                f"{digest}, but the bundle was made with {known[part]}; {_remedy(part)}"
            )
        found[part] = digest
    return found


def combine(bundle: str, digests: Mapping[str, str]) -> str:
    """One SHA-256 for a bundle's own and those of the parts that take part with it.

    Of a part only its kind counts: the same weights have the same digest in another folder.
    """
    parts = {f"{part.partition(':')[0]} {digest}" for part, digest in digests.items()}
    return _digest_lines([f"bundle {bundle}", *sorted(parts)])


def _remedy(part: str) -> str:
    if part.startswith("vad:"):
        return "pip install faster-whisper==1.2.1, or choose --set vad.engine=webrtc"
    if part.startswith("ge2e:"):
        return f"{ge2e.INSTALL} --force-reinstall"
    if part.startswith("speaker:"):
        return f"{speaker.INSTALL} --force-reinstall"
    if part.startswith(("comet:", "speech:")):
        return "get the model again that the bundle was trained with"
    return f"delete that folder and get them again: {REINSTALL}"


@lru_cache(maxsize=64)
def _digest_file(path: Path, _changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_lines(lines: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
