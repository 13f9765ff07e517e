"""Remote scores: what is sent, what is taken for an answer, and how often it is tried, without a network."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.errors import ConfigError, RewardError
from flowrl.rewards.http import (
    Remote,
    RemoteScorer,
    ServerReply,
    Unreachable,
    check_server,
    read_token,
    request_body,
    seconds_asked,
)
from flowrl.simulation.clock import run_virtual
from tests.support.one_stage import rollouts

if TYPE_CHECKING:
    from pathlib import Path

URL = "https://judge.example/score"
GROUPS = [rollouts("one", "three"), rollouts("five", group_id=8, prompt="more", level=2)]
GOOD = b'{"scores": [1, null, 0.5]}'


def answer(status: int = 200, body: bytes = GOOD, retry_after: str | None = None) -> ServerReply:
    return ServerReply(status=status, retry_after=retry_after, body=body)


class Server:
    """Answers in turn, the last one for ever; an exception is raised, None never comes."""

    def __init__(self, *answers: ServerReply | Exception | None) -> None:
        self.answers = list(answers)
        self.times_s: list[float] = []

    async def post(self, request: bytes) -> ServerReply:
        self.times_s.append(asyncio.get_running_loop().time())
        turn = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if turn is None:
            await asyncio.Event().wait()
        if isinstance(turn, Exception):
            raise turn
        assert isinstance(turn, ServerReply)
        return turn


def ask(server: Server, **settings: Any) -> list[list[float]]:
    scorer = RemoteScorer(Remote(url=URL, **settings), server.post, "reward.0")

    async def call() -> list[list[float]]:
        return await scorer(GROUPS)

    return run_virtual(call())


def test_scores_are_given_back_by_group_and_null_counts_nothing():
    assert ask(Server(answer())) == [[1.0, 0.0], [0.5]]


def test_a_request_holds_every_sample_with_its_columns():
    assert json.loads(request_body(GROUPS, Remote(url=URL))) == {
        "prompts": ["count", "count", "more"],
        "completions": ["one", "three", "five"],
        "columns": {"answer": ["one", "one", "one"], "level": [None, None, 2]},
    }


def test_a_request_to_an_openrlhf_server_holds_queries_prompts_and_labels():
    remote = Remote(url=URL, protocol="openrlhf")
    assert json.loads(request_body(GROUPS, remote)) == {
        "query": ["countone", "countthree", "morefive"],
        "prompts": ["count", "count", "more"],
        "labels": ["one", "one", "one"],
    }
    assert ask(Server(answer(body=b'{"rewards": [1, 2, 3], "more": 0}')), protocol="openrlhf") == [[1.0, 2.0], [3.0]]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"rewards": [1, 2, 3]}', "missing required field `scores`"),
        (b'{"scores": [1, 2, "good"]}', "Expected `float | null`"),
        (b'{"scores": [1, 2, NaN]}', "malformed"),
        (b'{"scores": [1, 2]}', "returned 2 scores for 3 completions"),
        (b'{"scores": [1, 2, 3, 4]}', "returned 4 scores for 3 completions"),
        (b"<html>502</html>", "malformed"),
        (b"", "truncated"),
        (b"\xff\xfe", "answered"),
    ],
)
def test_an_answer_of_another_form_is_refused_at_once(body: bytes, said: str):
    server = Server(answer(body=body))
    with pytest.raises(RewardError) as caught:
        ask(server)
    assert said in str(caught.value)
    assert URL in str(caught.value)
    assert len(server.times_s) == 1
    assert not isinstance(caught.value, Unreachable)


@pytest.mark.parametrize("status", [301, 400, 401, 404, 422])
def test_a_refusal_is_not_tried_again(status: int):
    server = Server(answer(status, b"not so"))
    with pytest.raises(RewardError, match=f"attempt 1: status {status}: not so"):
        ask(server)
    assert len(server.times_s) == 1


@pytest.mark.parametrize("trouble", [answer(500), answer(503), answer(429), answer(408), ConnectionError("no"), None])
def test_a_server_that_is_away_or_busy_is_asked_again(trouble: ServerReply | Exception | None):
    server = Server(trouble, trouble, answer())
    assert ask(server, timeout_s=5.0) == [[1.0, 0.0], [0.5]]
    assert len(server.times_s) == 3


def test_retries_wait_twice_as_long_each_time_and_no_longer_than_allowed():
    server = Server(answer(503, b"later"))
    with pytest.raises(Unreachable, match=r"attempt 6 of 6: status 503: later"):
        ask(server, retries=5, backoff_s=1.0, max_wait_s=6.0)
    waits_s = [after - before for before, after in zip(server.times_s, server.times_s[1:], strict=False)]
    assert len(waits_s) == 5
    for wait_s, most_s in zip(waits_s, [1.0, 2.0, 4.0, 8.0, 16.0], strict=True):
        assert min(most_s / 2, 6.0) - 1e-6 <= wait_s <= min(most_s, 6.0) + 1e-6


def test_retry_after_is_obeyed_up_to_the_limit():
    server = Server(answer(429, b"", "3"), answer(429, b"", "3600"), answer())
    ask(server, max_wait_s=20.0)
    assert server.times_s == pytest.approx([0.0, 3.0, 23.0])


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("7", 7.0), ("Thu, 01 Jan 1970 00:00:30 GMT", 20.0), ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0),
     ("soon", None), ("-3", None)],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float | None):
    assert seconds_asked(header, now_s=10.0) == seconds


def test_the_last_attempts_trouble_is_named():
    with pytest.raises(
        Unreachable, match=r"reward.0 \(https://judge.example/score\): attempt 2 of 2: Connection.*gone"
    ):
        ask(Server(ConnectionError("gone")), retries=1)
    with pytest.raises(Unreachable, match="no answer after 5 s"):
        ask(Server(None), retries=0, timeout_s=5.0)


@pytest.mark.parametrize(
    "url",
    ["https://judge.example/", "http://localhost:8000/", "http://127.0.0.1/", "http://127.8.9.1/", "http://[::1]:80/x"],
)
def test_tls_and_this_machine_are_allowed(url: str):
    check_server(Remote(url=url), "reward")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://judge.example/", "unencrypted to another host"),
        ("http://10.0.0.7:5000/get_reward", "unencrypted"),
        ("http://localhost.evil.example/", "unencrypted"),
        ("http://[2001:db8::1]/", "unencrypted"),
        ("ftp://judge.example/", "is not an address"),
        ("judge.example/score", "is not an address"),
        ("", "is not an address"),
        ("http://localhost:99999/", "is not an address"),
        ("https://me:secret@judge.example/", "holds a password"),
    ],
)
def test_other_addresses_are_refused(url: str, said: str):
    with pytest.raises(ConfigError) as caught:
        check_server(Remote(url=url), "reward")
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


def test_plain_http_to_another_host_can_be_allowed():
    check_server(Remote(url="http://10.0.0.7:5000/get_reward", allow_plain_http=True), "reward")


def test_secrets_in_an_address_are_not_shown():
    scorer = RemoteScorer(Remote(url=URL + "?key=secret", retries=0), Server(answer(400)).post, "reward.0")
    with pytest.raises(RewardError) as caught:
        asyncio.run(scorer(GROUPS))
    assert "secret" not in str(caught.value)


def test_a_token_is_one_word_of_a_file(tmp_path: Path):
    (tmp_path / "token").write_text("abc\n")
    assert read_token(Remote(token_file=str(tmp_path / "token")), "reward") == "abc"
    (tmp_path / "token").write_text("abc def\n")
    with pytest.raises(ConfigError, match="holds 2 words"):
        read_token(Remote(token_file=str(tmp_path / "token")), "reward")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(Remote(token_file=str(tmp_path / "absent")), "reward")


def test_a_file_without_certificates_is_refused(tmp_path: Path):
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(ConfigError, match="holds no certificates"):
        check_server(Remote(url=URL, ca_file=str(tmp_path / "ca.pem")), "reward")


def test_a_redirect_is_named_without_its_query_and_not_followed():
    leads = ServerReply(status=302, retry_after=None, body=b"", leads_to="https://other.example/login?token=x")
    server = Server(leads)
    with pytest.raises(RewardError, match=r"leads to https://other\.example/login \(status 302\), and is not followed"):
        ask(server)
    assert len(server.times_s) == 1
