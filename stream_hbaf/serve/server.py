"""The server of many streams: admits connections, and sends each its own source's events.

The protocol of the sound is that of ``audio.websocket``, that of the address in ``admission``. What
comes back is JSON, one event a message: ``connected`` first, then the events of the stream's
source, with the fields of the MQTT payloads and their kind in ``event``.
"""

import asyncio
import logging
import os
import secrets
import ssl
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus

from websockets.asyncio.server import Server, ServerConnection
from websockets.http11 import Request, Response

from stream_hbaf.audio.port import MOST_CONNECTIONS, Port, enable_keepalive, open_port
from stream_hbaf.audio.push_source import Address, PushSource, is_loopback, plain_reason
from stream_hbaf.audio.websocket import close_reason, forbids, listen
from stream_hbaf.config import ServeConfig
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import AnyEvent, DialogueSummary, Partial, Speech, Status, Utterance
from stream_hbaf.live.pipeline import LivePipeline
from stream_hbaf.recognizer import Recognizer
from stream_hbaf.serve.admission import RefusedError, Wanted, read_wanted
from stream_hbaf.serve.checkpoints import Checkpoints, SavedStream
from stream_hbaf.serve.stream import Stream

LOG = logging.getLogger(__name__)

STREAMS_PER_CORE = 4  # with the transcripts of Whisper base on a CPU, and room for bursts
RETRY_S = 30  # until a refused client should try again, where nobody knows when there is room
COMPLAIN_EVERY_S = 60.0  # refusals must not flood the log
SENT = Utterance | Partial | Speech | Status | DialogueSummary  # what clients get


class StreamServer:
    """A publisher that sends events to the clients whose sound they are about.

    ``pipeline`` is set before ``start``: the address is checked before the models are loaded.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.pipeline: LivePipeline | None = None
        cores = len(os.sched_getaffinity(0))
        self.max_streams = config.max_streams or STREAMS_PER_CORE * cores
        self.address = Address(config.host, config.port)  # with the actual port, once it is open
        self._config = config
        self._token = config.token.get_secret_value() if config.token else None
        self._streams: dict[str, Stream] = {}  # by id
        self._tls = _tls(config)
        self._port: Port | None = None
        self._server: Server | None = None
        self._complain_at = 0.0
        self._checkpoints: Checkpoints | None = None
        self._keeping = asyncio.Lock()  # checkpoints are written in their order
        self._conversing: set[asyncio.Task[None]] = set()  # connections

    @property
    def url(self) -> str:
        """Where clients connect to."""
        return f"{'wss' if self._tls else 'ws'}://{self.address}/"

    @property
    def is_started(self) -> bool:
        """Whether clients are let in."""
        return self._server is not None

    @property
    def connections(self) -> set[ServerConnection]:
        """Those that are open."""
        return self._server.connections if self._server is not None else set()

    async def open(self) -> None:
        """Open the port and the checkpoints; nobody is let in yet.

        Raises ConfigError if they can't be opened, or a token lacks where others can connect.
        """
        if self._config.checkpoints is not None:
            self._checkpoints = Checkpoints(self._config.checkpoints)
        if not self._token and not is_loopback(self.address.host):
            raise ConfigError(
                f"serve: anybody on the network could connect to {self.address}; set a token "
                "(serve.token), or listen on 127.0.0.1"
            )
        try:
            # Beside those with a stream, as many may be refused at once. Many come from one
            # address, that of a proxy, and none is served without the token.
            most = self.max_streams + MOST_CONNECTIONS
            self._port = await open_port(
                "serve", self.address.host, self.address.port, most=most, most_of_peer=most
            )
        except OSError as error:
            raise ConfigError(
                f"serve: can't listen on {self.address} ({plain_reason(error)}); choose another "
                "serve.port, or end the program that uses it"
            ) from None
        self.address = Address(self.address.host, self._port.getsockname()[1])

    async def start(self) -> None:
        """Let clients in."""
        assert self.pipeline is not None
        assert self._port is not None
        # A pong waits behind sound that isn't read yet: the system tells a dead peer.
        self._server = await listen(
            self._converse, self._port, admit=self._admit, tls=self._tls, ping_timeout_s=None
        )

    async def send(self, event: AnyEvent) -> None:
        """Queue an event for the client of its source; waits for no client, only for the disk."""
        if isinstance(event, SENT):
            for stream in [*self._streams.values()]:
                if stream.config.name == event.source:
                    stream.put(event)
                    if self._checkpoints is not None:
                        await self._keep(stream, event, self._checkpoints)

    async def _keep(self, stream: Stream, event: AnyEvent, checkpoints: Checkpoints) -> None:
        """Keep what a killed service would lose of a stream: turns, ``end``s, the dialogue."""
        match event:
            case Utterance(type="end"):
                kept = SavedStream(config=stream.config, ends=stream.unacknowledged)
                async with self._keeping:
                    await asyncio.to_thread(
                        checkpoints.save_stream,
                        stream.id,
                        kept,
                        privacy=self._recognizer.config.privacy,
                    )
            case Utterance(type="new"):
                await self._keep_dialogue(stream, event.dialogue_id, checkpoints.save_turn)
            case DialogueSummary():  # until it is published, no other utterance moves it on
                await self._keep_dialogue(stream, event.dialogue_id, checkpoints.save_dialogue)

    async def _keep_dialogue(
        self, stream: Stream, dialogue_id: str, save: Callable[..., None]
    ) -> None:
        assert self.pipeline is not None
        async with self._keeping:
            if stream.config.name in self.pipeline.sources:
                saved = self.pipeline.save_dialogue(stream.config.name)
                if saved is not None and saved.dialogue.id == dialogue_id:
                    await asyncio.to_thread(save, stream.id, stream.config, saved, self._recognizer)

    @property
    def _recognizer(self) -> Recognizer:
        assert self.pipeline is not None
        return self.pipeline.recognizer

    async def run(self) -> None:
        """Wait until cancelled: each connection has its own task."""
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        """Send what is queued, and close all connections, the port and the checkpoints."""
        if self._server is not None:
            if self._conversing:  # each stream closes its connection behind its last event
                await asyncio.wait(self._conversing, timeout=timeout_s)
            self._server.close()
            await self._server.wait_closed()
        if self._checkpoints is not None:
            self._checkpoints.close()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """None lets a connection in."""
        line = forbids(
            request,
            token=self._token,
            local=is_loopback(self.address.host),
            setting="serve.token",
            origins=self._config.origins,
        )
        if line:
            return connection.respond(HTTPStatus.FORBIDDEN, f"{line}\n")
        try:
            self._find(read_wanted(request.path))
        except RefusedError as refusal:
            if "Origin" not in request.headers:  # else a page, which can only read close codes
                response = connection.respond(refusal.status, f"{refusal}\n")
                if refusal.retry_after_s:
                    response.headers["Retry-After"] = str(refusal.retry_after_s)
                return response
        if self._port is not None:
            self._port.establish(connection.remote_address)
        return None

    async def _converse(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        task = asyncio.current_task()
        assert task is not None
        self._conversing.add(task)
        task.add_done_callback(self._conversing.discard)
        enable_keepalive(connection.transport.get_extra_info("socket"))
        try:
            wanted = read_wanted(connection.request.path)
            stream = self._find(wanted) or self._open(wanted)
        except RefusedError as refusal:
            await connection.close(refusal.close_code, close_reason(refusal))
            return
        await stream.serve(connection)

    def _find(self, wanted: Wanted) -> Stream | None:
        """The client's stream; None if a new one may be opened. Raises RefusedError."""
        assert self.pipeline is not None
        if (stream := self._streams.get(wanted.id)) is not None:
            if wanted.source not in ("", stream.config.name):
                line = f"this id is of source '{stream.config.name}'; draw another id"
                raise RefusedError(line, HTTPStatus.CONFLICT)
            return stream
        wanted.config(free_name="stream")
        if wanted.source in self.pipeline.sources:
            line = f"source '{wanted.source}' is there already; choose another name, or send its id"
            raise RefusedError(line, HTTPStatus.CONFLICT)
        if len(self._streams) >= self.max_streams:
            retry_s = self._next_room_s()
            line = f"full: {len(self._streams)} of {self.max_streams} streams"
            self._complain(line)
            raise RefusedError(
                f"{line}; try again in {retry_s} s",
                HTTPStatus.SERVICE_UNAVAILABLE,
                retry_after_s=retry_s,
            )
        return None

    def _next_room_s(self) -> int:
        """Seconds until the first stream that waits for its client is given up."""
        now = asyncio.get_running_loop().time()
        waits = [one.waits_until for one in self._streams.values() if one.waits_until is not None]
        return max(1, round(min(waits) - now)) if waits else RETRY_S

    def _open(self, wanted: Wanted) -> Stream:
        """Open a stream, a new one or that of a service that was killed. Raises RefusedError."""
        assert self.pipeline is not None
        saved = self._saved(wanted)
        config = saved.config if saved else wanted.config(free_name=self._free_name())
        source = PushSource(
            config.name, chunk_ms=config.chunk_ms, on_status=partial(self._report, config.name)
        )
        try:
            recognising = self.pipeline.add(config, source)
        except ConfigError as error:
            status = HTTPStatus.SERVICE_UNAVAILABLE
            raise RefusedError(str(error), status, retry_after_s=RETRY_S) from None
        stream = Stream(
            wanted.id or secrets.token_urlsafe(12),
            config,
            source,
            resume_s=self._config.resume_s,
            on_over=self._forget,
            ends=saved.ends if saved else None,
        )
        self._streams[stream.id] = stream
        if self._checkpoints is not None:
            self._go_on(stream, self._checkpoints, is_saved=saved is not None)
        recognising.add_done_callback(lambda _: stream.finish())
        return stream

    def _saved(self, wanted: Wanted) -> SavedStream | None:
        """What an earlier service has kept under the client's id, under a name that is free."""
        assert self.pipeline is not None
        if not wanted.id or self._checkpoints is None:
            return None
        saved = self._checkpoints.load_stream(wanted.id)
        if saved is None or wanted.source not in ("", saved.config.name):
            return None
        changed = {"speaker": wanted.speaker} if wanted.speaker else {}
        if saved.config.name in self.pipeline.sources:
            changed["name"] = self._free_name()
        return saved.model_copy(update={"config": saved.config.model_copy(update=changed)})

    def _go_on(self, stream: Stream, checkpoints: Checkpoints, *, is_saved: bool) -> None:
        """Go on with the dialogue of a stream that was kept, and keep the stream from now on."""
        assert self.pipeline is not None
        if is_saved:
            found = checkpoints.load_dialogue(stream.id, stream.config, self._recognizer)
            if found is not None:
                dialogue, later_s = found
                self.pipeline.resume_dialogue(stream.config.name, dialogue, later_s=later_s)
        kept = SavedStream(config=stream.config, ends=stream.unacknowledged)
        checkpoints.save_stream(stream.id, kept, privacy=self._recognizer.config.privacy)

    def _forget(self, stream: Stream) -> None:
        del self._streams[stream.id]
        if self._checkpoints is not None and not stream.may_return:
            name = stream.config.dialogue
            shared = any(name and other.config.dialogue == name for other in self._streams.values())
            self._checkpoints.forget(stream.id, stream.config, shared=shared)

    def _free_name(self) -> str:
        """The first name that no source has: few topics and metrics, whoever comes and goes."""
        assert self.pipeline is not None
        taken = self.pipeline.sources
        return next(name for n in range(1, len(taken) + 2) if (name := f"stream-{n}") not in taken)

    def _report(self, source: str, state: str, line: str) -> None:
        assert self.pipeline is not None
        self.pipeline.report_capture(state, line, source=source)  # type: ignore[arg-type]

    def _complain(self, line: str) -> None:
        now = time.monotonic()
        if now >= self._complain_at:
            self._complain_at = now + COMPLAIN_EVERY_S
            LOG.warning("serve: %s; others are refused for now", line)


def _tls(config: ServeConfig) -> ssl.SSLContext | None:
    """The TLS settings, if there is a certificate. Raises ConfigError for an unusable one."""
    if config.certificate is None:
        if config.key is not None:
            raise ConfigError("serve.key: it needs serve.certificate")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.certificate, config.key, password=lambda: "")
    except (OSError, ValueError) as error:  # of a missing file, or of one that holds none
        reason = plain_reason(error) if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"serve.certificate: {config.certificate} can't be used ({reason}); give a certificate "
            "and its key, without a password, as PEM files"
        ) from None
    return context
