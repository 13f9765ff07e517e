"""The server behind `flowrl feedback`: three files and three calls, on a port of this machine.

Invariants:
- a call without the run's token is refused, compared in constant time;
- the token stands in the URL behind `#`, which no browser sends;
- whoever comes by another name than the page was opened for is refused, so that no site which has its own name lead
  here reaches it (DNS rebinding);
- a body has at most `MOST_BYTES` and arrives within `BODY_S`, and at most `MOST_CONNECTIONS` and a few are open;
- what answers hold becomes text and the few tags of Markdown, without links or pictures;
- the page's policy lets no other script run and nothing be fetched from elsewhere;
- a judgment is acknowledged after it is on the disk;
- the token outlives the process, so that a page whose server was killed goes on with the next one.

Tests: tests/contracts/test_feedback_page.py
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import secrets
import socket
import time
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from flowrl.data.judgments import JUDGMENTS, Judgment, JudgmentFile
from flowrl.errors import ConfigError, ResourceError
from flowrl.runs.feedback.questions import Questions
from flowrl.telemetry.files import read_file, replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from aiohttp import web

    from flowrl.data.judgments import Question, Way

MOST_BYTES = 1 << 20  # of a request
BODY_S = 30.0  # for a request's body to arrive
MOST_CONNECTIONS = 64
BACKLOG = 8  # accepted at once, before any of them is counted
MOST_SHOWN = 20_000  # characters of a prompt or an answer
TOKEN = "feedback.token"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
EVERYWHERE = ("0.0.0.0", "::", "")  # what is listened on is the user's to say
MOST_NAME = 100  # characters of a name that are repeated
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Names(msgspec.Struct, frozen=True):
    """The names by which a page may be asked for."""

    host: str  # that it listens on
    others: list[str] = []  # of a proxy before it, say

    def hold(self, header: str) -> bool:
        """Return whether a request's Host header, whatever its port, is one of them.

        An address is this machine's own or that of a tunnel's end: no other site's name leads to it.
        """
        try:
            name = (urlsplit(f"//{header.strip()}").hostname or "").rstrip(".")
        except ValueError:
            return False
        known = [*LOOPBACK, self.host, *self.others]
        if self.host in EVERYWHERE:
            known.append(socket.gethostname())
            with contextlib.suppress(ValueError):
                return bool(ipaddress.ip_address(name))
        return bool(name) and name in [each.lower().rstrip(".") for each in known]


class Rater(msgspec.Struct, frozen=True):
    """Who asks; and which question is to be shown again."""

    rater: str
    question: str = ""


class Page:
    """Answers the page's calls."""

    def __init__(self, run_dir: Path, asked: Questions, judgments: JudgmentFile, token: str, names: Names) -> None:
        from markdown_it import MarkdownIt

        self._run_dir = run_dir
        self._asked = asked
        self._judgments = judgments
        self._token = token.encode()
        self._names = names
        hidden = ["image", "link", "autolink", "reference"]
        self._markdown = MarkdownIt("js-default", {"html": False, "linkify": False}).disable(hidden)

    def application(self) -> web.Application:
        """Return what aiohttp serves."""
        from aiohttp import web

        @web.middleware
        async def guard(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
            try:
                if not self._names.hold(request.headers.get("Host", "")):
                    text = f"this page is not opened for {request.headers.get('Host', '')[:MOST_NAME]!r}; give --name"
                    raise web.HTTPMisdirectedRequest(text=text)
                if request.path.startswith("/api/"):
                    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
                    if not hmac.compare_digest(given.encode(errors="replace"), self._token):
                        raise web.HTTPUnauthorized(text="open the page with the address that flowrl feedback says")
                response: web.StreamResponse = await handler(request)
            except web.HTTPException as error:
                response = web.json_response({"error": error.text or error.reason}, status=error.status)
            response.headers.update(HEADERS)
            return response

        application = web.Application(middlewares=[guard], client_max_size=MOST_BYTES)
        for path in FILES:
            application.router.add_get(path, self._file)
        application.router.add_post("/api/next", self._next)
        application.router.add_post("/api/judge", self._judge)
        return application

    async def _file(self, request: web.Request) -> web.Response:
        from aiohttp import web

        name, kind = FILES[request.path]
        body = files("flowrl.runs.feedback").joinpath(name).read_text()
        return web.Response(text=body, content_type=kind, charset="utf-8")

    async def _next(self, request: web.Request) -> web.Response:
        """Return a question for a rater, a certain one where it is named, and how far it is."""
        asking = await _read(request, Rater)
        self._asked.look()
        said = self._judgments.said
        if asking.question:
            found = self._asked.questions.get(asking.question)
            shown = None if found is None else self._shown(found, "", asking.rater)
        else:
            offered = self._asked.next(asking.rater, said, time.monotonic())
            shown = None if offered is None else self._shown(offered.question, offered.why, asking.rater)
        return self._said({"question": shown, "run": self._run_dir.name}, asking.rater)

    async def _judge(self, request: web.Request) -> web.Response:
        """Write a judgment down."""
        from aiohttp import web

        judgment = await _read(request, Judgment)
        self._asked.look()
        question = self._asked.questions.get(judgment.question)
        if question is None:
            raise web.HTTPNotFound(text="this run has asked no such question")
        if fault := judgment.fault(question):
            raise web.HTTPBadRequest(text=fault)
        try:
            is_new = self._judgments.add(judgment)  # a few bytes: the loop waits for the disk, and order is kept
        except OSError as error:
            text = f"not saved: {error.strerror}; the page keeps it and tries again"
            raise web.HTTPInsufficientStorage(text=text) from error
        counts = bool(self._asked.node) and judgment.question not in self._asked.closed
        return self._said({"saved": True, "again": not is_new, "counts": counts}, judgment.rater)

    def _said(self, answer: dict[str, Any], rater: str) -> web.Response:
        from aiohttp import web

        answer["progress"] = self._asked.progress(rater, self._judgments.said)
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    def _shown(self, question: Question, why: str, rater: str) -> dict[str, Any]:
        others = [each for each in self._judgments.said.of(question.id) if each.rater != rater]
        messages = question.prompt if isinstance(question.prompt, list) else [{"content": question.prompt}]
        return {
            "id": question.id,
            "way": question.way,
            "why": why,
            "version": question.version,
            "group": question.group,
            "others": len(others),
            "prompt": [
                {"role": str(each.get("role", "")), "html": self._html(str(each.get("content") or ""))}
                for each in messages
            ],
            "answers": [{"html": self._html(answer), "text": answer} for answer in question.answers],
        }

    def _html(self, text: str) -> str:
        left_out = len(text) - MOST_SHOWN
        shown = text if left_out <= 0 else f"{text[:MOST_SHOWN]}\n\n[... {left_out} characters left out]"
        return self._markdown.render(shown)


async def _read(request: web.Request, kind: Any) -> Any:
    from aiohttp import web

    try:
        async with asyncio.timeout(BODY_S):
            body = await request.read()
        return msgspec.json.decode(body, type=kind)
    except TimeoutError as error:  # who sends no more would hold one of the connections for good
        raise web.HTTPRequestTimeout(text=f"the request did not arrive within {BODY_S:g} s") from error
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise web.HTTPBadRequest(text=f"cannot be read: {error}") from error


def serve(
    run_dir: Path, *, host: str, port: int, way: Way, say: Callable[[str], None], names: Sequence[str] = ()
) -> None:
    """Serve the page until it is interrupted, to whoever asks for `host`, this machine or one of `names`.

    Raises:
        ConfigError: there is no run, nothing to judge, or another process serves it.
        ResourceError: the port cannot be had.
    """
    asked = Questions(run_dir, way=way)
    if notice := asked.check():
        say(notice)
    judgments = JudgmentFile(run_dir / JUDGMENTS, now=time.time)
    try:
        token = token_of(run_dir)
        page = Page(run_dir, asked, judgments, token, Names(host, [*names]))
        asyncio.run(_serve(page, host, port, token, say))
    except KeyboardInterrupt:
        say("stopped: what was said is in " + str(run_dir / JUDGMENTS))
    finally:
        judgments.close()


async def _serve(page: Page, host: str, port: int, token: str, say: Callable[[str], None]) -> None:
    from aiohttp import web

    runner = web.AppRunner(page.application(), keepalive_timeout=30.0, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    server: Any = runner.server

    def connected() -> asyncio.BaseProtocol:
        return server() if len(server.connections) < MOST_CONNECTIONS else _Refusing()

    try:
        listening = await asyncio.get_running_loop().create_server(connected, host, port, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        what = f"cannot listen there ({error.__class__.__name__}: {error})"
        raise ResourceError(f"{host}:{port}", what, "choose another --port or --host") from error
    try:
        found = listening.sockets[0].getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        say(f"people judge at http://{name}:{found}/#{token} (Ctrl-C ends the page, and loses nothing)")
        if host not in LOOPBACK:
            say(
                f"warning: {host} is more than this machine, and the token travels unencrypted: use a tunnel or a proxy"
            )
        await listening.serve_forever()
    finally:
        listening.close()
        await runner.cleanup()


class _Refusing(asyncio.Protocol):
    """Ends a connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """End it."""
        if isinstance(transport, asyncio.Transport):
            transport.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            transport.close()


def token_of(run_dir: Path) -> str:
    """Return the run's token, made where there is none yet.

    Raises:
        ConfigError: the file holds something else.
    """
    path = run_dir / TOKEN
    found = (read_file(path) or b"").decode(errors="replace").strip()
    if not found:
        found = secrets.token_urlsafe(24)
        replace_file(path, found.encode() + b"\n", mode=0o600)
    if len(found) < 16:
        raise ConfigError(str(path), "holds no token", "delete it: another is made")
    return found
