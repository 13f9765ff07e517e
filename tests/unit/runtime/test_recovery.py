"""Random schedules with crashes, lost, doubled and late calls: nothing lost, nothing twice, nothing too stale.

A failing schedule is named by its seed: `run_faulty(seed, directory)` runs it again alone. A few dozen run here with
every change, ten thousand in the slow tier.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.errors import FlowrlError, LastingError, RewardError, StageError
from flowrl.runtime.flow import MAX_DEATHS
from flowrl.runtime.local import LocalOptions, run_local
from flowrl.simulation.clock import run_virtual
from flowrl.telemetry.events import Notice, Recovery
from tests.support.bugs import BUGS, planted
from tests.support.chaos import Chaos
from tests.support.flows import flow
from tests.support.recovery import FULL, SHARES, UNLIMITED, check_share, faulty_settings, run_faulty

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flowrl.runtime.calls import Call
    from flowrl.runtime.local import Carry, LocalWorkers

LONG_FROM = 100 + FULL // SHARES  # those from here on are for `scripts/test.sh --all`


@pytest.mark.parametrize("first", range(0, 30, 5))
def test_thirty_faulty_schedules_keep_the_laws(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 5):
        run_faulty(seed, tmp_path / str(seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(first, marks=[pytest.mark.long] if first >= LONG_FROM else [])
        for first in range(100, 100 + FULL, FULL // SHARES)
    ],
)
def test_ten_thousand_faulty_schedules_keep_the_laws(first: int) -> None:
    check_share(first, run_faulty)


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, bug)
    for seed in range(300):
        try:
            run_faulty(seed, tmp_path / str(seed))
        except (AssertionError, FlowrlError):
            return
    pytest.fail(f"{bug}: 300 schedules saw nothing")


class OneDeath:
    """Kill one replica at its n-th call to the flow, before the call is made or after it was carried out."""

    def __init__(self, replica: str, number: int, *, is_before: bool) -> None:
        self.replica, self.number, self.is_before = replica, number, is_before
        self.workers: LocalWorkers | None = None
        self.has_struck = False

    @property
    def struck(self) -> list[str]:
        return [f"{self.replica} at call {self.number}"]

    def link(self, carry: Carry) -> Carry:
        async def through(call: Call) -> Any:
            is_it = call.replica == self.replica and call.number == self.number and call.incarnation == 0
            if is_it and not self.has_struck and self.workers is not None:
                self.has_struck = True
                if not self.is_before:
                    await carry(call)
                self.workers._tasks[self.replica].cancel()
                await asyncio.sleep(1e9)  # the dead hear nothing any more
            return await carry(call)

        return through

    async def strike(self, workers: LocalWorkers) -> None:
        self.workers = workers


@pytest.mark.slow
@pytest.mark.parametrize("is_before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("replica", ["prompts.0", "generator.0", "scorer.0", "learner.0"])
def test_a_death_at_every_call_to_the_flow_costs_nothing(replica: str, is_before: bool, tmp_path: Path) -> None:
    number = 0
    while True:
        settings = replace(faulty_settings(3), steps=3, groups_per_step=2, initial=4, max_staleness=1, window=1,
                           update_s=0.05, token_s=0.001, score_s=0.01, train_s=0.02)  # fmt: skip
        death = OneDeath(replica, number, is_before=is_before)
        run_faulty(number, tmp_path / str(number), chaos=death, settings=settings)  # type: ignore[arg-type]
        if not death.has_struck:
            break
        number += 1
    assert number > 5, "the replica made calls to die at"


def test_a_group_that_kills_its_holder_each_time_is_quarantined_alone(tmp_path: Path) -> None:
    settings = replace(
        faulty_settings(1), steps=2, groups_per_step=3, initial=6, max_staleness=1, generators=2, window=1
    )
    poison = 2
    notices: list[Any] = []

    class Poison:
        workers: LocalWorkers

        async def attend(self, workers: LocalWorkers) -> None:
            self.workers = workers

        def link(self, carry: Carry) -> Carry:
            async def through(call: Call) -> Any:
                if call.method == "put" and call.replica.startswith("generator") and call.arguments[1] == poison:
                    self.workers._tasks[call.replica].cancel()
                    await asyncio.sleep(1e9)
                return await carry(call)

            return through

    poisonous = Poison()
    options = LocalOptions(run_dir=tmp_path, is_virtual=True, consume=notices.extend, link=poisonous.link,
                           chaos=poisonous.attend, max_restarts=UNLIMITED, stall_timeout_s=10_000.0)  # fmt: skip
    outcome = run_virtual(run_local(flow(settings), options))
    assert outcome.totals["failed"] == 1
    assert outcome.totals["learned"] == settings.steps * settings.groups_per_step
    assert outcome.recoveries["generator"] == MAX_DEATHS
    assert [path.name for path in (tmp_path / "quarantine").iterdir()] == [f"group-{poison}.json"]
    assert any(isinstance(e, Notice) and e.level == "error" and f"group {poison}" in e.text for e in notices)


def test_a_spent_budget_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    class Doom(Chaos):
        async def strike(self, workers: LocalWorkers) -> None:
            while True:
                await super().strike(workers)

    settings = replace(faulty_settings(2), train_s=100.0)  # nothing is learned before the deaths
    doom = Doom(0, deaths=50, mean_s=0.01, fatal=0.0, loss=0.0)
    options = LocalOptions(run_dir=tmp_path, is_virtual=True, chaos=doom.strike, max_restarts=2, stall_timeout_s=1e6)
    with pytest.raises(FlowrlError, match="and 2 times before, with nothing learned between"):
        run_virtual(run_local(flow(settings), options))


@pytest.mark.parametrize(
    ("raised", "said", "num_restarts"),
    [
        (lambda count: StageError("generator.0", "KeyError: 'gone'"), "'gone' .and the same again after a restart", 1),
        (lambda count: RewardError("reward.0", "raised OSError"), "raised OSError .and the same again after", 1),
        (lambda count: StageError("generator.0", f"<Row at 0x7f{count:04x}>"), "> .and the same again after", 1),
        (lambda count: LastingError("reward.0", "8 groups have failed"), "8 groups have failed", 0),
        (lambda count: StageError("generator.0", f"request {count} failed"), "failed .and 3 times before", 3),
    ],
)
def test_a_fault_that_comes_back_as_it_was_is_not_tried_again_and_again(
    raised: Callable[[int], FlowrlError], said: str, num_restarts: int, tmp_path: Path
) -> None:
    count = 0
    events: list[Any] = []

    def link(carry: Carry) -> Carry:
        async def through(call: Call) -> Any:
            nonlocal count
            if call.method == "put" and call.replica.startswith("generator"):
                count += 1
                raise raised(count)
            return await carry(call)

        return through

    options = LocalOptions(run_dir=tmp_path, is_virtual=True, consume=events.extend, link=link, stall_timeout_s=1e6)
    settings = replace(faulty_settings(2), generators=1)
    with pytest.raises(type(raised(0)), match=said):
        run_virtual(run_local(flow(settings), options))
    assert sum(isinstance(event, Recovery) for event in events) == num_restarts
