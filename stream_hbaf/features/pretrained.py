"""An utterance becomes features: what all pretrained models have in common, how they are loaded."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import disable_progress_bars
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

# What transformers lets through when weights are missing, cut short or another model's.
UNUSABLE = (OSError, ValueError, RuntimeError, SafetensorError)


@contextmanager
def quietly() -> Iterator[None]:
    """Load without progress bars and reports of unused weights: standard output is ours."""
    verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    disable_progress_bars()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity[0])
        hub_logging.set_verbosity(verbosity[1])
