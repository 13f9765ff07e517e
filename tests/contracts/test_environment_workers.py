"""Environments in worker processes: whatever one does, the call ends in time, and only its own episode fails for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.errors import ConfigError, RewardError
from flowrl.rewards.isolated import check_loads
from flowrl.rewards.sessions import Episode, IsolatedEnvironments, Lost
from flowrl.rewards.worker import Playing
from tests.contracts.test_reward_workers import assert_gone

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

pytestmark = pytest.mark.slow

SOON_S = 60.0
TASK = {"prompt": "1 + 1 ="}


def playing(name: str, *, timeout_s: float = SOON_S, **options: Any) -> Playing:
    return Playing(environment=f"tests.support.games:{name}", where="agent.0", options=options, timeout_s=timeout_s)


def using(
    opening: Playing, directory: Path, body: Callable[[IsolatedEnvironments], Awaitable[Any]], num_workers: int = 1
) -> Any:
    async def run() -> Any:
        log = directory / "logs" / "worker.log"
        async with IsolatedEnvironments(opening, log=log, num_workers=num_workers, start_timeout_s=SOON_S) as all_:
            return await body(all_)

    return asyncio.run(run())


async def begun(episode: Episode) -> str:
    """Return the id of the process in which the episode has begun."""
    await episode.reset(TASK, 0)
    return (await episode.step("")).observation


async def ended(environments: IsolatedEnvironments, name: str, action: str) -> None:
    """Play an episode whose action is its last."""
    async with environments.episode(name) as episode:
        await begun(episode)
        await episode.step(action)


@pytest.mark.parametrize("name", ["Echo", "AsyncEcho"])
def test_episodes_of_one_process_do_not_mix(name: str, tmp_path: Path):
    async def body(environments: IsolatedEnvironments) -> None:
        async def one(number: int) -> None:
            async with environments.episode(f"group {number}, sample 0") as episode:
                first = await episode.reset({"position": number}, number)
                assert first.observation == f"play {number}"
                for turn in range(3):
                    observed = await episode.step(f"{number}.{turn}")
                    assert observed.observation == f"you said {number}.{turn}"
                assert observed.done

        async with asyncio.TaskGroup() as tasks:
            for number in range(6):
                tasks.create_task(one(number))

    using(playing(name, turns=3), tmp_path, body)


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("raise", "raised KeyError: 'gone'"),
        ("leave", "raised SystemExit: 3"),
        ("die", "its process died (exit code 7)"),
        ("hang", "no result after 4 s"),
    ],
)
def test_a_failure_names_its_episode_and_the_others_are_told_that_it_was_not_them(
    action: str, said: str, tmp_path: Path
):
    async def body(environments: IsolatedEnvironments) -> str:
        async with environments.episode("group 1, sample 0") as bystander:
            pid = await begun(bystander)
            with pytest.raises(RewardError) as caught:
                await ended(environments, "group 2, sample 1", action)
            assert str(caught.value).startswith("agent.0 (tests.support.games:Trouble), group 2, sample 1: ")
            assert said in str(caught.value)
            if action in ("raise", "leave"):
                assert (await bystander.step("")).observation == pid
            else:
                with pytest.raises(Lost):
                    await bystander.step("")
                assert_gone(int(pid))
        async with environments.episode("group 3, sample 0") as fresh:
            return await begun(fresh)

    last = using(playing("Trouble", timeout_s=4.0 if action == "hang" else SOON_S), tmp_path, body)
    assert_gone(int(last))


def test_a_bystander_is_told_also_when_the_process_is_running_again(tmp_path: Path):
    async def body(environments: IsolatedEnvironments) -> None:
        async with environments.episode("bystander") as bystander:
            await bystander.reset(TASK, 0)
            with pytest.raises(RewardError):
                await ended(environments, "culprit", "die")
            async with environments.episode("next") as fresh:
                await fresh.reset(TASK, 0)
                with pytest.raises(Lost):
                    await bystander.step("")

    using(playing("Trouble"), tmp_path, body)


def test_a_cancelled_call_leaves_no_process(tmp_path: Path):
    async def body(environments: IsolatedEnvironments) -> str:
        async with environments.episode("first") as episode:
            await episode.reset(TASK, 0)
            pid = (await episode.step("")).observation
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await episode.step("hang")
        return pid

    assert_gone(int(using(playing("Trouble"), tmp_path, body)))


def test_what_does_not_load_is_refused_before_anything_starts():
    check_loads(playing("Echo", turns=3))
    with pytest.raises(ConfigError, match="has no method 'step'"):
        check_loads(playing("NoStep"))
    with pytest.raises(ConfigError, match="does not take the options"):
        check_loads(playing("Echo", colour="red"))
