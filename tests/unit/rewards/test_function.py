from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from flowrl.errors import ConfigError, RewardError
from flowrl.messages import Buffer, Rollouts, Sample, VersionSpan
from flowrl.rewards.function import RewardFunction
from tests.unit.rewards import reward_functions

HERE = "tests.unit.rewards.reward_functions"


def rollouts(columns: dict[str, Any] | None = None, texts: tuple[str, ...] = ("one", "three")) -> Rollouts:
    samples = [
        Sample(
            token_ids=Buffer.ints([5, i]),
            logprobs=Buffer.floats([-1.0, -1.0]),
            versions=[VersionSpan(0, 0, 2)],
            finish="stop",
            text=text,
        )
        for i, text in enumerate(texts)
    ]
    return Rollouts(
        group_id=7,
        token_ids=Buffer.ints([1, 2]),
        columns=columns if columns is not None else {"prompt": "count", "answer": "one"},
        num_samples=len(texts),
        seed=0,
        samples=samples,
        generator="generator.0",
    )


def score(name: str, group: Rollouts | None = None, timeout_s: float = 60.0) -> list[float]:
    function = RewardFunction(f"{HERE}:{name}", "reward.0", timeout_s=timeout_s)
    return asyncio.run(function(group or rollouts()))


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("length", [3.0, 5.0]),
        ("with_default", [1.0, 0.0]),
        ("slowly", [2.0, 2.0]),
        ("scorer", [4.0, 4.0]),
        ("partly", [0.0, 1.5]),
    ],
)
def test_function_is_given_what_it_names_and_scores_every_sample(name, scores):
    assert score(name) == scores


def test_function_with_kwargs_is_given_every_column_as_a_list():
    score("everything")
    assert reward_functions.seen.pop() == {
        "prompts": ["count", "count"],
        "completions": ["one", "three"],
        "completion_ids": [[5, 0], [5, 1]],
        "answer": ["one", "one"],
    }


def test_completions_of_a_conversation_are_messages():
    messages = [{"role": "user", "content": "count"}]
    score("everything", rollouts({"prompt": messages}))
    given = reward_functions.seen.pop()
    assert given["prompts"] == [messages, messages]
    assert given["completions"][1] == [{"role": "assistant", "content": "three"}]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "raised KeyError: 'gone'"),
        ("stops", "StopIteration"),
        ("exits", "SystemExit(3)"),
        ("times_out", "raised TimeoutError: its own"),
        ("not_a_number", "score 1 of 2 is nan"),
        ("too_many", "returned 3 scores for 2 completions"),
        ("words", "score 1 of 2 is 'good', a str"),
        ("digits", "score 0 of 2 is '1', a str"),
        ("mapping", "returned a dict"),
        ("huge", "score 1 of 2 is 1000"),
        ("single", "returned a float"),
        ("needs_column", "needs a column 'anser' that the data lacks; did you mean 'answer'"),
    ],
)
def test_bad_result_is_refused_with_its_numbers(name, said):
    with pytest.raises(RewardError) as caught:
        score(name)
    assert said in str(caught.value)
    assert "reward.0" in str(caught.value)


def test_error_stays_short():
    for name in ("long_winded", "huge"):
        with pytest.raises(RewardError) as caught:
            score(name)
        assert len(str(caught.value)) < 1000


def test_error_names_the_group():
    with pytest.raises(RewardError, match="group 7"):
        score("raises")


@pytest.mark.parametrize(("name", "scores"), [("length", [3.0, 5.0]), ("slowly", [2.0, 2.0]), ("partly", [0.0, 1.5])])
def test_function_can_be_called_in_this_thread(name, scores):
    with asyncio.Runner() as runner:
        assert RewardFunction(f"{HERE}:{name}", "worker").call_here(rollouts(), runner) == scores


@pytest.mark.parametrize("name", ["raises", "exits", "too_many", "needs_column"])
def test_failure_in_this_thread_is_a_reward_error(name):
    with asyncio.Runner() as runner, pytest.raises(RewardError):
        RewardFunction(f"{HERE}:{name}", "worker").call_here(rollouts(), runner)


@pytest.mark.parametrize("name", ["never", "hangs"])
def test_function_that_takes_too_long_is_given_up(name):
    reward_functions.release.clear()
    try:
        with pytest.raises(RewardError, match=r"no result after 0\.02 s"):
            score(name, timeout_s=0.02)
    finally:
        reward_functions.release.set()


def test_hanging_function_does_not_keep_the_process_alive():
    reward_functions.release.clear()
    try:
        with pytest.raises(RewardError):
            score("hangs", timeout_s=0.02)
        left = [thread for thread in threading.enumerate() if thread.name == "reward"]
        assert all(thread.daemon for thread in left)
        assert left
    finally:
        reward_functions.release.set()


@pytest.mark.parametrize("name", ["never", "hangs"])
def test_cancellation_travels_on(name):
    async def cancel_it() -> None:
        function = RewardFunction(f"{HERE}:{name}", "reward.0", timeout_s=5.0)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(function(rollouts()))
            await asyncio.sleep(0.01)
            task.cancel()
        assert task.cancelled()

    reward_functions.release.clear()
    try:
        asyncio.run(cancel_it())
    finally:
        reward_functions.release.set()


@pytest.mark.parametrize("name", ["nothing", "constant", "Scorer"])
def test_path_that_is_no_function_is_refused_before_the_run(name):
    with pytest.raises(ConfigError):
        RewardFunction(f"{HERE}:{name}", "reward.function")
