"""Training: corpora in, a bundle out, with every figure of its card measured on the way.

Everything is fitted on train and picked on dev; test is read once, at the end.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from sklearn.svm import LinearSVC

from stream_hbaf.bundle import FARTHEST, Bundle, BundleConfig, Scaling
from stream_hbaf.card import model_card
from stream_hbaf.config import Positive, Section
from stream_hbaf.corpora.acoustics import (
    CONDITIONS,
    AcousticsConfig,
    measure,
    reported_takes,
    training_takes,
)
from stream_hbaf.corpora.augment import read_surroundings
from stream_hbaf.corpora.dialogue import LABELS, SPLITS, Dialogue, Split
from stream_hbaf.corpora.event2mind import read_event2mind
from stream_hbaf.corpora.meld import read_meld
from stream_hbaf.corpora.ravdess import read_ravdess
from stream_hbaf.distillation import HeadsConfig, gather, measure_heads, train_heads
from stream_hbaf.errors import ConfigError
from stream_hbaf.evaluation import score
from stream_hbaf.features.commonsense import Event2MindHeads
from stream_hbaf.features.text import DEFAULT_ENCODER, TextEncoder
from stream_hbaf.fitting import FittingConfig, Fitted, Material, fit_network, predict
