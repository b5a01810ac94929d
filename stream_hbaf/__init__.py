"""Streaming emotion recognition for conversations: from a microphone to MQTT."""

from importlib.metadata import version

__version__ = version("stream-hbaf")
