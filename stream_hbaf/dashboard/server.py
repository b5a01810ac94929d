"""The dashboard's HTTP server: sends events to all open pages, and carries out their requests.

/                     the page and its files
/events               WebSocket: a snapshot, then each event; requests and responses
/microphone/SOURCE    WebSocket: the audio of a browser's microphone, in ``audio.websocket``
/recordings           recorded sessions: the list, the events, the audio
"""

import asyncio
import contextlib
import errno
import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote

from aiohttp import WSCloseCode, WSMsgType, web
from pydantic import ValidationError

from stream_hbaf.audio.push_source import IDLE_S as SENDER_IDLE_S
from stream_hbaf.audio.push_source import (
    AlreadySendingError,
    PushSource,
)
from stream_hbaf.audio.source import OnStatus
from stream_hbaf.audio.websocket import (
    LARGEST_MESSAGE,
    RULE_BROKEN,
    TRY_LATER,
    close_reason,
    receive,
)
from stream_hbaf.config import DashboardConfig, SourceConfig
from stream_hbaf.dashboard.access import AccessControl
from stream_hbaf.dashboard.feed import LatestEvents, PageQueue, Recordings
from stream_hbaf.dashboard.http_server import HttpServer
from stream_hbaf.errors import AudioError, ConfigError, CorpusError, StreamHbafError
from stream_hbaf.events import (
    AnyEvent,
    Event,
    Feedback,
    Info,
    Level,
    Partial,
    Request,
    Response,
    Switch,
)
from stream_hbaf.publish.messages import event_message
from stream_hbaf.publish.requests import Control

PAGE = Path(__file__).parent / "page"
TOKEN_ADVICE = "open the address that stream-hbaf printed: it holds the token"
MAX_PAGES = 32
MAX_REQUEST = 1 << 14  # bytes
HEARTBEAT_S = 20.0  # between two pings of a page
PRIVATE = {"Cache-Control": "no-store"}  # transcripts and audio stay out of the browser's cache

LOG = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Dashboard:
    """A publisher that sends events to web pages.

    ``control`` carries out the requests of pages; without it they are refused. ``sessions`` is the
    folder of recorded sessions. ``info`` and ``control`` may be set later, but before ``start``:
    a browser's microphone is a source, and sources are opened before the model is loaded.
    """

    def __init__(
        self,
        config: DashboardConfig,
        *,
        info: Info | None = None,
        control: Control | None = None,
        sessions: Path | None = None,
    ) -> None:
        self.info = info
        self.control = control
        self._recordings = Recordings(sessions)
        self._access = AccessControl(config, advice=TOKEN_ADVICE)
        self._latest = LatestEvents()
        self._pages: dict[web.WebSocketResponse, PageQueue] = {}
        self._microphones: dict[str, PushSource] = {}
        self._server = HttpServer(self._application(), section="dashboard", config=config)

    @property
    def address(self) -> str:
        """The page's URL, with the token if one is needed."""
        token = f"?token={quote(self._access.token, safe='')}" if self._access.token else ""
        return f"http://{self._server.address}/{token}"

    async def start(self) -> None:
        """Open the port. Raises ConfigError if it can't be opened."""
        assert self.info is not None
        await self._server.start()

    def microphone(self, source: SourceConfig, *, on_status: OnStatus) -> PushSource:
        """A source whose audio comes from the microphone of a browser with an open page."""
        found = PushSource(
            source.name, channel=source.channel, chunk_ms=source.chunk_ms, on_status=on_status
        )
        self._microphones[source.name] = found
        self._send_snapshots()
        return found

    async def send(self, event: AnyEvent) -> None:
        """Queue an event for every page; never waits."""
        if isinstance(event, Info):
            gone = self.info is not None and {*self.info.sources} - {*event.sources}
            self.info = event
            if gone:
                self._latest.add(event, event_message(event))
                self._send_snapshots()
        # The next level or partial replaces the one before.
        self._send(event, droppable=isinstance(event, Level | Partial))

    async def run(self) -> None:
        """Wait until cancelled: each page has its own task."""
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        """Close the connections of all pages, and the port."""
        code = WSCloseCode.GOING_AWAY
        leaving = [page.close(code=code, message=b"stopped") for page in self._pages]
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*leaving)
        except TimeoutError:
            LOG.debug("a page did not close its connection in time")
        await self._server.close()

    async def forget(self, dialogue_id: str) -> int:
        """Erase a dialogue here and on all pages; returns how many utterances were erased."""
        erased = self._latest.forget(dialogue_id)
        self._send_snapshots()
        return erased

    def _send(self, event: Event, *, droppable: bool = False) -> None:
        message = event_message(event)
        self._latest.add(event, message)
        for queue in self._pages.values():
            queue.put(message, droppable=droppable)

    def _send_snapshots(self) -> None:
        for queue in self._pages.values():
            queue.request_snapshot()

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[self._check_access], client_max_size=MAX_REQUEST)
        application.add_routes(
            [
                web.get("/", self._index),
                web.get("/events", self._serve_page),
                web.get("/microphone/{source}", self._receive_audio),
                web.get("/recordings", self._list_recordings),
                web.get("/recordings/{name}", self._send_recording),
                web.get("/recordings/{name}/{source}.flac", self._send_audio),
                web.static("/", PAGE),
            ]
        )
        return application

    @web.middleware
    async def _check_access(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Middleware for every request, WebSockets included."""
        token = request.query.get("token", "") if request.path == "/" else ""
        cookie = f"stream_hbaf_{self._server.port}"  # cookies are shared between ports
        refusal = self._access.refuse(
            host=request.host,
            origin=request.headers.get("Origin"),
            token=token or unquote(request.cookies.get(cookie, "")),
        )
        if refusal is not None:
            return refusal
        self._server.establish(request)
        if token:  # moved from the address, which the browser shows and stores, to the cookie
            moved = web.Response(status=303, headers={"Location": "/"})
            moved.set_cookie(cookie, quote(token), httponly=True, samesite="Lax", path="/")
            return moved
        try:
            return await handler(request)
        except CorpusError as error:  # no such recording
            raise web.HTTPNotFound(text=f"{error}\n") from None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # of a file of the page
                raise
            raise web.HTTPNotFound from None

    async def _index(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(PAGE / "index.html")

    async def _serve_page(self, request: web.Request) -> web.StreamResponse:
        if len(self._pages) >= MAX_PAGES:
            raise web.HTTPServiceUnavailable(text="too many pages are open; close some\n")
        page = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S, max_msg_size=MAX_REQUEST, compress=False
        )
        await _open(page, request)
        queue = self._pages[page] = PageQueue()
        sending = asyncio.create_task(self._send_queued(page, queue))
        try:
            async for received in page:
                if received.type is WSMsgType.TEXT:
                    # Sent directly, not queued: a page that doesn't read gets no further answers.
                    await page.send_str(event_message(await self._answer(received.data)))
        except ConnectionError:
            pass  # the page was closed
        finally:
            del self._pages[page]
            sending.cancel()
        return page

    async def _send_queued(self, page: web.WebSocketResponse, queue: PageQueue) -> None:
        with contextlib.suppress(ConnectionError):  # the page was closed: ``_serve_page`` ends
            while True:
                message = await queue.next()
                await page.send_str(message or self._snapshot())

    def _snapshot(self) -> str:
        """The recogniser, what pages may request, and the events until now."""
        assert self.info is not None  # since ``start``
        about = {
            "event": "snapshot",
            "info": self.info.model_dump(by_alias=True),
            "microphones": list(self._microphones),
            "recordings": self._recordings.folder is not None,
            "control": self.control is not None,
        }
        head = json.dumps(about, ensure_ascii=False)
        return f'{head[:-1]},"history":[{",".join(self._latest.messages())}]}}'

    async def _answer(self, text: str) -> Response:
        """Carry out a page's request; one that fails has a response with the reason."""
        try:
            request = Request.model_validate_json(text)
        except ValidationError:
            return Response(command="", status="error", error="a request is JSON with a 'command'")
        respond = partial(Response, command=request.command, transaction=request.transaction)
        try:
            if self.control is None:
                raise ConfigError("requests are refused; this page only shows")
            if request.command == "correct":
                feedback = Feedback.model_validate(request.arguments)
                await self.control.correct(feedback)
                for name in feedback.corrects.split():  # each replaces an earlier one of its kind
                    other = {"label": "speaker", "speaker": "label"}[name]
                    self._send(feedback.model_copy(update={other: ""}))
            elif request.command == "set_switch":
                switch = Switch.model_validate(request.arguments)
                await self.control.set_switch(switch.source, switch=switch.switch, on=switch.on)
            else:
                return await self.control.answer(request)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            reason = f"{request.command}: {where}: {first['msg'].lower()}"
            return respond(status="error", error=reason)
        except StreamHbafError as error:
            return respond(status="error", error=" ".join(str(error).split()))
        return respond(status="ok")

    async def _list_recordings(self, request: web.Request) -> web.StreamResponse:
        summaries = await asyncio.to_thread(self._recordings.summaries)
        return web.json_response(summaries, headers=PRIVATE)

    async def _send_recording(self, request: web.Request) -> web.StreamResponse:
        session = await asyncio.to_thread(self._recordings.session, request.match_info["name"])
        return web.Response(text=session, content_type="application/json", headers=PRIVATE)

    async def _send_audio(self, request: web.Request) -> web.StreamResponse:
        """An audio file, or a range of it."""
        path = await asyncio.to_thread(self._recordings.audio, **request.match_info)
        return web.FileResponse(path, headers={"Content-Type": "audio/flac", **PRIVATE})

    async def _receive_audio(self, request: web.Request) -> web.StreamResponse:
        source = self._microphones.get(request.match_info["source"])
        if source is None:
            raise web.HTTPNotFound(text="no source here is a browser's microphone\n")
        browser = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S,
            receive_timeout=SENDER_IDLE_S,
            max_msg_size=2 * LARGEST_MESSAGE,
            compress=False,
        )
        await _open(browser, request)
        try:
            with source.sender("the page") as sender:
                async for message in browser:
                    if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                        receive(message.data, sender=sender)
        except TimeoutError:
            await browser.close(code=RULE_BROKEN, message=b"nothing came")
        except AudioError as error:
            code = TRY_LATER if isinstance(error, AlreadySendingError) else RULE_BROKEN
            await browser.close(code=code, message=close_reason(error).encode())
        return browser


async def _open(socket: web.WebSocketResponse, request: web.Request) -> None:
    """Answer a WebSocket's handshake."""
    try:
        await socket.prepare(request)
    except ValueError:  # which aiohttp raises for a key that isn't ASCII
        raise web.HTTPBadRequest(text="a WebSocket's key that is none\n") from None
