"""The page's server: tells every page that is open what happens, and does what pages ask for.

/                     the page, and its files beside it
/events               WebSocket: a welcome, then each event; wishes the other way
/microphone/SOURCE    WebSocket: a browser's sound, in the form of ``audio.wire``
/recordings           sessions that were recorded, their events and their sound
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from aiohttp import WSCloseCode, WSMsgType, web
from pydantic import ValidationError

from stream_hbaf.audio.push_source import (
    Address,
    AlreadySendingError,
    PushSource,
    plain_reason,
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
from stream_hbaf.dashboard.access import HEADERS, Gate
from stream_hbaf.dashboard.feed import History, PageQueue, is_droppable, welcome, written
from stream_hbaf.dashboard.recordings import Shelf
from stream_hbaf.errors import AudioError, ConfigError, CorpusError, StreamHbafError
from stream_hbaf.events import AnyEvent, Event, Feedback, Info, Request, Response, Switch
from stream_hbaf.publish.requests import Control

PAGE = Path(__file__).parent / "page"
EVERYWHERE = ("0.0.0.0", "::")  # to listen on; nobody can go there
PAGES_AT_ONCE = 32
LARGEST_WISH = 1 << 14  # bytes
ALIVE_S = 20.0  # between two pings of a page
PRIVATE = {"Cache-Control": "no-store"}  # words and voices stay out of the browser's cache

LOG = logging.getLogger(__name__)

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Dashboard:
    """A publisher whose readers are web pages.

    ``control`` does what pages ask for; without one they are told that nobody does. ``sessions``
    is the folder that recordings are in. ``info`` and ``control`` may be set until ``start``: a
    browser's microphone is a source, and sources are there before the model is.
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
        self._config = config
        self._shelf = Shelf(sessions)
        self._has_recordings = sessions is not None
        self._gate = Gate(config)
        self._history = History()
        self._pages: dict[web.WebSocketResponse, PageQueue] = {}
        self._microphones: dict[str, PushSource] = {}
        self._runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=1)
        self._port = config.port

    @property
    def address(self) -> str:
        """Where the page is; with the token, if it needs one."""
        host = self._config.host
        if host in EVERYWHERE:
            host = socket.gethostname()
        token = f"?token={quote(self._gate.token, safe='')}" if self._gate.token else ""
        return f"http://{Address(host, self._port)}/{token}"

    async def start(self) -> None:
        """Open the port. Raises ConfigError if that can't be."""
        assert self.info is not None
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._config.host, self._config.port)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            where = Address(self._config.host, self._config.port)
            raise ConfigError(
                f"dashboard: can't listen on {where} ({plain_reason(error)}); choose another "
                "dashboard.port, or end the program that uses it"
            ) from None
        self._port = self._runner.addresses[0][1]

    def microphone(self, source: SourceConfig, *, on_status: OnStatus) -> PushSource:
        """A source whose sound comes from a browser that has the page open."""
        found = PushSource(
            source.name, channel=source.channel, chunk_ms=source.chunk_ms, on_status=on_status
        )
        self._microphones[source.name] = found
        self._welcome_all()
        return found

    async def send(self, event: AnyEvent) -> None:
        """Tell every page; never waits."""
        if isinstance(event, Info):
            self.info = event
        self._tell(event, droppable=is_droppable(event))

    async def run(self) -> None:
        """Nothing to carry: each page's own task does that."""
        await asyncio.Event().wait()

    async def close(self, timeout_s: float) -> None:
        """Say goodbye to all pages and close the port."""
        leaving = [
            page.close(code=WSCloseCode.GOING_AWAY, message=b"stopped") for page in self._pages
        ]
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*leaving)
        except TimeoutError:
            LOG.debug("a page did not say goodbye in time")
        await self._runner.cleanup()

    async def forget(self, dialogue_id: str) -> int:
        """Erase a dialogue here and on all pages; returns how many utterances that were."""
        erased = self._history.forget(dialogue_id)
        self._welcome_all()
        return erased

    def _tell(self, event: Event, *, droppable: bool = False) -> None:
        message = written(event)
        self._history.add(event, message)
        for queue in self._pages.values():
            queue.put(message, droppable=droppable)

    def _welcome_all(self) -> None:
        for queue in self._pages.values():
            queue.welcome()

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[self._guard], client_max_size=LARGEST_WISH)
        application.on_response_prepare.append(_add_headers)
        application.add_routes(
            [
                web.get("/", self._index),
                web.get("/events", self._serve_page),
                web.get("/microphone/{source}", self._listen_to),
                web.get("/recordings", self._list_recordings),
                web.get("/recordings/{name}", self._tell_recording),
                web.get("/recordings/{name}/{source}.flac", self._play_recording),
                web.static("/", PAGE),
            ]
        )
        return application

    @web.middleware
    async def _guard(self, request: web.Request, handler: Answer) -> web.StreamResponse:
        """Every request passes here, WebSockets included."""
        given = request.query.get("token", "") if request.path == "/" else ""
        refusal = self._gate.refusal(
            host=request.host,
            origin=request.headers.get("Origin"),
            token=given or unquote(request.cookies.get(self._cookie, "")),
        )
        if refusal is not None:
            return web.Response(status=refusal.status, text=f"stream-hbaf: {refusal.line}\n")
        return self._take_token(given) if given else await handler(request)

    @property
    def _cookie(self) -> str:
        return f"stream_hbaf_{self._port}"  # cookies don't tell ports apart

    def _take_token(self, token: str) -> web.StreamResponse:
        """The token moves from the address, which is shown and remembered, to a cookie."""
        moved = web.Response(status=303, headers={"Location": "/"})
        moved.set_cookie(self._cookie, quote(token), httponly=True, samesite="Lax", path="/")
        return moved

    async def _index(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(PAGE / "index.html")

    async def _serve_page(self, request: web.Request) -> web.StreamResponse:
        if len(self._pages) >= PAGES_AT_ONCE:
            raise web.HTTPServiceUnavailable(text="too many pages are open; close some\n")
        page = web.WebSocketResponse(heartbeat=ALIVE_S, max_msg_size=LARGEST_WISH, compress=False)
        await page.prepare(request)
        queue = self._pages[page] = PageQueue()
        telling = asyncio.create_task(self._keep_told(page, queue))
        try:
            async for wish in page:
                if wish.type is WSMsgType.TEXT:
                    # Not by the queue: who doesn't read answers is asked for no more wishes.
                    await page.send_str(written(await self._grant(wish.data)))
        except ConnectionError:
            pass  # it has left
        finally:
            del self._pages[page]
            telling.cancel()
        return page

    async def _keep_told(self, page: web.WebSocketResponse, queue: PageQueue) -> None:
        try:
            while True:
                message = await queue.next()
                if message is None:
                    message = welcome(self._introduction(), self._history)
                await page.send_str(message)
        except ConnectionError:
            pass  # it has left; ``_serve_page`` hears of it, too

    def _introduction(self) -> dict[str, Any]:
        assert self.info is not None  # since ``start``
        return {
            "info": self.info.model_dump(by_alias=True),
            "microphones": list(self._microphones),
            "recordings": self._has_recordings,
            "control": self.control is not None,
        }

    async def _grant(self, text: str) -> Response:
        """What comes of a page's wish; what can't be done is an answer, too."""
        try:
            wish = Request.model_validate_json(text)
        except ValidationError:
            return Response(command="", status="error", error="not a wish: JSON with a 'command'")
        try:
            if self.control is None:
                raise ConfigError("nobody here does what is asked for; this page only shows")
            return await self._ask(self.control, wish)
        except ValidationError as error:
            first = error.errors()[0]
            why = f"{wish.command}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        except StreamHbafError as error:
            why = " ".join(str(error).split())
        return Response(
            command=wish.command, status="error", error=why, transaction=wish.transaction
        )

    async def _ask(self, control: Control, wish: Request) -> Response:
        if wish.command == "correct":
            feedback = Feedback.model_validate(wish.arguments)
            await control.correct(feedback)
            self._tell(feedback)
        elif wish.command == "set_switch":
            wanted = Switch.model_validate(wish.arguments)
            await control.set_switch(wanted.source, switch=wanted.switch, on=wanted.on)
        else:
            return await control.answer(wish)
        return Response(command=wish.command, status="ok", transaction=wish.transaction)

    async def _list_recordings(self, request: web.Request) -> web.StreamResponse:
        titles = await asyncio.to_thread(self._shelf.titles)
        return web.json_response(titles, headers=PRIVATE)

    async def _tell_recording(self, request: web.Request) -> web.StreamResponse:
        try:
            story = await asyncio.to_thread(self._shelf.story, request.match_info["name"])
        except CorpusError as error:
            raise web.HTTPNotFound(text=f"{error}\n") from None
        return web.Response(text=story, content_type="application/json", headers=PRIVATE)

    async def _play_recording(self, request: web.Request) -> web.StreamResponse:
        """Any part of it: players ask for ranges."""
        name, source = request.match_info["name"], request.match_info["source"]
        try:
            path = await asyncio.to_thread(self._shelf.sound, name, source)
        except CorpusError as error:
            raise web.HTTPNotFound(text=f"{error}\n") from None
        return web.FileResponse(path, headers={"Content-Type": "audio/flac", **PRIVATE})

    async def _listen_to(self, request: web.Request) -> web.StreamResponse:
        source = self._microphones.get(request.match_info["source"])
        if source is None:
            raise web.HTTPNotFound(text="no source here is a browser's microphone\n")
        browser = web.WebSocketResponse(
            heartbeat=ALIVE_S, max_msg_size=2 * LARGEST_MESSAGE, compress=False
        )
        await browser.prepare(request)
        try:
            with source.sender("the page") as sender:
                async for message in browser:
                    if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                        receive(message.data, sender=sender)
        except AlreadySendingError as error:
            await browser.close(code=TRY_LATER, message=close_reason(error).encode())
        except AudioError as error:
            await browser.close(code=RULE_BROKEN, message=close_reason(error).encode())
        return browser


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
    # A page of an older version with modules of a newer one would break.
    response.headers.setdefault("Cache-Control", "no-cache")
