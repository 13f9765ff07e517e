"""Laws 1, 2, 3 and 5 on the virtual clock, under random speeds, tails, depths, windows and replicas.

A failing schedule is named by its seed: `random_settings(seed)` builds it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flowrl.errors import RunError
from flowrl.graph.staleness import staleness_bound
from flowrl.runtime.channels import CreditsChannel, RegisterChannel
from tests.support.flows import flow, random_settings, run

if TYPE_CHECKING:
    from pathlib import Path


def check_schedule(seed: int, run_dir: Path) -> None:
    settings = random_settings(seed)
    ran = run(flow(settings), run_dir)
    totals = ran.outcome.totals
    staleness = [age for step in ran.steps for age in step.staleness]
    bound = staleness_bound(settings.initial, settings.groups_per_step, settings.window)
    assert max(staleness) <= bound <= settings.max_staleness, settings
    assert totals["learned"] == len(staleness) == settings.steps * settings.groups_per_step, settings
    ended = totals["learned"] + totals["filtered"] + totals["failed"]
    assert totals["admitted"] == ended + totals["unfinished"], settings
    assert totals["unfinished"] <= (0 if settings.is_finite else settings.initial), settings
    lines = (run_dir / "ledger.jsonl").read_text().splitlines()
    assert len(lines) == totals["admitted"] + ended, "the file tells the same story"


@pytest.mark.parametrize("first", range(0, 60, 6))
def test_sixty_random_schedules_keep_the_laws(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 6):
        check_schedule(seed, tmp_path / str(seed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", [60, *(pytest.param(first, marks=pytest.mark.long) for first in range(310, 3060, 250))]
)
def test_three_thousand_more_random_schedules_keep_the_laws(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 250):
        check_schedule(seed, tmp_path / str(seed))


@pytest.mark.slow
def test_max_staleness_zero_is_synchronous(tmp_path: Path) -> None:
    for seed in range(40):
        settings = random_settings(seed)
        if settings.max_staleness == 0:
            ran = run(flow(settings), tmp_path / str(seed))
            assert {age for step in ran.steps for age in step.staleness} == {0}


@pytest.mark.slow
def test_a_credit_returned_at_publish_breaks_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 2's reason: without the acknowledgement the bound is broken in some of these very schedules."""

    async def put_without_waiting(self: RegisterChannel, version: int, body: bytes) -> None:
        self.version, self.body = version, body
        for future, _ in self._readers:
            self._readers.grant(future)

    monkeypatch.setattr(RegisterChannel, "put", put_without_waiting)
    broken = 0
    for seed in range(60):
        try:
            run(flow(random_settings(seed)), tmp_path / str(seed))
        except RunError as error:
            assert "versions old" in str(error)  # noqa: PT017
            broken += 1
    assert broken > 0


@pytest.mark.slow
def test_one_credit_too_many_is_caught_by_the_learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner holds every sample against the bound, so a defect in the credits cannot pass unseen."""
    original = CreditsChannel.__init__

    def generous(self: CreditsChannel, name: str, *, initial: int, **options: Any) -> None:
        original(self, name, initial=3 * initial + 2, **options)

    monkeypatch.setattr(CreditsChannel, "__init__", generous)
    broken = 0
    for seed in range(60):
        try:
            run(flow(random_settings(seed)), tmp_path / str(seed))
        except RunError:
            broken += 1
    assert broken > 0
