"""Errors that a user can correct; each message says what is wrong, where, and what to do.

The command line prints the message as one line and exits with status 2; a traceback is a bug.
"""


class StreamHbafError(Exception):
    """Base class of all errors that a user can correct."""


class ConfigError(StreamHbafError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class AudioError(StreamHbafError):
    """A recording can't be opened or decoded."""


class DeviceError(StreamHbafError):
    """An audio device is missing, busy or gone."""


class ModelError(StreamHbafError):
    """The weights of a pretrained model can't be found or loaded."""


class BundleError(StreamHbafError):
    """A trained bundle is missing, damaged, or doesn't fit this version."""


class CorpusError(StreamHbafError):
    """A corpus is missing, or a line of it can't be read."""


class BrokerError(StreamHbafError):
    """The MQTT broker refuses, or can't be reached."""


class ServiceError(StreamHbafError):
    """A service for streams refuses, or can't be reached."""

    def __init__(self, message: str, *, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s  # there may be room then; 0: trying again is no use


# What a model may raise on one utterance without danger to the next one; anything else is a
# programming error.
UTTERANCE_ERRORS = (StreamHbafError, RuntimeError, MemoryError)


def printable(text: str) -> str:
    """The text with a replacement character for each control character."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def shorten(text: str, *, limit: int = 80) -> str:
    """The text in one printable line of at most ``limit`` characters, for messages that name it."""
    line = printable(" ".join(text[: 4 * limit].split()))
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
