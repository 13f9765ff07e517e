"""Rejection sampling and iterative DPO learn, of what is sampled, exactly what the rewards select."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from flowrl.engines.base import Ranks, TrainingConfig
from flowrl.engines.torch import TorchEngine
from flowrl.graph.program import load_program
from flowrl.runtime.local import LocalOptions, run_local
from flowrl.stages.tokens import token_group
from flowrl.telemetry.events import Event, Step
from flowrl.telemetry.records import read_samples, step_path
from tests.support.command import ROOT
from tests.support.tiny import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

TORCH, BETA = "flowrl.engines.torch:TorchEngine", 0.1


def digit(completions: list[str]) -> list[float]:
    """Reward the digit that the fake engine wrote."""
    return [float(text) for text in completions]


@pytest.mark.parametrize("graph", ["rejection", "iterative_dpo", "distill_online"])
def test_the_selected_samples_are_learned(graph: str, tiny: Path, tmp_path: Path):
    settings: dict[str, object] = {
        "runtime": "local", "model": tiny, "steps": 2, "groups_per_step": 2, "data.num_train": 40,
        "data.num_heldout": 2, "generator.engine": "flowrl.simulation.fake:FakeGeneration", "generator.group_size": 3,
        "reward.function": f"{__name__}:digit", "reward.isolation": "thread", "learner.engine": TORCH,
        "learner.dtype": "float32", "learner.lr": 1e-3,
    }  # fmt: skip
    num_samples = {"rejection": 1, "iterative_dpo": 2, "distill_online": 3}[graph]
    if graph == "distill_online":
        settings |= {"objective.teacher": tiny_model(tmp_path / "teacher", seed=7)}
    else:
        settings |= {"select.min_reward": 1}
    if graph == "iterative_dpo":
        settings |= {"reference.dtype": "float32", "objective.beta": BETA}
    overrides = [f"{name}={value}" for name, value in settings.items()]
    program = load_program(ROOT / "graphs" / f"{graph}.py", overrides=overrides)
    events: list[Event] = []
    options = LocalOptions(run_dir=tmp_path, consume=events.extend, stall_timeout_s=600.0)
    asyncio.run(run_local(program.graph, options))
    first, second = (event.metrics for event in events if isinstance(event, Step))
    groups = read_samples(step_path(tmp_path / "rollouts", 0))
    assert all(len(group.samples) == num_samples for group in groups)
    assert num_samples == 3 or all(group.rewards == sorted(group.rewards, reverse=True) for group in groups)
    engine = TorchEngine(TrainingConfig(model=str(tiny), dtype="float32"), where="test", name="test")
    engine.open(Ranks())
    rows = [row for group in engine.score([token_group(group) for group in groups]) for row in group]
    engine.close()
    assert first["tokens"] == sum(map(len, rows))
    if graph == "distill_online":
        assert first["kl"] == pytest.approx(first["loss"])
        assert second["kl"] < first["kl"]
    elif graph == "rejection":
        assert first["loss"] == pytest.approx(-np.concatenate(rows).mean(), rel=1e-4)
        assert first["reward.sampled"] <= first["reward.mean"] == first["reward.best"]
    else:
        assert first["loss"] == pytest.approx(np.log(2.0), abs=1e-5), "the policy begins as the reference"
        assert first["margin"] == pytest.approx(0.0, abs=1e-5)
        references = [buffer.numpy() for group in groups for buffer in group.ref_logprobs]
        assert np.concatenate(rows) == pytest.approx(np.concatenate(references), abs=1e-5)
    assert second["loss"] != first["loss"]


def test_of_a_critique_the_last_turn_is_written_and_nothing_that_was_not_revised(tiny: Path, tmp_path: Path):
    settings = {
        "runtime": "local", "model": tiny, "data.num_train": 6, "sampling.max_tokens": 4, "agent.max_model_len": 512,
        "agent.engine": "flowrl.simulation.fake:FakeGeneration", "agent.isolation": "thread",
    }  # fmt: skip
    program = load_program(ROOT / "graphs" / "critique.py", overrides=[f"{name}={v}" for name, v in settings.items()])
    events: list[Event] = []
    options = LocalOptions(run_dir=tmp_path, consume=events.extend, stall_timeout_s=60.0)
    asyncio.run(run_local(program.graph, options))
    rows = [json.loads(line) for line in (tmp_path / "data" / "train-000000.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert {row["score.Revision"] for row in rows} == {1.0}
    for row in rows:
        (answer,) = row["completion"]
        assert answer["role"] == "assistant"
        assert len(answer["content"]) <= 4
        assert row["num_tokens"] > 100  # the whole episode was played
