"""Judges against a real server on this machine, and on an engine here."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from flowrl.errors import ConfigError, DataError, LastingError, RewardError
from flowrl.rewards.chat import ChatServer
from flowrl.rewards.http import Unreachable
from flowrl.rewards.judging import Rubric
from flowrl.runs.judges import judge_preferences
from flowrl.stages.judge import Judge, ModelJudge
from flowrl.telemetry.events import Notice
from tests.support.one_stage import Alone, rollouts, run_alone, stage_alone
from tests.support.tiny import tiny_model

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from flowrl.messages import Rollouts

    Respond = Callable[[dict[str, Any]], Awaitable[web.StreamResponse]]

pytestmark = pytest.mark.slow

PLAIN: dict[str, Any] = {"engine": "tests.support.plain_engine:PlainEngine", "max_model_len": 512}


def saying(text: str | None, **usage: int) -> web.Response:
    return web.json_response({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})


async def by_number_of_ones(asked: dict[str, Any]) -> web.Response:
    """A rater with a hidden rule: the more ones, the better."""
    content = asked["messages"][0]["content"]
    a, b = (re.findall(rf"<answer {name} \w+>\n(.*?)\n</", content, re.DOTALL)[0].count("one") for name in "AB")
    return saying(f"[[{'A' if a > b else 'B' if b > a else 'C'}]]", prompt_tokens=50, completion_tokens=3)


@asynccontextmanager
async def answering(respond: Respond) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    requests: list[dict[str, Any]] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        requests.append(await request.json())
        return await respond(requests[-1])

    app = web.Application()
    app.router.add_post("/v1/chat/completions", handle)
    server = TestServer(app)
    await server.start_server()
    try:
        yield str(server.make_url("/v1")), requests
    finally:
        await server.close()


def judged(
    respond: Respond, groups: list[Rollouts], run_dir: Path, *, rubric: Rubric | None = None, on_error: Any = "stop",
    **settings: Any,
) -> tuple[Alone, list[dict[str, Any]]]:  # fmt: skip
    async def run() -> tuple[Alone, list[dict[str, Any]]]:
        async with answering(respond) as (url, requests):
            server = ChatServer(**{"url": url, "model": "rater", "backoff_s": 0.001, "retries": 1, **settings})
            config = Judge.Config(server=server, rubric=rubric or Rubric(), on_error=on_error)
            try:
                return await stage_alone(Judge(config), groups, run_dir, node="judge"), requests
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

    return asyncio.run(run())


def lines(alone: Alone, level: str) -> list[str]:
    return [event.text for event in alone.events if isinstance(event, Notice) and event.level == level]


def test_a_hidden_rule_orders_a_groups_answers_and_tokens_are_counted(tmp_path: Path):
    groups = [rollouts("one", "one one one", "nothing", "one one", group_id=k) for k in range(3)]
    alone, requests = judged(by_number_of_ones, groups, tmp_path, rubric=Rubric(way="pairs"))
    assert [group.group_id for group in alone.put] == [0, 1, 2]
    scores = alone.put[0].scores["judge"]
    assert sorted(range(4), key=lambda k: scores[k]) == [2, 0, 3, 1]
    assert requests[0]["model"] == "rater"
    assert requests[0]["temperature"] == 0
    assert len(requests) == 12  # six pairs in both orders: equal questions of other groups are asked once
    assert any(f"{12 * 50} tokens read and {12 * 3} written" in line for line in lines(alone, "info"))


def test_what_was_judged_before_a_resume_is_neither_asked_nor_paid_for_again(tmp_path: Path):
    prices = {"price_read": 1e6, "most_cost": 300.0}  # one a token
    groups = [rollouts("one", "nothing", group_id=k) for k in range(2)]
    pairs = Rubric(way="pairs")
    first, requests = judged(by_number_of_ones, groups, tmp_path, rubric=pairs, **prices)
    assert len(requests) == 2
    again, requests = judged(by_number_of_ones, groups, tmp_path, rubric=pairs, **prices)
    assert requests == []
    assert again.put[0].scores == first.put[0].scores
    _, requests = judged(by_number_of_ones, groups, tmp_path, rubric=pairs, **prices, model="another")
    assert len(requests) == 2
    others = [rollouts("one", "two", "three", group_id=k) for k in range(2)]  # six questions of 50, of which two fit
    with pytest.raises(LastingError, match=re.escape("300 is spent, of most_cost=300")):
        judged(by_number_of_ones, others, tmp_path, rubric=pairs, **prices, concurrency=1)


def test_a_judge_that_follows_the_order_is_warned_of(tmp_path: Path):
    async def first(asked: dict[str, Any]) -> web.Response:
        return saying("[[A]]")

    groups = [rollouts(f"a{k}", f"b{k}", group_id=k) for k in range(24)]
    alone, _ = judged(first, groups, tmp_path, rubric=Rubric(way="pairs"))
    assert len(alone.put) == 24
    (warning,) = lines(alone, "warning")
    assert warning.startswith("100% of the pairs turn with their order")


def test_a_second_judge_that_parts_from_the_first_is_told_and_changes_no_score(tmp_path: Path):
    async def as_asked(asked: dict[str, Any]) -> web.Response:
        ones = asked["messages"][0]["content"].count("one")
        if asked["model"] == "broken":
            return web.Response(text="<html>")
        return saying(f"[[{min(9, ones) if asked['model'] == 'rater' else 10 - min(9, ones)}]]")

    async def run(second: str) -> Alone:
        async with answering(as_asked) as (url, _):
            server = ChatServer(url=url, model="rater", retries=0)
            other = msgspec.structs.replace(server, model=second)
            config = Judge.Config(server=server, second=other, second_every=2)
            groups = [rollouts(f"{k}", f"{k} one one", group_id=k) for k in range(48)]
            return await stage_alone(Judge(config), groups, tmp_path / second, node="judge")

    alone = asyncio.run(run("other"))
    (warning,) = (line for line in lines(alone, "warning") if "second judge" in line)
    assert "orders the answers otherwise (correlation -1.00 within a group)" in warning
    assert len({tuple(group.scores["judge"]) for group in alone.put}) == 1  # the first one's
    silent = asyncio.run(run("broken"))
    assert len(silent.put) == 48
    assert "which could not judge 24 groups" in lines(silent, "info")[-2]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda: web.Response(text="<html>Sign in</html>", content_type="text/html"), "not a chat completion"),
        (lambda: web.Response(body=b""), "not a chat completion"),
        (lambda: web.json_response({"choices": []}), "not a chat completion"),
        (lambda: saying(None), "answered no text"),
        (lambda: saying(""), "answered no text"),
        (lambda: saying("I would rather not."), "no verdict on answer 0 can be read"),
        (lambda: web.json_response({"error": "no such model"}, status=404), "no such model"),
        (lambda: web.Response(body=b"x" * (3 << 20)), "answered more than 2 MiB"),
    ],
)
def test_an_answer_that_is_no_verdict_is_one_clear_line(tmp_path: Path, answer: Any, said: str):
    async def respond(asked: dict[str, Any]) -> web.StreamResponse:
        return answer()

    with pytest.raises(RewardError, match=said) as caught:
        judged(respond, [rollouts("a")], tmp_path)
    assert str(caught.value).isprintable()


def test_a_group_without_a_verdict_is_kept_on_disk_and_others_go_on(tmp_path: Path):
    async def respond(asked: dict[str, Any]) -> web.StreamResponse:
        return saying("hm" if "odd" in asked["messages"][0]["content"] else "[[7]]")

    groups = [rollouts("even", group_id=0), rollouts("odd", group_id=1), rollouts("evener", group_id=2)]
    alone, _ = judged(respond, groups, tmp_path, on_error="skip")
    assert [group.scores["judge"] for group in alone.put] == [[7.0], [7.0]]
    assert [(group, kind) for group, kind, _ in alone.rejected] == [(1, "failed")]
    assert [*(tmp_path / "quarantine").iterdir()]


def test_a_judge_that_is_too_slow_is_unreachable(tmp_path: Path):
    async def respond(asked: dict[str, Any]) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(Unreachable, match=r"attempt 2 of 2: no answer after 0\.05 s"):
        judged(respond, [rollouts("a")], tmp_path, timeout_s=0.05)


def test_a_busy_judge_is_asked_again_and_an_address_that_is_a_whole_one_is_taken(tmp_path: Path):
    seen: list[int] = []

    async def respond(asked: dict[str, Any]) -> web.StreamResponse:
        seen.append(1)
        return web.Response(status=429, headers={"Retry-After": "0"}) if len(seen) == 1 else saying("[[3]]")

    async def run() -> Alone:
        async with answering(respond) as (url, _):
            server = ChatServer(url=url + "/chat/completions", model="rater", backoff_s=0.001, retries=1)
            return await stage_alone(Judge(Judge.Config(server=server)), [rollouts("a")], tmp_path, node="judge")

    assert asyncio.run(run()).put[0].scores == {"judge": [3.0]}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"url": "http://example.org/v1", "model": "m"}, "unencrypted"),
        ({"url": "example.org", "model": "m"}, "is not an address"),
        ({"url": "http://127.0.0.1:9/v1"}, r"judge\.server\.model: is empty"),
    ],
)
def test_wrong_settings_are_found_before_the_start(settings: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        Judge(Judge.Config(server=ChatServer(**settings))).check(print)


def test_a_model_of_ones_own_is_asked_and_nonsense_is_no_score(tmp_path: Path):
    model = str(tiny_model(tmp_path / "model"))
    stage = ModelJudge(ModelJudge.Config(model=model, verdict="written", max_tokens=4, **PLAIN))
    stage.check(print)
    alone = run_alone(stage, [rollouts("a")], tmp_path, node="model_judge")
    (refused,) = alone.rejected
    assert "no verdict on answer 0 can be read" in refused[2]


@pytest.mark.parametrize("way", ["points", "pairs", "checklist"])
def test_a_model_that_writes_nonsense_has_the_verdict_that_its_probabilities_are(tmp_path: Path, way: Any):
    card = tiny_model(tmp_path / "model") / "config.json"
    card.write_text(card.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 1024'))
    config = ModelJudge.Config(
        model=str(card.parent),
        rubric=Rubric(way=way),
        **{**PLAIN, "max_model_len": 1024},  # questions in bytes
    )
    stage = ModelJudge(config)
    stage.check(print)
    alone = run_alone(stage, [rollouts("a", "b")], tmp_path, node="model_judge")
    assert not alone.rejected
    one, other = alone.put[0].scores["model_judge"]
    low, high = {"points": (1, 10), "pairs": (-0.55, 0.55), "checklist": (0, 1)}[way]
    assert low < one != other < high


def test_an_engine_that_weighs_nothing_is_refused_before_the_start(tmp_path: Path):
    config = ModelJudge.Config(model=str(tiny_model(tmp_path / "model")), engine="flowrl.engines.vllm:VllmEngine")
    with pytest.raises(ConfigError, match=r"model_judge\.verdict: is expected, but .*VllmEngine does not say"):
        ModelJudge(config).check(print)


def test_a_question_that_does_not_fit_says_so(tmp_path: Path):
    config = ModelJudge.Config(
        model=str(tiny_model(tmp_path / "model")), verdict="written", max_tokens=8, **{**PLAIN, "max_model_len": 64}
    )
    alone = run_alone(ModelJudge(config), [rollouts("a" * 200)], tmp_path, node="model_judge")
    assert "there is room for 56" in alone.rejected[0][2]


def agreement(path: Path, *overrides: str) -> list[str]:
    async def run() -> list[str]:
        said: list[str] = []
        async with answering(by_number_of_ones) as (url, _):
            given = [f"server.url={url}", "server.model=rater", *overrides]
            await asyncio.to_thread(judge_preferences, str(path), given, said.append)
        return said

    return asyncio.run(run())


def test_agreement_with_labelled_preferences_is_measured(tmp_path: Path):
    rows = [{"prompt": "count", "chosen": "one one", "rejected": "one"}] * 6
    rows += [{"prompt": "count", "chosen": "one", "rejected": "one one"}] * 2
    path = tmp_path / "preferences.jsonl"
    path.write_text("".join(f"{json.dumps({**row, 'prompt': f'count {k}'})}\n" for k, row in enumerate(rows)))
    said = agreement(path)
    assert any(line.startswith("agrees with the labels in 75.0% of 8 pairs [") for line in said)
    assert sum("the judge prefers 'one one' to 'one'" in line for line in said) == 2


def test_agreement_needs_preferences(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "count", "completion": "one"}\n')
    with pytest.raises(DataError, match="nobody said which of two answers is better"):
        agreement(path)
