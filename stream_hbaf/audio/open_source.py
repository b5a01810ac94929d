"""Opens the audio source that one word of the command line or the settings names."""

from typing import Unpack
from urllib.parse import urlsplit

from stream_hbaf.audio.file import FileSource
from stream_hbaf.audio.microphone import Microphone
from stream_hbaf.audio.push_source import Address
from stream_hbaf.audio.source import AudioSource, SourceOptions, is_url, public_name
from stream_hbaf.audio.wyoming import SatelliteSource, WyomingSource
from stream_hbaf.errors import DeviceError


def open_source(
    where: str,
    *,
    speed: float | None = 1.0,
    token: str | None = None,
    **options: Unpack[SourceOptions],
) -> AudioSource:
    """The source that ``where`` names, still to be entered with ``async with``.

        mic, mic:NAME, mic:INDEX    a microphone, by part of its name or by number
        PATH                        a recording, or a pipe (./mic is a file of that name)
        -                           standard input, to its end
        ws://HOST:PORT              a WebSocket server opened here, for browsers and programs
        wyoming://HOST:PORT         a Wyoming server opened here, for programs that send
        satellite://HOST:PORT       the Wyoming satellite there, which is connected to
        http://…, rtsp://…          whatever FFmpeg reads: a recording, or a live stream

    ``speed`` is that of recordings, None as fast as they are processed. ``token`` is required of
    WebSocket senders. ``channel`` counts from 0, None is the mean of all; two sources may take two
    channels of one device. Raises DeviceError for an invalid ``where``.
    """
    if where == "mic" or where.startswith("mic:"):
        return Microphone(where.partition(":")[2] or None, **options)
    if where == "browser":
        raise DeviceError("browser: it is the dashboard that a browser sends to; add --dashboard")
    scheme = where.partition("://")[0].lower() if is_url(where) else ""
    if scheme == "wyoming":
        return WyomingSource(_address(where), **options)
    if scheme == "satellite":
        return SatelliteSource(_address(where), **options)
    if scheme == "ws":
        # 0.2 s that most runs need not spend.
        from stream_hbaf.audio.websocket import WebSocketSource

        return WebSocketSource(_address(where), token=token, **options)
    return FileSource(where, speed=speed, **options)


def _address(where: str) -> Address:
    try:
        parts = urlsplit(where)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None or parts.path.strip("/") or parts.query:
        scheme = where.partition("://")[0].lower()
        raise DeviceError(
            f"{public_name(where)}: no address; give a host and a port: {scheme}://127.0.0.1:10700"
        )
    return Address(host, port)
