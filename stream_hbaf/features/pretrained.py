"""Finds and loads the weights of transformers' pretrained models without reports on stdout."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

LOG = logging.getLogger(__name__)

# What transformers lets through when weights are missing, cut short or another model's.
UNUSABLE = (OSError, ValueError, RuntimeError, SafetensorError)


@contextmanager
def quietly() -> Iterator[None]:
    """Load without transformers' progress bar and reports of unused weights."""
    verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    _show_downloads()  # transformers has turned off the hub's bars as well
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
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


@contextmanager
def downloading(name: str) -> Iterator[None]:
    """Download from the hub, which shows progress bars where stderr is a terminal.

    Raises an error at once if the hub can't be reached: transformers would retry for half a minute.
    """
    LOG.info("downloading %s from the Hugging Face hub", name)
    _show_downloads()
    snapshot_download(name, allow_patterns=["config.json"])
    yield


def download(name: str, *, files: Sequence[str]) -> Path:
    """The folder of a hub model's ``files`` (patterns) in the hub's cache, once they are there."""
    with downloading(name):
        return Path(snapshot_download(name, allow_patterns=list(files)))


def find_folder(name: str) -> Path | None:
    """The folder with a model's files on this machine: ``name`` itself, or in the hub's cache.

    None if the model is not on this machine.
    """
    if Path(name).is_dir():
        return Path(name)
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
    revisions = [] if folder == Path(name) else sorted(folder.parent.iterdir())
    for place in (folder, *revisions):
        if found := tuple(sorted(place.glob("*.safetensors"))):
            return found
    return tuple(sorted(folder.glob("pytorch_model*.bin")))
