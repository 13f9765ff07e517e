"""Scores from an HTTP server: one POST with JSON for the samples of one or several groups.

    protocol=flowrl     {"prompts": [...], "completions": [...], "columns": {"answer": [...], ...}}
                        -> {"scores": [1.0, null, ...]}
    protocol=openrlhf   {"query": [...], "prompts": [...], "labels": [...]} -> {"rewards": [1.0, ...]}

Every list has one entry for each sample, the groups one after the other; prompts, completions and columns are those of
a reward function (flowrl.rewards.function), query, prompts and labels those of OpenRLHF's `reward_func`
(flowrl.rewards.signatures). A score is a finite number, or null for "does not apply", which counts as 0. Status 200 is
an answer; 408, 429, any 5xx and a broken connection are tried again, after `Retry-After` where the server sends it and
else after a time that doubles and varies; any other status is a refusal, and so is an answer of another form.
Redirects are not followed, and what leaves this machine goes over TLS unless `allow_plain_http` says otherwise.

Invariant: a call returns one finite number for each sample of each group or raises RewardError, within a time bounded
by the settings.

Called by the RemoteReward stage.

Tests: tests/unit/rewards/test_http.py
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

import msgspec

from flowrl.config import Config, Meta
from flowrl.errors import ConfigError, LastingError, RewardError, said_briefly
from flowrl.rewards.function import SHOWN_CHARS, checked, text_columns
from flowrl.rewards.signatures import Style, columns_for

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Sequence

    from flowrl.messages import Rollouts

MAX_ANSWER_BYTES = 64 << 20  # some hundred bytes a score are plenty; more is not an answer
TRY_AGAIN = frozenset({408, 429})  # besides every 5xx
CONNECT_S = 5.0


class Server(Config):
    """An HTTP server and how patiently it is asked."""

    url: str = ""  # https://host/path; http:// only on this machine, or with allow_plain_http
    timeout_s: Annotated[float, Meta(gt=0)] = 60.0  # for one request
    retries: Annotated[int, Meta(ge=0)] = 5  # requests after the first, where the server is away or busy
    backoff_s: Annotated[float, Meta(gt=0)] = 1.0  # before the first retry; twice as long before each further one
    max_wait_s: Annotated[float, Meta(gt=0)] = 60.0  # before any retry, whatever Retry-After asks for
    allow_plain_http: bool = False  # send prompts, answers and the token unencrypted to another host
    token_file: str = ""  # holds a token, sent as "Authorization: Bearer ..."; "": none
    ca_file: str = ""  # certificates in PEM to trust instead of the system's; "": the system's


class Remote(Server):
    """A scoring server and how it is asked."""

    protocol: Literal["flowrl", "openrlhf"] = "flowrl"
    label_column: str = "answer"  # with protocol=openrlhf: the column that becomes `labels`; "": none


class ServerReply(msgspec.Struct, frozen=True, kw_only=True):
    """What a server answered."""

    status: int
    retry_after: str | None
    body: bytes
    leads_to: str = ""  # of a redirect


Post = Callable[[bytes], Awaitable[ServerReply]]  # raises OSError where the connection fails


class Unreachable(RewardError):
    """The server was away or busy at every attempt: nothing is known about the groups."""


class _Scores(msgspec.Struct):
    scores: list[float | None]


class _Rewards(msgspec.Struct):
    rewards: list[float | None]


class Asker:
    """Posts requests to a server until each is answered; safe to call for several at a time."""

    def __init__(
        self, server: Server, post: Post, where: str, *, turn: Callable[[], Awaitable[None]] | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """Take what posts; `turn` is awaited before every attempt, and no part of its `timeout_s`."""
        self._server = server
        self._post = post
        self._turn = turn
        self._random = random.Random(seed)
        self.where = f"{where} ({shown_url(server.url)})"

    async def __call__(self, request: bytes) -> bytes:
        """Return the body of the first answer with status 200.

        Raises:
            Unreachable: no attempt was answered.
            RewardError: the server refused the request.
        """
        num_attempts = self._server.retries + 1
        trouble = ""
        for attempt in range(num_attempts):
            retry_after = None
            if self._turn is not None:
                await self._turn()
            try:
                async with asyncio.timeout(self._server.timeout_s):
                    answer = await self._post(request)
            except TimeoutError:
                trouble = f"no answer after {self._server.timeout_s:g} s"
            except OSError as error:
                trouble = f"{type(error).__name__}: {str(error)[:SHOWN_CHARS]}"
            else:
                if answer.status == 200:
                    return answer.body
                said = f"status {answer.status}: {answer.body[:SHOWN_CHARS].decode(errors='replace')}"
                if answer.leads_to:
                    what = f"leads to {shown_url(answer.leads_to)} (status {answer.status}), and is not followed"
                    raise RewardError(self.where, what, "set url to where it leads, if you trust it")
                if answer.status not in TRY_AGAIN and answer.status < 500:
                    raise RewardError(self.where, f"attempt {attempt + 1}: {said}", "see the server's log")
                trouble, retry_after = said, answer.retry_after
            if attempt + 1 < num_attempts:
                await asyncio.sleep(self._wait_s(attempt, retry_after))
        what = f"attempt {num_attempts} of {num_attempts}: {trouble}"
        raise Unreachable(self.where, what, "start the server, or raise timeout_s or retries")

    def _wait_s(self, attempt: int, retry_after: str | None) -> float:
        """Return how long to wait after an attempt: as the server asks, or doubling with half of it random."""
        asked_s = seconds_asked(retry_after, now_s=time.time())
        if asked_s is None:
            asked_s = doubled_s(self._server, attempt) * self._random.uniform(0.5, 1.0)
        return min(asked_s, self._server.max_wait_s)


def doubled_s(server: Server, attempt: int) -> float:
    """Return the seconds after an attempt, from 0 on, that are twice those after the one before."""
    return server.backoff_s * 2.0 ** min(attempt, 60)


class RemoteScorer:
    """Asks a server for scores; safe to call for several batches at a time."""

    def __init__(self, remote: Remote, post: Post, where: str, *, seed: int = 0) -> None:
        self._remote = remote
        self._ask = Asker(remote, post, where, seed=seed)

    async def __call__(self, groups: Sequence[Rollouts]) -> list[list[float]]:
        """Score every sample of every group, in order.

        Raises:
            Unreachable: no attempt was answered.
            RewardError: the server refused the request, or answered something else than one number per sample.
        """
        num_samples = sum(len(group.samples) for group in groups)
        body = await self._ask(request_body(groups, self._remote))
        scores = checked(scores_of(body, self._remote, self._ask.where), num_samples, self._ask.where)
        parts = iter(scores)
        return [[next(parts) for _ in group.samples] for group in groups]


def request_body(groups: Sequence[Rollouts], remote: Remote) -> bytes:
    """Return the JSON of a request for these groups; a column that only some of them have is null in the others."""
    columns: dict[str, list[Any]] = {}
    num_samples = 0
    for group in groups:
        known = text_columns(group)
        for name in known.keys() | columns.keys():
            values = columns.setdefault(name, [None] * num_samples)
            values.extend(known.get(name) or [None] * len(group.samples))
        num_samples += len(group.samples)
    if remote.protocol == "flowrl":
        prompts, completions = columns.pop("prompts"), columns.pop("completions")
        return msgspec.json.encode({"prompts": prompts, "completions": completions, "columns": columns})
    given, _ = columns_for(Style("openrlhf"), columns, label_column=remote.label_column, where=remote.url)
    return msgspec.json.encode({"query": given["queries"], "prompts": given["prompts"], "labels": given["labels"]})


def scores_of(body: bytes, remote: Remote, where: str) -> list[float | None]:
    """Return the scores in an answer's body.

    Raises:
        RewardError: it has another form.
    """
    try:
        if remote.protocol == "flowrl":
            return msgspec.json.decode(body, type=_Scores).scores
        return msgspec.json.decode(body, type=_Rewards).rewards
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        wanted = '{"scores": [numbers]}' if remote.protocol == "flowrl" else '{"rewards": [numbers]}'
        shown = body[:SHOWN_CHARS].decode(errors="replace")
        raise RewardError(where, f"answered {shown!r} ({error})", f"answer {wanted}, one per sample") from error


def seconds_asked(retry_after: str | None, *, now_s: float) -> float | None:
    """Return the seconds a Retry-After header asks for (a number, or a date); None without a usable one.

    >>> seconds_asked("Thu, 01 Jan 1970 00:00:30 GMT", now_s=10.0)
    20.0
    """
    if retry_after is None:
        return None
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - now_s)
    except (ValueError, OverflowError):
        return None


def check_server(server: Server, where: str, say: Callable[[str], None] | None = None) -> None:
    """Check the address and read the files; with `say` it is said, and no more, that nothing answers there.

    Raises:
        ConfigError: the address is not one that prompts may be sent to, or a file cannot be read.
    """
    try:
        address = urlsplit(server.url)
        host, _ = address.hostname, address.port  # the port is read when asked for
    except ValueError as error:
        raise ConfigError(f"{where}.url", f"{server.url!r} is not an address ({error})") from error
    if address.scheme not in ("http", "https") or not host:
        raise ConfigError(f"{where}.url", f"{server.url!r} is not an address", "write https://host/path")
    if address.username or address.password:
        raise ConfigError(f"{where}.url", f"holds a password for {host}", "put a token into a file and set token_file")
    if address.scheme == "http" and not is_this_machine(host) and not server.allow_plain_http:
        what = f"{shown_url(server.url)} sends prompts and answers unencrypted to another host"
        raise ConfigError(f"{where}.url", what, "use https://, or set allow_plain_http=true in a network you trust")
    read_token(server, where)
    _trusted(server, where)
    if say is not None and (why := unreachable(server.url)):
        say(f"warning: {where}.url: {shown_url(server.url)} does not answer here and now ({why})")


def unreachable(url: str) -> str:
    """Return why nothing answers a connection to an address, "" where something does; blocks for seconds at most."""
    parts = urlsplit(url)
    try:
        address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        socket.create_connection(address, timeout=CONNECT_S).close()
    except OSError as error:
        return said_briefly(error)
    return ""


async def see_listening(server: Server, where: str) -> None:
    """Wait until something listens at a server's address, as often as a request is tried.

    Raises:
        LastingError: nothing does.
    """
    why = ""
    for attempt in range(server.retries + 1):
        if not (why := await asyncio.to_thread(unreachable, server.url)):
            return
        if attempt < server.retries:
            await asyncio.sleep(min(doubled_s(server, attempt), server.max_wait_s))
    what = f"does not answer ({why})"
    raise LastingError(f"{where} ({shown_url(server.url)})", what, "start the server, or mend the address")


def is_this_machine(host: str) -> bool:
    """Return whether a host is the loopback by its name or its address alone; nothing is looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown_url(url: str) -> str:
    """Return an address without what may be secret: its query."""
    return urlunsplit(urlsplit(url)._replace(query="", fragment=""))


def read_token(server: Server, where: str) -> str | None:
    """Return the token in `token_file`, None where none is set.

    Raises:
        ConfigError: the file cannot be read or does not hold one line.
    """
    if not server.token_file:
        return None
    try:
        lines = Path(server.token_file).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}.token_file", f"{server.token_file} cannot be read ({error})") from error
    if len(lines) != 1:
        what = f"{server.token_file} holds {len(lines)} words"
        raise ConfigError(f"{where}.token_file", what, "write the token alone into it")
    return lines[0]


def _trusted(server: Server, where: str) -> ssl.SSLContext | None:
    """Return what certificates are held against, None for plain HTTP."""
    import ssl

    if not server.url.startswith("https:"):
        return None
    try:
        return ssl.create_default_context(cafile=server.ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{where}.ca_file", f"{server.ca_file} holds no certificates ({error})") from error


@asynccontextmanager
async def connected(
    server: Server, where: str, *, num_connections: int, most_bytes: int | None = None
) -> AsyncIterator[Post]:
    """Yield what posts to the server over kept connections; they are closed with the block.

    Raises:
        ConfigError: as `check_server`.
    """
    import aiohttp

    check_server(server, where)
    most = most_bytes or MAX_ANSWER_BYTES
    trusted = _trusted(server, where)
    token = read_token(server, where)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    connector = aiohttp.TCPConnector(limit=num_connections, ssl=trusted if trusted is not None else True)
    no_timeout = aiohttp.ClientTimeout(total=None, sock_connect=None)  # the scorer has one for the whole request
    async with aiohttp.ClientSession(connector=connector, timeout=no_timeout, headers=headers) as session:

        async def post(request: bytes) -> ServerReply:
            try:
                async with session.post(server.url, data=request, allow_redirects=False) as response:
                    body = bytearray()
                    async for chunk in response.content.iter_chunked(1 << 16):
                        body += chunk
                        if len(body) > most:
                            what = f"answered more than {most / (1 << 20):g} MiB"
                            raise RewardError(f"{where} ({shown_url(server.url)})", what, "see the server's log")
                    leads_to = response.headers.get("Location", "") if 300 <= response.status < 400 else ""
                    retry_after = response.headers.get("Retry-After")
                    return ServerReply(
                        status=response.status, retry_after=retry_after, body=bytes(body), leads_to=leads_to
                    )
            except aiohttp.ClientSSLError as error:  # trying again would not help
                what, remedy = f"TLS: {str(error)[:SHOWN_CHARS]}", "set ca_file to the authority that signed for it"
                raise RewardError(f"{where} ({shown_url(server.url)})", what, remedy) from error
            except aiohttp.ClientError as error:
                raise ConnectionError(f"{type(error).__name__}: {str(error)[:SHOWN_CHARS]}") from error

        yield post
