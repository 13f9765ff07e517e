"""Replays keep every law, are what the settings say, and are the same after a resume.

A failing schedule is named by its seed: `replaying(seed)` builds it again.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.config import Select
from flowrl.errors import ConfigError
from flowrl.graph.program import load_program
from flowrl.graph.staleness import staleness_bound
from flowrl.messages import Buffer, Sample, Samples, VersionSpan
from flowrl.runs.verify import judge
from flowrl.runtime.ledger import Entry, read_entries, surviving
from flowrl.stages.learner import Learner
from flowrl.stages.replay_buffer import Kept, ReplayBuffer, priority, weighted_sample
from flowrl.stages.sampler import Learning, Sampler
from tests.support.chaos import Chaos
from tests.support.flows import FlowSettings, flow, random_settings, run
from tests.support.recovery import UNLIMITED, faulty_settings, run_faulty

if TYPE_CHECKING:
    from flowrl.runtime.local import LocalWorkers

GRAPHS = Path(__file__).resolve().parents[3] / "graphs"
GRPO = Select(use="flowrl.algorithms.grpo:GRPO")


def replaying(seed: int, settings: FlowSettings, **replay: Any) -> FlowSettings:
    """Return the schedule with a replay buffer of random settings in front of the learner."""
    draw = random.Random(seed ^ 0xB0FFE2)
    drawn: dict[str, Any] = {
        "ratio": draw.choice([0.5, 1.0, 2.5]),
        "capacity": draw.choice([1, 4, 100]),
        "max_age": draw.randint(1, 5),
        "policy": draw.choice(["uniform", "newest", "priority"]),
        **replay,
    }
    per_version = max(2, settings.groups_per_step)
    initial = (settings.max_staleness + 1) * per_version
    return replace(settings, window=1, groups_per_step=per_version, initial=initial,
                   steps=settings.steps + 2, replay=ReplayBuffer.Config(**drawn))  # fmt: skip


def check_replays(s: FlowSettings, entries: list[Entry]) -> int:
    """Hold every step's replays against what it could draw from, reckoned from the ledger alone; returns how many."""
    alive = surviving(entries)
    assert judge(entries, max_staleness=s.max_staleness, is_finished=s.is_finite, max_age=s.replay.max_age).is_clean, s
    learned = [entry for entry in alive if entry.event == "learned"]
    replayed: dict[int, list[int]] = defaultdict(list)
    for entry in alive:
        if entry.event == "replayed":
            replayed[entry.step].append(entry.group)
    wanted = round(s.replay.ratio * s.groups_per_step)
    for step in range(s.steps):
        before = [entry for entry in learned if entry.step < step][-s.replay.capacity :]
        young = {entry.group for entry in before if step - entry.oldest <= s.replay.max_age}
        assert set(replayed[step]) <= young, (s, step)
        assert len(replayed[step]) == min(wanted, len(young)), (s, step)
        if s.replay.policy == "newest" and replayed[step]:
            assert set(replayed[step]) == set(sorted(young)[-len(replayed[step]) :]), (s, step)
    return sum(map(len, replayed.values()))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 16, 4))
def test_replays_break_no_law_in_random_schedules(first: int, tmp_path: Path) -> None:
    num_replayed = 0
    for seed in range(first, first + 4):
        settings = replaying(seed, random_settings(seed))
        ran = run(flow(settings), tmp_path / str(seed))
        staleness = [age for step in ran.steps for age in step.staleness]
        bound = staleness_bound(settings.initial, settings.groups_per_step, settings.window)
        assert max(staleness) <= bound <= settings.max_staleness, settings
        assert ran.outcome.totals["learned"] == settings.steps * settings.groups_per_step, settings
        num_replayed += check_replays(settings, read_entries(tmp_path / str(seed) / "ledger.jsonl"))
        counted = sum(step.metrics.get("replay.groups", 0.0) for step in ran.steps)
        assert counted == sum(
            entry.event == "replayed" for entry in read_entries(tmp_path / str(seed) / "ledger.jsonl")
        )
    assert num_replayed > 0


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 3, pytest.param(10, marks=pytest.mark.slow)])
def test_replays_break_no_law_under_crashes(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + (40 if first == 10 else 3)):
        settings = replaying(seed, faulty_settings(seed))
        run_faulty(seed, tmp_path / str(seed), settings=settings)
        check_replays(settings, read_entries(tmp_path / str(seed) / "ledger.jsonl"))


class Deaths(Chaos):
    """Kills the replay buffer, then the flow's host."""

    def __init__(self) -> None:
        super().__init__(0, loss=0.0)

    async def strike(self, workers: LocalWorkers) -> None:
        while self.deaths:
            await asyncio.sleep(2.2)  # long enough for a checkpoint in each attempt
            self.deaths -= 1
            await (workers.kill("replay.0") if self.deaths else _lose(workers))


async def _lose(workers: LocalWorkers) -> None:
    workers.lose_host()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["uniform", "newest", "priority"])
def test_a_resumed_run_replays_what_it_would_have_replayed(policy: Any, tmp_path: Path) -> None:
    settings = replaying(3, faulty_settings(3), ratio=1.0, capacity=5, max_age=1000, policy=policy)
    settings = replace(settings, steps=8, save_every=2, train_s=0.3, filter_every=5)
    run(flow(settings), tmp_path / "whole")
    deaths = Deaths()
    ran = run(flow(settings), tmp_path / "broken", chaos=deaths.strike, max_restarts=UNLIMITED)
    rollbacks = [e.step for e in read_entries(tmp_path / "broken" / "ledger.jsonl") if e.event == "rollback"]
    assert len(rollbacks) == ran.outcome.recoveries["rollback"] == 3
    assert all(version > 0 for version in rollbacks), "each from a checkpoint"

    def told(name: str) -> Counter[tuple[int, int]]:
        entries = surviving(read_entries(tmp_path / name / "ledger.jsonl"))
        return Counter((entry.step, entry.group) for entry in entries if entry.event == "replayed")

    assert told("whole") == told("broken")
    assert sum(told("whole").values()) == 7 * settings.groups_per_step, "in every step but the first"


def group(number: int, advantages: list[list[float]], *, version: int = 0, mask: list[float] | None = None) -> Samples:
    samples = [
        Sample(token_ids=Buffer.ints([1] * len(row)), logprobs=Buffer.floats([0.0] * len(row)), finish="stop", text="",
               versions=[VersionSpan(version, 0, len(row))], mask=None if mask is None else Buffer.floats(mask))
        for row in advantages
    ]  # fmt: skip
    columns = [Buffer.floats(row) for row in advantages]
    return Samples(
        group_id=number, token_ids=Buffer.ints([1]), columns={}, num_samples=len(samples), seed=0, samples=samples,
        generator="generator.0", scores={"a": [0.0] * len(samples)}, ref_logprobs=columns, advantages=columns,
    )  # fmt: skip


def test_priority_is_the_mean_size_of_the_policy_s_advantages() -> None:
    assert priority(group(0, [[1.0, -3.0], [2.0]])) == 2.0
    assert priority(group(0, [[1.0, 99.0, -3.0]], mask=[1.0, 0.0, 1.0])) == 2.0


def test_groups_are_drawn_by_priority_and_those_without_any_never() -> None:
    kept = [Kept(0, group(number, [[weight]]), weight) for number, weight in enumerate([0.0, 1.0, 3.0])]
    draw = random.Random(0)
    drawn = Counter(weighted_sample(kept, 1, draw)[0].group.group_id for _ in range(4000))
    assert drawn[0] == 0
    assert drawn[2] / 4000 == pytest.approx(0.75, abs=0.03)
    assert {each.group.group_id for each in weighted_sample(kept, 3, draw)} == {1, 2}


@pytest.mark.parametrize(
    ("replay", "algorithm", "said"),
    [
        ({"ratio": 0.1}, GRPO, "0.1 of 4 groups_per_step is no whole group; give 0.25 or more"),
        ({"ratio": 1.0}, Select(use="tests.support.flows:NullAlgorithm"), "NullAlgorithm has none"),
    ],
)
def test_replay_without_what_it_needs_is_refused(replay: Any, algorithm: Select, said: str) -> None:
    learning = Learning(algorithm=algorithm, steps=1, groups_per_step=4, max_staleness=1)
    stage = ReplayBuffer(ReplayBuffer.Config(**replay), Sampler(model="none"), learning)
    with pytest.raises(ConfigError, match=said):
        stage.check(print)


def test_the_group_graph_has_a_buffer_where_it_is_asked_for() -> None:
    def nodes(*overrides: str) -> set[str]:
        graph = load_program(GRAPHS / "group_async.py", config=None, overrides=list(overrides)).graph
        graph.check()
        return set(graph.nodes)

    assert nodes("replay.ratio=0.5") - nodes() == {"replay"}


@pytest.mark.parametrize(
    ("replays", "wrong"),
    [
        ([(1, 0, 0)], []),
        ([(0, 0, 0)], [0]),  # in the step that learned it
        ([(2, 9, 0)], [9]),  # never learned
        ([(1, 0, 0), (1, 0, 0)], [0]),  # twice in a step
        ([(3, 0, 0)], [0]),  # three versions old
    ],
)
def test_verify_sees_replays_that_are_wrong(replays: list[tuple[int, int, int]], wrong: list[int]) -> None:
    entries = [Entry(event="admitted", group=0), Entry(event="learned", group=0, step=0, oldest=0)]
    entries += [Entry(event="replayed", step=step, group=number, oldest=oldest) for step, number, oldest in replays]
    verdict = judge(entries, max_staleness=0, is_finished=True, max_age=2)
    assert verdict.misreplayed == wrong
    assert verdict.is_clean == (not wrong)
    assert verdict.counts["replayed"] == len(replays)


def test_replays_are_trained_on_in_every_minibatch_s_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four fresh groups and six replayed ones in two minibatches: five each, every group once."""
    from flowrl.simulation.fake import FakeTraining

    seen: list[list[bytes]] = []
    original = FakeTraining.accumulate

    def accumulate(self: Any, groups: Any, objective: Any) -> Any:
        seen.append([each.prompt_ids.data for each in groups])
        return original(self, groups, objective)

    monkeypatch.setattr(FakeTraining, "accumulate", accumulate)
    settings = replace(
        replaying(1, random_settings(1), ratio=1.5, capacity=100, max_age=1000, policy="uniform"),
        groups_per_step=4, initial=4, max_staleness=0, steps=4, filter_every=0,
    )  # fmt: skip
    graph = flow(settings)
    learner = graph.until
    assert isinstance(learner, Learner)
    halved = msgspec.structs.replace(learner.config, minibatches=2)
    learner.config = halved
    run(graph, tmp_path)
    sizes = [len(part) for part in seen]
    assert sizes == [2, 2, 4, 4, 5, 5, 5, 5], "4, then 4 + 4, then 4 + 6 groups"
    assert all(len(set(seen[2 * step] + seen[2 * step + 1])) == sizes[2 * step] * 2 for step in range(4))
