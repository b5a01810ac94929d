"""Sends sound to ``stream-hbaf serve``, and yields the events that come back.

    async for event in stream("ws://localhost:8772", chunks):
        if isinstance(event, Utterance) and event.type == "end":
            print(event.emotion, event.text)

``stream_hbaf.client`` has it, too.
"""

import asyncio
import contextlib
import json
import secrets
import ssl
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

from pydantic import ValidationError
from pydantic_core import from_json
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from stream_hbaf.audio.port import enable_keepalive
from stream_hbaf.errors import ServiceError, shorten
from stream_hbaf.events import Connected, DialogueSummary, Partial, Speech, Status, Utterance
from stream_hbaf.publish.connection import backoff

StreamEvent = Connected | Utterance | Partial | Speech | Status | DialogueSummary
KINDS: dict[str, type[StreamEvent]] = {
    kind.__name__.lower(): kind
    for kind in (Connected, Utterance, Partial, Speech, Status, DialogueSummary)
}

LARGEST_EVENT = 1 << 20  # bytes
AGAIN_S = 0.2  # until a lost connection is restored: the service may hang up at once again
MAX_REVISIONS = 1000  # utterances whose latest revision is kept: more than a service sends again
DONE, REPLACED, RULE_BROKEN = 1000, 4000, 1008  # WebSocket close codes after which it is over


async def stream(
    url: str,
    chunks: AsyncIterable[bytes],
    *,
    rate_hz: int = 16_000,
    channels: int = 1,
    sample_format: Literal["s16le", "s32le", "f32le", "opus"] = "s16le",
    source: str = "",
    dialogue: str = "",
    speaker: str = "",
    stream_id: str = "",
    token: str = "",
    ca_file: Path | None = None,
) -> AsyncGenerator[StreamEvent, None]:
    """Send chunks of sound as they are captured, and yield the events until the last ``end``.

    A chunk is whole frames of at most 64 KiB, 20 to 100 ms each, or one Opus packet. ``source``,
    ``dialogue`` and ``speaker`` name the stream's source, a dialogue that others join, and the only
    speaker; ``stream_id`` goes on with an earlier stream. ``ca_file`` has the authority of a
    ``wss://`` service, if it isn't one of the system's.

    A lost connection is restored: sound in between is lost, and each ``end`` comes once. Chunks are
    taken no faster than the service reads them: recordings are recognised in real time. Raises
    ServiceError if the service refuses, can't be reached, or isn't back in time.
    """
    address = _address(url, source=source, dialogue=dialogue, speaker=speaker, id=stream_id)
    opening = {"rate": rate_hz, "channels": channels, "format": sample_format}
    waiting: asyncio.Queue[bytes | None] = asyncio.Queue(1)
    feeding = asyncio.create_task(_feed(chunks, waiting))
    seen = _Seen()
    resume_s = 0  # that a lost connection may take; before the first one none
    try:
        while True:
            connection = await _connect(address, token=token, ca_file=ca_file, within_s=resume_s)
            sending = asyncio.create_task(_send(connection, opening, waiting))
            try:
                async for message in connection:
                    event = _decode(message)
                    resume_s = event.resume_s if isinstance(event, Connected) else resume_s
                    if seen.is_new(event):
                        yield event
            except ConnectionClosed:
                pass
            finally:
                sending.cancel()
                await connection.close()
            if _is_over(connection, url=url):
                break
            await asyncio.sleep(AGAIN_S)
        await feeding  # raises what went wrong with the chunks
    finally:
        feeding.cancel()


def _address(url: str, **wanted: str) -> str:
    """The address with what is wanted, and an id for all connections of the stream."""
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("ws", "wss"):
        raise ServiceError(f"{shorten(url)}: no address of a service; write ws://HOST:PORT")
    query = {
        "id": secrets.token_urlsafe(12),
        **dict(parse_qsl(parts.query, keep_blank_values=True)),
    }
    query |= {key: value for key, value in wanted.items() if value}
    return parts._replace(path=parts.path or "/", query=urlencode(query)).geturl()


async def _connect(
    address: str, *, token: str, ca_file: Path | None, within_s: int
) -> ClientConnection:
    """A connection; a lost one is tried again for ``within_s``. Raises ServiceError."""
    name = address.partition("?")[0]
    deadline = time.monotonic() + within_s
    secure = ssl.create_default_context(cafile=ca_file) if address.startswith("wss:") else None
    for delay_s in backoff():
        try:
            connection = await connect(
                address,
                ssl=secure,
                additional_headers={"Authorization": f"Bearer {token}"} if token else None,
                compression=None,  # sound doesn't shrink
                max_size=LARGEST_EVENT,
                ping_interval=None,  # the service pings; what it hasn't read delays its pongs
            )
        except InvalidStatus as refused:
            error = _refusal(name, refused)
            retry_s = error.retry_after_s
            if not retry_s or time.monotonic() + retry_s > deadline:
                raise error from None
        except (OSError, TimeoutError, InvalidHandshake, InvalidURI) as failed:
            reason = getattr(failed, "strerror", None) or str(failed) or "no answer"
            retry_s = 0
            error = ServiceError(f"{name}: can't be reached ({reason}); does the service run?")
            if time.monotonic() > deadline:
                raise error from None
        else:
            enable_keepalive(connection.transport.get_extra_info("socket"))
            return connection
        await asyncio.sleep(retry_s or delay_s)
    raise AssertionError("backoff has no end")


def _refusal(name: str, refused: InvalidStatus) -> ServiceError:
    response = refused.response
    retry_after = response.headers.get("Retry-After", "")
    line = shorten((response.body or b"").decode(errors="replace")) or "no stream-hbaf serve"
    retry_s = int(retry_after) if retry_after.isdecimal() else 0
    return ServiceError(f"{name}: {line} ({response.status_code})", retry_after_s=retry_s)


async def _feed(chunks: AsyncIterable[bytes], waiting: "asyncio.Queue[bytes | None]") -> None:
    """Take the chunks in one task, so that a lost connection doesn't break off their iterator."""
    try:
        async for chunk in chunks:
            await waiting.put(chunk)
    except Exception:
        await waiting.put(None)
        raise
    await waiting.put(None)


async def _send(
    connection: ClientConnection,
    opening: Mapping[str, object],
    waiting: "asyncio.Queue[bytes | None]",
) -> None:
    with contextlib.suppress(ConnectionClosed):
        await connection.send(json.dumps(opening))
        while (chunk := await waiting.get()) is not None:
            await connection.send(chunk)
        waiting.put_nowait(None)  # for the next connection, should this one be lost
        await connection.send('{"end": true}')


def _decode(message: str | bytes) -> StreamEvent:
    """The event; unknown fields are ignored. Raises ServiceError for anything else."""
    try:
        fields = from_json(message)
        return KINDS[fields["event"]].model_validate(fields)
    except (ValueError, TypeError, KeyError, ValidationError):
        raise ServiceError("the service sends what is no event; is it stream-hbaf serve?") from None


def _is_over(connection: ClientConnection, *, url: str) -> bool:
    """Whether the service has said that all is done. Raises ServiceError if it has refused."""
    code, reason = connection.close_code, connection.close_reason or ""
    if code in (REPLACED, RULE_BROKEN, 1009):
        raise ServiceError(f"{url.partition('?')[0]}: {shorten(reason) or code}")
    return code == DONE


class _Seen:
    """The utterances that have come: after a lost connection some come again."""

    def __init__(self) -> None:
        self._revisions: OrderedDict[str, int] = OrderedDict()

    def is_new(self, event: StreamEvent) -> bool:
        if not isinstance(event, Utterance):
            return True
        is_new = event.rev > self._revisions.get(event.id, 0)
        self._revisions[event.id] = max(event.rev, self._revisions.pop(event.id, 0))
        if len(self._revisions) > MAX_REVISIONS:
            self._revisions.popitem(last=False)
        return is_new
