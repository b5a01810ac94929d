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
