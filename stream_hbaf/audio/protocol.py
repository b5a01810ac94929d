"""Sound on a WebSocket: the messages in which a browser or a program sends it.

First one text message, JSON, that says how the samples are written:

    {"rate": 48000, "channels": 1, "format": "f32le", "speaker": "Anna"}

``rate`` is in Hz, 8,000 to 192,000; ``channels`` 1 to 8, 1 if left out; ``format`` ``s16le``,
``s32le`` or ``f32le`` (in [-1, 1], as browsers capture it), ``s16le`` if left out; ``speaker`` may
be left out; other keys are ignored. Another such message changes the form.

Then binary messages of at most 64 KiB: whole frames, interleaved, as they are captured, 20 to
100 ms each. Whoever sends faster than in real time may lose sound: five seconds are held. The text
message ``{"pause": true}`` ends what is being said; sound may follow it.

Nothing is answered. A message that breaks a rule closes the connection with code 1008 and the
reason; 1013 means that somebody else is sending.
"""

import json
from typing import Any

from stream_hbaf.audio.pcm import WIDTHS
from stream_hbaf.audio.push_source import Form, Sender
from stream_hbaf.errors import AudioError

LARGEST_MESSAGE = 1 << 16  # bytes
BROKEN_RULE, TRY_LATER = 1008, 1013  # WebSocket close codes
LONGEST_REASON = 123  # bytes that a close frame has room for
LONGEST_SPEAKER = 64


def take_message(message: str | bytes, *, sender: Sender) -> None:
    """Do what one message says. Raises AudioError if it breaks a rule of the wire."""
    if len(message) > LARGEST_MESSAGE:
        raise too_large()
    if isinstance(message, bytes):
        sender.feed(message)
        return
    try:
        fields = json.loads(message)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise AudioError("a text message that is no JSON object")
    if fields.get("pause") is True:
        sender.pause()
    else:
        sender.begin(_form(fields), speaker=_speaker(fields))


def too_large() -> AudioError:
    return AudioError(f"a message of more than {LARGEST_MESSAGE} bytes")


def close_reason(error: Exception) -> str:
    """An error as the reason of a close frame."""
    return str(error).encode()[:LONGEST_REASON].decode(errors="ignore")


def _form(fields: dict[str, Any]) -> Form:
    rate_hz, channels = fields.get("rate"), fields.get("channels", 1)
    # JSON's true is Python's 1: a bool is no number here.
    if type(rate_hz) is not int or type(channels) is not int:
        raise AudioError('a form without "rate" (Hz) and "channels" in whole numbers')
    sample_format = fields.get("format", "s16le")
    if not isinstance(sample_format, str) or sample_format not in WIDTHS:
        raise AudioError(f'a form whose "format" is none of {", ".join(WIDTHS)}')
    return Form(rate_hz, channels, sample_format)


def _speaker(fields: dict[str, Any]) -> str:
    speaker = fields.get("speaker", "")
    if not isinstance(speaker, str):
        raise AudioError('a form whose "speaker" is no text')
    return "".join(letter for letter in speaker if letter.isprintable())[:LONGEST_SPEAKER]
