"""Graphs that learn from people, on torch: what people say of a policy is learned, and what they do not say is not."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from flowrl.data.judgments import JUDGMENTS, QUESTIONS, Closed, Judgment, JudgmentFile, Question, Tail
from flowrl.graph.program import load_program
from flowrl.runtime.local import LocalOptions, run_local
from flowrl.telemetry.events import Step
from flowrl.telemetry.records import read_samples, step_path
from tests.support.command import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.telemetry.events import Event

pytestmark = pytest.mark.slow

TORCH, STEPS, PER_STEP = "flowrl.engines.torch:TorchEngine", 3, 4


async def _rater(run_dir: Path) -> None:
    """Prefer the greater of what the fake engine wrote."""
    tail, file = Tail(run_dir / QUESTIONS, Question | Closed), JudgmentFile(run_dir / JUDGMENTS, now=lambda: 0.0)
    while True:
        await asyncio.sleep(0.05)
        for each in tail.read():
            if isinstance(each, Question):
                verdict = "left" if each.answers[0] > each.answers[1] else "right"
                file.add(Judgment(key=each.id, question=each.id, rater="ann", verdict=verdict))


def steps_of(graph: str, tiny: Path, run_dir: Path, **more: object) -> list[dict[str, float]]:
    """Run a graph with a rater before it; returns the figures of its steps."""
    fixed: dict[str, object] = {
        "runtime": "local", "model": tiny, "steps": STEPS, "data.num_train": 40, "humans.undo_s": 0,
        "data.num_heldout": 0, "generator.engine": "flowrl.simulation.fake:FakeGeneration", "learner.engine": TORCH,
        "learner.dtype": "float32", "learner.lr": 1e-3, **more,
    }  # fmt: skip
    program = load_program(
        ROOT / "graphs" / f"{graph}.py", overrides=[f"{name}={each}" for name, each in fixed.items()]
    )
    events: list[Event] = []
    run_dir.mkdir(exist_ok=True)

    async def both() -> None:
        async with asyncio.TaskGroup() as tasks:
            rating = tasks.create_task(_rater(run_dir))
            await run_local(program.graph, LocalOptions(run_dir=run_dir, consume=events.extend, stall_timeout_s=600.0))
            rating.cancel()

    asyncio.run(both())
    return [event.metrics for event in events if isinstance(event, Step)]


def test_a_pair_is_learned_for_each_group_that_people_are_not_asked_about(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{k}", "chosen": "yes", "rejected": "no"} for k in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"groups_per_step": PER_STEP, "humans.asked": 0.5, "reference.dtype": "float32",
            "offline.data.source": tmp_path / "pairs.jsonl"}  # fmt: skip
    steps = steps_of("humans_dpo", tiny, tmp_path / "run", **more)
    assert [step["samples"] for step in steps] == [2 * PER_STEP] * STEPS
    groups = [each for step in range(STEPS) for each in read_samples(step_path(tmp_path / "run/rollouts", step))]
    given = [[sample.text.removesuffix("<eos>") for sample in each.samples] for each in groups if not each.generator]
    assert given
    assert all(pair == given[0] for pair in given)
    assert [step["judged"] for step in steps] == [
        sum(bool(each.generator) for each in groups[k : k + PER_STEP]) / PER_STEP
        for k in range(0, len(groups), PER_STEP)
    ]
    for first, second in ((each.samples[0].text, each.samples[1].text) for each in groups if each.generator):
        assert first > second, "what the rater prefers is chosen"
    assert "logprob_gap.mean" in steps[0]


def test_ppo_is_rewarded_by_a_model_that_learns_what_people_say(tiny: Path, tmp_path: Path) -> None:
    engines = {f"{node}.{name}": each for node in ("reward_model", "critic") for name, each in
               (("engine", TORCH), ("dtype", "float32"))}  # fmt: skip
    more = {"groups_per_step": PER_STEP, "reference.dtype": "float32", **engines}
    steps = steps_of("humans_ppo", tiny, tmp_path, **more, **{"reward_model.lr": 1e-2, "reward_model.epochs": 2})
    assert [step["reward_model.version"] for step in steps] == [0.0, 1.0, 2.0]
    assert [step["reward_model.pairs"] for step in steps[1:]] == [PER_STEP * step["judged"] for step in steps[:-1]]
    assert steps[0]["score.reward_model"] == pytest.approx(0.0, abs=1e-6), "a head that has learned nothing says 0"
    assert steps[0]["reward_model.agreement"] == pytest.approx(0.5)
    assert steps[-1]["score.reward_model"] != steps[0]["score.reward_model"]
    assert is_classifier(tmp_path / f"checkpoints/step-00000{STEPS}/reward_model/model")


def test_a_reward_model_learns_pairs_as_people_decide_them(tiny: Path, tmp_path: Path) -> None:
    steps = steps_of("humans_reward", tiny, tmp_path, examples_per_step=PER_STEP)
    assert [step["samples"] for step in steps] == [2 * PER_STEP] * STEPS
    assert steps[0]["loss"] == pytest.approx(0.693, abs=1e-3)
    assert is_classifier(tmp_path / f"checkpoints/step-00000{STEPS}/model")


def is_classifier(directory: Path) -> bool:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(directory).config.num_labels == 1
