"""Environments in this process: what a user's class is given, what it may return, what is refused."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.errors import ConfigError, RewardError
from flowrl.rewards.hints import HintedNumber
from flowrl.rewards.sessions import LocalEnvironments
from flowrl.rewards.worker import Playing
from tests.support import games

if TYPE_CHECKING:
    from flowrl.rewards.environments import Observed

GAMES = "tests.support.games"


def environments(name: str, *, timeout_s: float = 60.0, **options: Any) -> LocalEnvironments:
    games.calls.clear()
    return LocalEnvironments(
        Playing(environment=f"{GAMES}:{name}", where="agent.0", options=options, timeout_s=timeout_s)
    )


def played(name: str, *actions: str, **options: Any) -> list[Observed]:
    """Return what an episode says to its reset and to each action."""

    async def body() -> list[Observed]:
        async with environments(name, **options).episode("group 7, sample 0") as episode:
            return [await episode.reset({"position": 3}, 11), *[await episode.step(action) for action in actions]]

    return asyncio.run(body())


@pytest.mark.parametrize("name", ["Echo", "AsyncEcho"])
def test_an_environment_may_be_plain_or_async(name: str):
    first, second, third = played(name, "a", "b")
    assert (first.observation, first.reward, first.done) == ("play 3", 0.0, False)
    assert (second.observation, second.reward, second.done) == ("you said a", 0.5, False)
    assert third.done
    assert games.calls == [("reset", 11), ("step", "a"), ("step", "b"), ("close",)]


def test_an_episode_that_is_left_is_closed_once():
    played("Echo", "a")
    assert games.calls[-1] == ("close",)
    assert games.calls.count(("close",)) == 1


def test_an_environment_may_begin_with_a_conversation():
    assert [message["role"] for message in played("Messages")[0].messages] == ["system", "user"]


def test_none_is_no_reward_and_numbers_of_libraries_are_taken():
    import numpy as np

    assert played("Returns", "a", result=["", None, 0])[1].reward == 0.0
    assert played("Returns", "a", result=["", np.float32(1.5), np.bool_(True)])[1].done


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"first": 7}, "reset returned a int"),
        ({"first": []}, "reset returned a list of 0"),
        ({"first": [{"role": "user"}]}, "reset returned a list of 1"),
        ({"result": "text"}, "step returned a str"),
        ({"result": ["", 0.0]}, "step returned a tuple of 2"),
        ({"result": [7, 0.0, False]}, "step returned a int as the observation"),
        ({"result": ["", math.nan, False]}, "the reward is nan"),
        ({"result": ["", "much", False]}, "the reward is 'much', a str"),
        ({"result": ["", 0.0, "False"]}, "step returned 'False' for done"),
    ],
)
def test_what_is_no_answer_is_refused_with_the_episode(options: dict[str, Any], said: str):
    with pytest.raises(RewardError) as caught:
        played("Returns", "a", **options)
    assert str(caught.value).startswith(f"agent.0 ({GAMES}:Returns), group 7, sample 0: {said}")


@pytest.mark.parametrize(
    ("action", "said"), [("raise", "raised KeyError: 'gone'"), ("leave", r"raised RuntimeError: SystemExit\(3\)")]
)
def test_what_an_environment_raises_is_told(action: str, said: str):
    with pytest.raises(RewardError, match=said):
        played("Trouble", action)


def test_a_call_that_takes_too_long_is_given_up():
    with pytest.raises(RewardError, match=r"no result after 0\.01 s"):
        played("AsyncEcho", "a", timeout_s=0.01, delay_s=60.0)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("Nothing", {}, "has no 'Nothing'"),
        ("NoStep", {}, "has no method 'step'"),
        ("Echo", {"colour": "red"}, "does not take the options"),
        ("calls", {}, "is not a class"),
    ],
)
def test_what_cannot_be_played_is_refused(name: str, options: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        environments(name, **options)


def test_hints_lead_to_the_answer_and_a_later_try_earns_less():
    game = HintedNumber(factor=0.5, tries=3)
    assert game.reset({"prompt": "3 * 4 =", "answer": "12"}, 0) == "3 * 4 ="
    assert game.step(" no idea") == ("That is not a number. Try again.", 0.0, False)
    assert game.step(" 15.") == ("No, the answer is lower than 15. Try again.", 0.0, False)
    assert game.step(" 12.") == ("", 0.25, True)


def test_the_last_try_ends_the_episode():
    game = HintedNumber(tries=1)
    game.reset({"prompt": "?", "answer": "-2"}, 0)
    assert game.step("-3") == ("No, the answer is higher than -3. Try again.", 0.0, True)


@pytest.mark.parametrize(
    ("answer", "action", "is_right"), [("1,000", "1000", True), (7.0, "7", True), (7, "7.5", False)]
)
def test_a_number_is_right_however_it_is_written(answer, action, is_right):
    game = HintedNumber(tries=1)
    game.reset({"prompt": "?", "answer": answer}, 0)
    assert (game.step(action)[1] == 1.0) == is_right
