"""Remote rewards against a real server on this machine, with and without TLS."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from flowrl.errors import ConfigError, LastingError, RewardError
from flowrl.rewards.http import Unreachable
from flowrl.stages.remote_reward import RemoteReward
from tests.support.one_stage import Alone, rollouts, stage_alone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from flowrl.messages import Rollouts

pytestmark = pytest.mark.slow


@dataclass
class Judge:
    """A server that scores by length, and remembers what it was asked."""

    respond: Any
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        self.headers.append(dict(request.headers))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            return await self.respond(self, self.requests[-1])
        finally:
            self.num_open -= 1


async def by_length(judge: Judge, asked: dict[str, Any]) -> web.Response:
    return web.json_response({"scores": [len(text) for text in asked["completions"]]})


@asynccontextmanager
async def serving(respond: Any, trusted: ssl.SSLContext | None = None) -> AsyncIterator[tuple[Judge, str]]:
    judge = Judge(respond)
    app = web.Application()
    app.router.add_post("/score", judge.handle)
    server = TestServer(app, scheme="https" if trusted else "http")
    await server.start_server(ssl=trusted)
    try:
        yield judge, str(server.make_url("/score"))
    finally:
        await server.close()


def score(
    respond: Any, groups: list[Rollouts], run_dir: Path, *, trusted: ssl.SSLContext | None = None, **settings: Any
) -> tuple[Judge, Alone]:
    """Run the stage against a server; the server is kept for what it saw."""
    judges: list[Judge] = []

    async def run() -> Alone:
        async with serving(respond, trusted) as (judge, url):
            judges.append(judge)
            config = RemoteReward.Config(**{"url": url, "backoff_s": 0.001, "retries": 2, **settings})
            try:
                return await stage_alone(RemoteReward(config), groups, run_dir, node="judge")
            except ExceptionGroup as group:
                errors.extend(group.exceptions)
                return Alone([])

    errors: list[Exception] = []
    alone = asyncio.run(run())
    if errors:
        raise errors[0]
    return judges[0], alone


def numbered(count: int) -> list[Rollouts]:
    return [rollouts("a" * k, "b", group_id=k) for k in range(count)]


def test_groups_are_scored_in_batches(tmp_path: Path):
    judge, alone = score(by_length, numbered(10), tmp_path, batch_groups=4, concurrency=1, weight=0.5)
    assert [group.scores for group in alone.put] == [{"judge": [k / 2, 0.5]} for k in range(10)]
    assert [len(asked["prompts"]) for asked in judge.requests] == [8, 8, 4]
    assert judge.requests[0]["columns"] == {"answer": ["one"] * 8}
    assert judge.headers[0]["Content-Type"] == "application/json"


def test_several_requests_are_under_way_at_a_time_and_no_more_than_set(tmp_path: Path):
    both = asyncio.Event()

    async def respond(judge: Judge, asked: dict[str, Any]) -> web.Response:
        if judge.num_open == 2:
            both.set()
        await both.wait()
        return await by_length(judge, asked)

    judge, alone = score(respond, numbered(6), tmp_path, batch_groups=1, concurrency=2)
    assert sorted(group.group_id for group in alone.put) == list(range(6))
    assert judge.most_open == 2


def test_a_server_that_is_busy_is_asked_again(tmp_path: Path):
    async def respond(judge: Judge, asked: dict[str, Any]) -> web.Response:
        if len(judge.requests) == 1:
            return web.Response(status=503, headers={"Retry-After": "0"})
        if len(judge.requests) == 2:
            return web.Response(status=429)
        return await by_length(judge, asked)

    judge, alone = score(respond, numbered(1), tmp_path)
    assert len(judge.requests) == 3
    assert alone.put[0].scores == {"judge": [0.0, 1.0]}


def test_a_server_that_stays_broken_ends_the_run_after_the_retries(tmp_path: Path):
    async def respond(judge: Judge, asked: dict[str, Any]) -> web.Response:
        seen.append(1)
        return web.Response(status=500, text="oh no")

    seen: list[int] = []
    with pytest.raises(Unreachable, match=r"/score\): attempt 3 of 3: status 500: oh no"):
        score(respond, numbered(2), tmp_path, concurrency=1)
    assert len(seen) == 3
    assert (tmp_path / "quarantine" / "group-0.json").is_file()


def test_a_request_that_fails_or_is_not_answered_is_tried_again(tmp_path: Path):
    async def respond(judge: Judge, asked: dict[str, Any]) -> web.Response:
        if len(judge.requests) == 1:
            raise web.HTTPInternalServerError
        if len(judge.requests) == 2:
            await asyncio.Event().wait()
        return await by_length(judge, asked)

    judge, alone = score(respond, numbered(1), tmp_path, timeout_s=2.0)
    assert len(judge.requests) == 3
    assert alone.put


def test_nobody_listening_is_said_by_a_check_and_ends_a_run_before_a_group_is_scored(tmp_path: Path):
    said: list[str] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # so that nobody else listens there
        address = f"127.0.0.1:{taken.getsockname()[1]}/score"
        stage = RemoteReward(RemoteReward.Config(url=f"http://{address}?key=1", retries=1, backoff_s=0.001))
        stage.check(said.append)
        with pytest.raises(LastingError, match=rf"judge\.0 \(http://{address}\): does not answer \(Connection"):
            asyncio.run(stage_alone(stage, numbered(1), tmp_path, node="judge"))
    (line,) = said
    assert line.startswith(f"warning: remote reward.url: http://{address} does not answer here and now (Connection")


def test_one_refused_group_does_not_fail_its_batch(tmp_path: Path):
    async def respond(judge: Judge, asked: dict[str, Any]) -> web.Response:
        if "aaa" in asked["completions"]:
            return web.Response(status=422, text="not that one")
        return await by_length(judge, asked)

    judge, alone = score(respond, numbered(5), tmp_path, on_error="skip", concurrency=1)
    assert [group.group_id for group in alone.put] == [0, 1, 2, 4]
    assert [(group, kind) for group, kind, _ in alone.rejected] == [(3, "failed")]
    assert "status 422: not that one" in alone.rejected[0][2]
    assert len(judge.requests) == 1 + 5
    assert (tmp_path / "quarantine" / "group-3.json").is_file()


@pytest.mark.parametrize("body", ['{"scores": [1]}', '{"rewards": [1, 2]}', "[1, 2]", "ok"])
def test_an_answer_of_another_form_is_a_failure(body: str, tmp_path: Path):
    async def respond(judge: Judge, asked: dict[str, Any]) -> web.Response:
        return web.Response(text=body)

    _, alone = score(respond, numbered(1), tmp_path, on_error="skip")
    assert [(group, kind) for group, kind, _ in alone.rejected] == [(0, "failed")]
    assert not alone.put


def test_an_answer_without_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def respond(judge: Judge, asked: dict[str, Any]) -> web.Response:
        return web.Response(body=b" " * (1 << 20))

    monkeypatch.setattr("flowrl.rewards.http.MAX_ANSWER_BYTES", 1 << 18)
    with pytest.raises(RewardError, match="answered more than"):
        score(respond, numbered(1), tmp_path)


def test_redirects_are_not_followed(tmp_path: Path):
    async def respond(judge: Judge, asked: dict[str, Any]) -> web.Response:
        raise web.HTTPTemporaryRedirect("http://judge.example/")

    with pytest.raises(RewardError, match="status 307"):
        score(respond, numbered(1), tmp_path)


def test_an_openrlhf_server_is_asked_in_its_form(tmp_path: Path):
    async def respond(judge: Judge, asked: dict[str, Any]) -> web.Response:
        pairs = zip(asked["query"], asked["labels"], strict=True)
        return web.json_response({"rewards": [float(query.endswith(label)) for query, label in pairs]})

    judge, alone = score(respond, [rollouts("one", "two")], tmp_path, protocol="openrlhf")
    assert alone.put[0].scores == {"judge": [1.0, 0.0]}
    assert judge.requests[0]["prompts"] == ["count", "count"]


def test_a_token_is_sent(tmp_path: Path):
    (tmp_path / "token").write_text("abc\n")
    judge, _ = score(by_length, numbered(1), tmp_path, token_file=str(tmp_path / "token"))
    assert judge.headers[0]["Authorization"] == "Bearer abc"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A certificate for this machine that nobody but its own file vouches for."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "judge")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    directory = tmp_path_factory.mktemp("tls")
    public, private = directory / "judge.pem", directory / "key.pem"
    public.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(public, private)
    return public, context


def test_a_server_with_a_trusted_certificate_is_asked_over_tls(
    certificate: tuple[Path, ssl.SSLContext], tmp_path: Path
):
    public, trusted = certificate
    judge, alone = score(by_length, numbered(1), tmp_path, trusted=trusted, ca_file=str(public))
    assert alone.put[0].scores == {"judge": [0.0, 1.0]}
    assert len(judge.requests) == 1


def test_a_server_with_another_certificate_is_told_nothing(certificate: tuple[Path, ssl.SSLContext], tmp_path: Path):
    with pytest.raises(RewardError, match=r"TLS: .*set ca_file"):
        score(by_length, numbered(1), tmp_path, trusted=certificate[1])


def test_plain_http_to_another_host_is_refused_before_a_run_and_in_it(tmp_path: Path):
    stage = RemoteReward(RemoteReward.Config(url="http://judge.example/score"))
    with pytest.raises(ConfigError, match="allow_plain_http=true"):
        stage.check(print)
    with pytest.raises(ConfigError, match="allow_plain_http=true"):
        asyncio.run(stage_alone(stage, numbered(1), tmp_path))
