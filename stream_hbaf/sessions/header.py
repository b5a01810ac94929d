"""A session's header: when it began, and by what it was heard and read."""

import contextlib
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel, ConfigDict

from stream_hbaf.config import Config
from stream_hbaf.events import Model

FORMAT = 1
# What isn't kept of the settings: where sound came from and events went to, with all secrets.
NOT_KEPT = {"source", "sources", "mqtt", "dashboard", "record"}
# With other versions of these the same sound may be heard or read differently.
DECISIVE = (
    "stream-hbaf",
    "opensmile",
    "faster-whisper",
    "ctranslate2",
    "onnxruntime",
    "torch",
    "transformers",
)


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Header(Frozen):
    """What ``session.json`` holds."""

    format: int = FORMAT
    id: str
    began: str  # ISO 8601, UTC
    model: Model  # that it began with; each ``end`` names its own
    labels: tuple[str, ...]  # what that model tells apart, and so what corrections may say
    settings: dict[str, Any]  # all that decide what is recognised, and so no secrets
    versions: dict[str, str]  # of the packages that do


def describe(config: Config, *, model: Model, labels: Sequence[str]) -> Header:
    """The header of a session that begins now."""
    now = datetime.now(UTC)
    return Header(
        id=f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}",
        began=now.isoformat(timespec="milliseconds"),
        model=model,
        labels=tuple(labels),
        settings=config.model_dump(mode="json", exclude=NOT_KEPT),
        versions=decisive_versions(),
    )


def decisive_versions() -> dict[str, str]:
    """Of the packages here that decide what is heard and read."""
    found = {}
    for package in DECISIVE:
        with contextlib.suppress(PackageNotFoundError):  # Whisper's engine has several builds
            found[package] = version(package)
    return found
