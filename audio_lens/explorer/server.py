"""The explorer as a page on this machine: bound to loopback, behind a token in its address."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib.util
import json
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from audio_lens.arguments import whole
from audio_lens.errors import ExtraError, InputError
from audio_lens.explorer import markup
from audio_lens.explorer.clips import MOST_BYTES
from audio_lens.explorer.desk import Desk
from audio_lens.explorer.session import Session
from audio_lens.explorer.worker import Event, Job

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from uvicorn import Server

LOOPBACK = "127.0.0.1"
MOST_BODY = 3 * MOST_BYTES  # two clips in base64, and what is done to them
PATIENCE_S = 1  # for what is under way when the server stops
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def check_installed() -> None:
    """Raise now where the explorer could not be served later.

    Raises:
        ExtraError: naming what is missing.
    """
    for name in ("starlette", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise _lacking(name)


def application(desk: Desk, token: str, port: int) -> Starlette:
    """The page and its messages under ``/token/``; nothing else is served."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    pages = _Pages(desk, port)
    routes = [
        Route(f"/{token}/", pages.page, methods=["GET"]),
        Route(f"/{token}/do", pages.do, methods=["POST"]),
        Route(f"/{token}/clip", pages.clip, methods=["POST"]),
    ]
    app = Starlette(routes=routes)
    app.router.redirect_slashes = False
    app.add_middleware(_Guard, token=token, port=port)
    return app


class _Guard:
    """Lets through who knows the token and asks this machine by its own name."""

    def __init__(self, app: Any, token: str, port: int):
        self.app, self.token = app, token
        self.hosts = [f"{name}:{port}" for name in (LOOPBACK, "localhost")]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and self._may_pass(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})

    def _may_pass(self, scope: Any) -> bool:
        hosts, origins = (
            [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]
            for wanted in (b"host", b"origin")
        )
        given = scope["path"].split("/")[1] if scope["path"].startswith("/") else ""
        return (
            len(hosts) == 1
            and hosts[0] in self.hosts
            and all(origin in [f"http://{host}" for host in self.hosts] for origin in origins)
            and hmac.compare_digest(given.encode(), self.token.encode())
        )


class _Pages:
    """What is answered to who was let through."""

    def __init__(self, desk: Desk, port: int):
        self.desk, self.port = desk, port

    async def page(self, request: Request) -> Response:
        from starlette.responses import HTMLResponse

        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; "
            "img-src data: blob:; connect-src 'self'; form-action 'none'; base-uri 'none'; "
            "frame-ancestors 'none'"
        )
        headers = HEADERS | {"Content-Security-Policy": policy}
        return HTMLResponse(markup.page(nonce), headers=headers)

    async def do(self, request: Request) -> Response:
        body = await _body(request, MOST_BODY)
        if body is None:
            return _refused(413, f"a message has at most {MOST_BODY / 1e6:.0f} MB")
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            return _refused(400, "a message is JSON")
        return self._answered(request, message, None)

    async def clip(self, request: Request) -> Response:
        body = await _body(request, MOST_BYTES)
        if body is None:
            return _refused(413, f"a clip has at most {MOST_BYTES / 1e6:.0f} MB")
        return self._answered(request, dict(request.query_params) | {"do": "clip"}, body)

    def _answered(self, request: Request, message: Any, content: bytes | None) -> Response:
        """Events, a line of JSON each, as they come."""
        from starlette.responses import StreamingResponse

        events: asyncio.Queue[Event | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def reply(event: Event | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            job = self.desk.ask(message, reply, content)
        except InputError as error:
            return _refused(400, str(error))
        lines = _lines(events, job)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers=HEADERS)


async def _lines(events: asyncio.Queue[Event | None], job: Job) -> AsyncIterator[str]:
    try:
        while (event := await events.get()) is not None:
            yield json.dumps(event, allow_nan=False) + "\n"
    finally:
        job.is_cancelled = True  # whoever asked is gone, or has it all


async def _body(request: Request, most: int) -> bytes | None:
    """What was sent; None if it is too much."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            return None
        parts.append(part)
    return b"".join(parts)


def _refused(status: int, message: str) -> Response:
    from starlette.responses import Response

    line = json.dumps({"event": "error", "message": message}) + "\n"
    return Response(line, status, HEADERS, "application/x-ndjson")


# -------------------------------------------------------------------------------- running


class Explorer:
    """A server with its address, not yet running.

    Args:
        start: what every tab starts with.
        port: where; 0 takes a free one.

    Raises:
        InputError: a port that is taken or none.
        ExtraError: without Starlette and uvicorn.
    """

    def __init__(self, start: Session, port: int = 0):
        check_installed()
        import uvicorn

        self._socket = _bound(whole("port", port, least=0, most=65_535))
        self.port = int(self._socket.getsockname()[1])
        self.token = secrets.token_urlsafe(24)
        self.desk = Desk(start)
        app = application(self.desk, self.token, self.port)
        config = uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            lifespan="off",
            server_header=False,
            ws="none",
            limit_concurrency=200,
            timeout_graceful_shutdown=PATIENCE_S,
        )
        self._server: Server = uvicorn.Server(config)

    @property
    def address(self) -> str:
        """Where the page is; whoever has it may use the model."""
        return f"http://{LOOPBACK}:{self.port}/{self.token}/"

    def serve(self) -> None:
        """Serve until Ctrl-C."""
        self._server.run(sockets=[self._socket])

    @contextmanager
    def running(self) -> Iterator[str]:
        """Serve from another thread inside a ``with`` block; gives the address."""
        thread = threading.Thread(target=self.serve, daemon=True)
        thread.start()
        try:
            yield self.address
        finally:
            self._server.should_exit = True
            thread.join(2 * PATIENCE_S + 5)


def serve(start: Session, port: int = 0, on_start: Callable[[str], Any] = lambda at: None) -> None:
    """Serve the explorer on this machine until Ctrl-C.

    Args:
        start: what every tab starts with.
        port: where; 0 takes a free one.
        on_start: called with the address of the page before it is served.

    Raises:
        InputError, ExtraError: as `Explorer`.
    """
    explorer = Explorer(start, port)
    on_start(explorer.address)
    with contextlib.suppress(KeyboardInterrupt):
        explorer.serve()


def _bound(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, port))
        listening.listen()
    except OSError as error:
        listening.close()
        raise InputError(
            f"port {port} cannot be used ({error.strerror}): name another, or none for a free one"
        ) from error
    return listening


def _lacking(what: str) -> ExtraError:
    return ExtraError(f"the explorer needs {what}: pip install 'audio_lens[explore]'")
