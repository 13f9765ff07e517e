"""A reward model that learns as people judge: which version scored a sample is known, whatever dies."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from flowrl.config import Select
from flowrl.errors import ConfigError
from flowrl.graph.graph import Graph, Queue
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Rollouts, Scored
from flowrl.runtime.ledger import read_entries
from flowrl.simulation.fake import FakeTraining
from flowrl.stages.humans import JUDGED
from flowrl.stages.online_reward import OnlineRewardModel, agreement, pair_of
from flowrl.stages.reward import add_scores
from flowrl.telemetry.records import read_samples, step_path
from tests.support.flows import run
from tests.support.recovery import UNLIMITED
from tests.support.tiny import tiny_model
from tests.unit.stages.test_selector import graph, scored

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.engines.base import TokenGroup
    from flowrl.graph.stage import Context
    from flowrl.messages import FloatArray
    from flowrl.runtime.local import LocalWorkers

STEPS, PER_STEP = 6, 4


class Steps(FakeTraining):
    """Scores a response by how often the model was trained, and a little by its length."""

    def score(self, groups: Sequence[TokenGroup]) -> list[list[FloatArray]]:
        self._spend("score", groups)
        return [[self._row(len(response)) for response in group.responses] for group in groups]

    def _row(self, length: int) -> FloatArray:
        return np.array([0.0] * (length - 1) + [worth(self.steps, length)], dtype=np.float32)


def worth(steps: int, length: int) -> float:
    return steps + length / 1024


class Half(Stage):
    """Judges every other group: sample i is worth i."""

    rollouts: In[Rollouts]
    scored: Out[Scored]

    def __init__(self, config: StageConfig) -> None:
        self.config = config

    async def run(self, context: Context) -> None:
        async for group in self.rollouts:
            found = add_scores(group, "people", [float(i) for i in range(len(group.samples))])
            await self.scored.put(msgspec.structs.replace(found, metrics={JUDGED: float(group.group_id % 2)}))


def taught(*, save_every: int = 0) -> Graph:
    judge = Half(StageConfig())
    bare = graph(steps=STEPS, per_step=PER_STEP, max_staleness=1, judge=judge, save_every=save_every)
    shared = bare.until.arguments
    config = OnlineRewardModel.Config(engine=f"{__name__}:Steps", clip=1000.0, epochs=2)
    model = OnlineRewardModel(config, shared["sampler"], shared["learning"])
    edges = [edge for edge in bare.edges if edge.source is not judge.scored]
    edges += [Queue(judge.scored, model.judged), Queue(model.scored, bare.nodes["select"].ports["scored"])]  # type: ignore[arg-type]
    return Graph(nodes={**bare.nodes, "reward_model": model}, edges=edges, until=bare.until)


def learned(run_dir: Path) -> list[Scored]:
    return [group for step in range(STEPS) for group in read_samples(step_path(run_dir / "rollouts", step))]


@pytest.mark.slow
def test_a_steps_groups_are_scored_by_the_model_as_it_stood_before_them(tmp_path: Path) -> None:
    run(taught(), tmp_path)
    groups = learned(tmp_path)
    assert len(groups) == STEPS * PER_STEP
    for group in groups:
        version = group.group_id // PER_STEP
        assert group.metrics["reward_model.version"] == version, "it learns what its last four groups taught"
        lengths = [len(sample.token_ids) for sample in group.samples]
        assert group.scores == {"reward_model": pytest.approx([worth(2 * version, length) for length in lengths])}
        assert ("reward_model.agreement" in group.metrics) == bool(group.group_id % 2), "of those that people judged"
        assert group.metrics.get("reward_model.pairs", 2.0 if version else None) == (2.0 if version else None)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["reward_model.0", "host"])
def test_the_version_that_scored_is_said_truly_whatever_dies(victim: str, tmp_path: Path) -> None:
    attempts: list[str] = []

    async def chaos(workers: LocalWorkers) -> None:
        await asyncio.sleep(2.2)
        attempts.append(victim)
        if len(attempts) > 1:
            return
        if victim == "host":
            workers.lose_host()
        else:
            await workers.kill(victim)

    run(taught(save_every=1), tmp_path, chaos=chaos, max_restarts=UNLIMITED)
    assert any(entry.event == "rollback" and entry.step > 0 for entry in read_entries(tmp_path / "ledger.jsonl"))
    versions: list[float] = []
    for group in learned(tmp_path):
        versions.append(group.metrics["reward_model.version"])
        lengths = [len(sample.token_ids) for sample in group.samples]
        assert group.scores == {"reward_model": pytest.approx([worth(2 * int(versions[-1]), each) for each in lengths])}
    assert len(versions) == STEPS * PER_STEP
    assert versions == sorted(versions)
    assert versions[-1] == STEPS - 1, "no step is learned twice, and none forgotten"


def test_what_people_said_makes_a_pair() -> None:
    assert pair_of(scored([0.25, 1.0, 0.5])) == [1, 0]
    assert pair_of(scored([0.5, 0.5])) == [], "a tie teaches nothing"
    assert [agreement(2.0, 1.0), agreement(1.0, 1.0), agreement(1.0, 2.0)] == [1.0, 0.5, 0.0]


@pytest.mark.slow
def test_an_objective_that_makes_no_reward_model_is_refused(tmp_path: Path) -> None:
    bare = graph(steps=1, per_step=1, max_staleness=1).until.arguments
    sampler = msgspec.structs.replace(bare["sampler"], model=str(tiny_model(tmp_path / "model")))
    config = OnlineRewardModel.Config(objective=Select(use="flowrl.algorithms.dpo:DPO"))
    with pytest.raises(ConfigError, match=r"reward_model.objective: flowrl.algorithms.dpo:DPO makes no reward model"):
        OnlineRewardModel(config, sampler, bare["learning"]).check(lambda _: None)
