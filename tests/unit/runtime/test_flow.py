"""The flow joins queues, credits and ledger: handing on settles, rejecting leaves a tombstone, a stall has names."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from flowrl.errors import ChannelClosed, LastingError, RunError, StallError
from flowrl.graph.staleness import Admission
from flowrl.messages import Credit, encode
from flowrl.runtime.flow import Flow, StepLaw
from flowrl.runtime.ledger import Ledger
from flowrl.simulation.clock import run_virtual
from flowrl.telemetry.events import Status
from tests.support.flows import FlowSettings, flow, random_settings, run

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from pathlib import Path
    from typing import Any


def simple() -> FlowSettings:
    values = {"seed": 0, "steps": 2, "groups_per_step": 2, "window": 1, "max_staleness": 1, "generators": 1,
              "scorers": 1, "depth": 2, "token_s": 0.01, "sigma": 0.0, "update_s": 0.0, "score_s": 0.01,
              "train_s": 0.01, "filter_every": 0, "initial": 4}  # fmt: skip
    return FlowSettings(**values)  # pyright: ignore


def new_flow() -> Flow:
    return Flow(flow(simple()), Ledger(None))


def check(body: Coroutine[Any, Any, None]) -> None:
    run_virtual(body)


async def admit(f: Flow, key: int) -> None:
    assert await f.acquire("prompts.0", "prompts.credits") == key
    await f.put("prompts.0", "prompts.prompts", key, b"prompt")


def test_putting_downstream_settles_the_hold_upstream() -> None:
    async def body() -> None:
        f = new_flow()
        await admit(f, 0)
        await f.get("generator.0", "generator.prompts", 1)
        assert "generator.0 holds group 0" in f.waits()
        await f.put("generator.0", "generator.rollouts", 0, b"rollouts")
        assert f.release("generator.0").reissued == []  # nothing left to issue again

    check(body())


def test_what_a_dead_replica_held_is_issued_again() -> None:
    async def body() -> None:
        f = new_flow()
        await admit(f, 0)
        await f.get("generator.0", "generator.prompts", 1)
        assert f.release("generator.0").reissued == [0]
        assert await f.get("generator.1", "generator.prompts", 1) == [b"prompt"]

    check(body())


def test_a_rejected_group_returns_its_credit_and_leaves_a_tombstone() -> None:
    async def body() -> None:
        f = new_flow()
        for key in range(4):
            await admit(f, key)
            await f.get("generator.0", "generator.prompts", 1)
            await f.put("generator.0", "generator.rollouts", key, b"r")
            await f.get("scorer.0", "scorer.rollouts", 1)
        fifth = asyncio.create_task(f.acquire("prompts.0", "prompts.credits"))
        await asyncio.sleep(0)
        assert not fifth.done()
        await f.reject("scorer.0", "scorer.rollouts", 0, "failed", "broken")
        await fifth
        await f.put("scorer.0", "scorer.samples", 1, b"s1")
        assert await f.get("learner.0", "learner.samples", 1) == [b"s1"]  # group 0's place is skipped
        assert f.ledger.totals()["failed"] == 1

    check(body())


def noted(*groups: tuple[int, int]) -> StepLaw:
    """Return the law of two groups a version, at most 1 old, after groups were learned in (step, by version)."""
    law = StepLaw("learner", Admission(per_version=2, versions=None, max_staleness=1))
    for number, (step, oldest) in enumerate(groups):
        law.note(number, step=step, oldest=oldest)
    return law


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([(0, 0), (0, 0), (0, 0)], "learner: 3 groups are learned in step 0, and the staleness bound was proved of 2"),
        ([(0, 0), (1, 0)], "learner: 1 groups are learned in step 0, and"),
        ([(4, 4), (4, 4), (5, 4), (6, 5)], "learner: 1 groups are learned in step 5, and"),
        ([(2, 0)], "learner: group 0 is 2 versions old in step 2, more than max_staleness=1"),
    ],
)
def test_a_learner_that_takes_another_number_than_the_bound_was_proved_of_is_stopped(
    groups: list[tuple[int, int]], said: str
) -> None:
    with pytest.raises(LastingError, match=said):
        noted(*groups)


def test_a_learner_that_takes_what_it_said_goes_on_also_from_the_middle_and_to_a_short_end() -> None:
    noted((7, 6), (7, 7), (8, 7), (8, 8), (9, 9))


def test_the_flow_holds_its_learner_to_the_bound() -> None:
    async def body() -> None:
        f = new_flow()
        for key in range(3):
            await admit(f, key)
            for node, into, out in [("generator", "prompts", "rollouts"), ("scorer", "rollouts", "samples")]:
                await f.get(f"{node}.0", f"{node}.{into}", 1)
                await f.put(f"{node}.0", f"{node}.{out}", key, b"group")
        await f.get("learner.0", "learner.samples", 3)
        with pytest.raises(LastingError, match=r"3 groups are learned in step 0, .* was proved of 2"):
            await f.done("learner.0", "learner.samples", [0, 1, 2], 0, [0, 0, 0])
        assert f.ledger.totals()["learned"] == 2

    check(body())


def test_a_credit_returned_twice_is_an_error() -> None:
    async def body() -> None:
        f = new_flow()
        await admit(f, 0)
        await f.give_back("learner.0", "learner.released", encode(Credit(groups=[0])))
        with pytest.raises(RunError, match="twice"):
            await f.give_back("learner.0", "learner.released", encode(Credit(groups=[0])))

    check(body())


def test_a_stall_says_who_waits_for_what() -> None:
    async def body() -> None:
        f = new_flow()
        await admit(f, 0)
        waiting = asyncio.create_task(f.get("learner.0", "learner.samples", 1))
        with pytest.raises(StallError) as stalled:
            await f.watch(60.0)
        said = str(stalled.value)
        assert "learner.0 waits for input from scorer.samples -> learner.samples (next in order: group 0)" in said
        with pytest.raises(ChannelClosed):
            await waiting

    check(body())


def test_every_replicas_causes_add_up_to_its_age(tmp_path: Path) -> None:
    from flowrl.runtime.local import LocalOptions, run_local

    events: list[Any] = []
    options = LocalOptions(run_dir=tmp_path, is_virtual=True, consume=events.extend, status_interval_s=50.0)
    run_virtual(run_local(flow(random_settings(5)), options))
    last = {(e.node, e.replica): e for e in events if isinstance(e, Status)}
    assert {node for node, _ in last} == {"prompts", "generator", "scorer", "learner"}
    for status in last.values():
        assert sum(status.seconds.values()) == pytest.approx(status.time_s, abs=1e-6), status


def test_a_stages_error_ends_the_run_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowrl.errors import StageError
    from flowrl.simulation.fake import FakeTraining

    def broken(self: FakeTraining) -> dict[str, float]:
        raise ArithmeticError("out of numbers")

    monkeypatch.setattr(FakeTraining, "apply", broken)
    with pytest.raises(StageError, match=r"learner\.0: ArithmeticError: out of numbers"):
        run(flow(simple()), tmp_path)


def test_no_task_outlives_a_run(tmp_path: Path) -> None:
    from flowrl.runtime.local import LocalOptions, run_local

    async def body() -> None:
        await run_local(flow(simple()), LocalOptions(run_dir=tmp_path, is_virtual=True))
        assert len(asyncio.all_tasks()) == 1

    check(body())
