"""Run a random flow under random faults and hold what came of it against the laws."""

from __future__ import annotations

import asyncio
import random
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.errors import FlowrlError
from flowrl.graph.staleness import staleness_bound
from flowrl.runs.verify import Verdict, judge
from flowrl.runtime.ledger import ENDINGS, Entry, read_entries, surviving
from flowrl.runtime.local import LocalOptions, Outcome, run_local
from flowrl.simulation.clock import run_virtual
from tests.support.chaos import Chaos
from tests.support.flows import FlowSettings, ObservedLearner, flow, random_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowrl.telemetry.events import Event

UNLIMITED = 1_000_000
MEMORY = Path("/dev/shm")
FULL = 10_000  # schedules
SHARES = 20  # tests they are spread over, for several processes


def check_share(first: int, check: Callable[[int, Path], object]) -> None:
    """Run a test's share of the ten thousand schedules, from seed `first` on; says all that are wrong at once."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as directory:
        for seed in range(first, first + FULL // SHARES):
            try:
                check(seed, Path(directory) / str(seed))
            except (AssertionError, FlowrlError) as error:
                wrong.append(f"seed {seed}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong[:5])


def faulty_settings(seed: int) -> FlowSettings:
    """Return a random flow that checkpoints now and then and ends with nothing in flight."""
    draw = random.Random(seed ^ 0x5EED)
    drawn = random_settings(seed)
    return replace(drawn, is_finite=True, save_every=draw.randint(1, 3), steps=min(drawn.steps, 4))


def run_faulty(
    seed: int, run_dir: Path, *, chaos: Chaos | None = None, settings: FlowSettings | None = None
) -> Verdict:
    """Run schedule `seed` to its end; returns the verdict.

    Raises:
        AssertionError: a law is broken or a task is left; the message names the seed.
    """
    settings = settings or faulty_settings(seed)
    chaos = chaos or Chaos(seed, deaths=random.Random(seed).randint(0, 4))
    events: list[Event] = []

    async def body() -> Outcome:
        options = LocalOptions(
            run_dir=run_dir, is_virtual=True, consume=events.extend, status_interval_s=500.0,
            stall_timeout_s=50_000.0, link=chaos.link, chaos=chaos.strike, max_restarts=UNLIMITED,
        )  # fmt: skip
        outcome = await run_local(flow(settings), options)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"seed {seed}: {len(left)} tasks are left"
        return outcome

    outcome: Any = run_virtual(body())
    entries = read_entries(run_dir / "ledger.jsonl")
    bound = staleness_bound(settings.initial, settings.groups_per_step, settings.window)
    verdict = judge(entries, max_staleness=min(bound, settings.max_staleness), is_finished=True)
    said = f"seed {seed}, {settings}, struck {chaos.struck}"
    assert verdict.is_clean, f"{said}: {verdict}"
    assert verdict.counts["learned"] == settings.steps * settings.groups_per_step, said
    assert verdict.counts["admitted"] == sum(verdict.counts[name] for name in ENDINGS), said
    for entry in surviving(entries):
        if entry.event == "learned":
            oldest = ObservedLearner.seen[str(run_dir), entry.step, entry.group]
            assert oldest == entry.oldest, f"{said}: group {entry.group} is of {oldest}, the ledger says {entry.oldest}"
    ObservedLearner.seen.clear()
    check_order(surviving(entries), settings.window, said)
    for step in range(settings.steps):
        groups = [e.group for e in surviving(entries) if e.event == "learned" and e.step == step]
        assert len(groups) == settings.groups_per_step, f"{said}: step {step} learned {groups}"
    assert outcome.totals["learned"] == verdict.counts["learned"], said
    return verdict


def check_order(alive: list[Entry], window: int, said: str) -> None:
    """Insist that every group was learned within the window of the oldest one that had not ended then."""
    ended: set[int] = set()
    oldest = 0
    for entry in alive:
        if entry.event not in ENDINGS:
            continue
        if entry.event == "learned":
            assert entry.group < oldest + window, f"{said}: group {entry.group} was learned while {oldest} was out"
        ended.add(entry.group)
        while oldest in ended:
            oldest += 1
