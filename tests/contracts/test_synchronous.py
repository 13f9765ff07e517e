"""Law 1: `max_staleness=0` is exactly synchronous training.

The whole graph, with real models in float32, an adaptive KL coefficient and a pre-training loss beside the policy's,
against a plain loop over the rollouts it recorded: losses, values and final weights must be equal bit for bit.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.algorithms.return_scale import ReturnScale
from flowrl.config import Select
from flowrl.engines.base import Ranks, Sampling, Schedule, TrainingConfig
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.messages import Buffer, Referenced, Rollouts, Samples, extend
from flowrl.runtime.local import LocalOptions, run_local
from flowrl.stages.critic import Critic, begun, explained_variance, in_units
from flowrl.stages.estimation import Estimation, load_algorithm
from flowrl.stages.examples import example_of
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference
from flowrl.stages.reward import Reward
from flowrl.stages.sampler import Learning, Sampler
from flowrl.stages.step import step_groups
from flowrl.stages.texts import TextSource
from flowrl.stages.tokens import example_group, token_group
from flowrl.telemetry.events import Event, Step
from tests.support.flows import NumberedPrompts
from tests.support.offline import Rows, example_row

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.stage import Context
    from flowrl.stages.reward import Score

pytestmark = pytest.mark.slow

STEPS, GROUPS, SIZE = 6, 4, 2
PPO = Select(use="flowrl.algorithms.ppo:PPO", options={"kl": {"coef": 0.1, "target": 0.5, "horizon": 20}})
VALUE = Select(use="flowrl.algorithms.value:ValueLoss")
PRETRAINING = Select(use="flowrl.algorithms.pretraining:Pretraining", options={"coef": 0.2})
TEXTS = Rows([example_row([3, 4], [[5 + k, 6, 7 + k]]) for k in range(5)])
TEXTS_PER_STEP = 2
TORCH = "flowrl.engines.torch:TorchEngine"
recorded: list[Rollouts] = []


def digits(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that depends on every token."""
    return [sum(ids) % 7 / 7.0 for ids in completion_ids]


class NumberedTexts(TextSource):
    """Texts without a tokenizer."""

    def load(self) -> Any:
        return TEXTS


class RecordingReward(Reward):
    """Keeps what it is given, for the plain loop."""

    async def _score(self, context: Context, function: Score) -> None:
        async def score(group: Rollouts) -> list[float]:
            recorded.append(group)
            return await function(group)

        await super()._score(context, score)


def settings(model: Path, head: str, lr: float) -> dict[str, Any]:
    return {"model": str(model), "head": head, "lr": lr, "dtype": "float32", "schedule": Schedule(kind="constant")}


def graph(model: Path, *, records: bool = False, reward_type: type[Reward] = RecordingReward) -> Graph:
    sampler = Sampler(model=str(model), sampling=Sampling(max_tokens=6), group_size=SIZE, seed=1)
    learning = Learning(algorithm=PPO, steps=STEPS, groups_per_step=GROUPS, max_staleness=0)
    constant = Schedule(kind="constant")
    prompts = NumberedPrompts(Prompts.Config(), sampler)
    generator = Generator(
        Generator.Config(replicas=2, engine="flowrl.simulation.fake:FakeGeneration",
                         engine_options={"costs": {"decode": {"step_s": 0.001}}}),
        sampler,
    )  # fmt: skip
    reward = reward_type(Reward.Config(function=f"{__name__}:digits"))
    reference = Reference(Reference.Config(engine=TORCH, dtype="float32"), sampler)
    trained = {"engine": TORCH, "dtype": "float32", "lr": 1e-3, "schedule": constant}
    policy = Learner.Config(**trained, save_rollouts=records, save_every=int(records))
    critic = Critic(Critic.Config(**trained), sampler, learning, policy)
    learner = Learner(policy, sampler, learning, TextSource.Config(per_step=TEXTS_PER_STEP, coef=0.2))
    texts = NumberedTexts(learner.beside, model=str(model))
    nodes = {"prompts": prompts, "generator": generator, "reward": reward, "reference": reference, "critic": critic,
             "texts": texts, "learner": learner}  # fmt: skip
    return Graph(
        nodes=nodes,
        edges=[
            Queue(prompts.prompts, generator.prompts, depth=4),
            Queue(generator.rollouts, reward.rollouts, depth=4),
            Queue(reward.scored, reference.scored, depth=4),
            Queue(reference.referenced, critic.referenced),
            Queue(critic.samples, learner.samples),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits, is_endless=True),
            Queue(learner.wanted, texts.wanted, depth=1),
            Queue(texts.texts, learner.texts, depth=1, most=1),
        ],
        until=learner,
    )


def plain_loop(model: Path, rollouts: list[Rollouts], name: str) -> tuple[list[dict[str, float]], Any]:
    """Train on recorded rollouts, one step after the other, with the engines alone."""
    from flowrl.engines.torch import TorchEngine

    def opened(head: str, lr: float) -> TorchEngine:
        config = TrainingConfig(**settings(model, head, lr))
        engine = TorchEngine(config, where=head, name=f"{name}-{head}-{lr}")
        engine.open(Ranks())
        return engine

    policy, critic, frozen = opened("policy", 1e-3), opened("value", 1e-3), opened("policy", 0.0)
    estimation = Estimation(PPO, load_algorithm(PPO, group_size=SIZE, has_critic=True))
    figures: list[dict[str, float]] = []
    scale, earned = ReturnScale(), list[float]()
    for first in range(0, STEPS * GROUPS, GROUPS):
        batch: list[Samples] = []
        before: list[ReturnScale] = []
        for group in rollouts[first : first + GROUPS]:
            rows = frozen.score([token_group(group)])[0]
            scores = digits([sample.token_ids.tolist() for sample in group.samples])
            referenced = extend(
                Referenced, group, scores={"digits": scores}, ref_logprobs=[Buffer.floats(row) for row in rows]
            )
            known = scale if scale.weight else begun(estimation.algorithm, referenced, earned)
            before.append(known)
            values = [known.mean + known.unit * row for row in critic.score([token_group(referenced)])[0]]
            batch.append(extend(Samples, referenced, **estimation.advantages(referenced, values)))
        valued = [token_group(group) for group in batch]
        explained = explained_variance(valued) if scale.weight else {}
        scale = scale.seen([each for group in batch for row in group.returns or [] for each in row.tolist()])
        units = [in_units(group, known, scale) for group, known in zip(valued, before, strict=True)]
        learned = critic.accumulate(units, VALUE) | critic.apply()
        del learned["value_clip_frac"]
        estimation.figures = {f"critic.{name}": value for name, value in learned.items()} | explained
        step = first // GROUPS
        found = policy.accumulate(step_groups(estimation.algorithm, batch, step), PPO)
        places = range(step * TEXTS_PER_STEP, (step + 1) * TEXTS_PER_STEP)
        texts = [example_group(example_of(TEXTS.row_at(place), place, None)) for place in places]
        found |= {f"texts.{name}": value for name, value in policy.accumulate(texts, PRETRAINING).items()}
        figures.append(found | batch[0].metrics | policy.apply())
        estimation.end_step()
    weights = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    for engine in (policy, critic, frozen):
        engine.close()
    return figures, weights


def test_synchronous_training_equals_a_plain_loop_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    """In a process of their own: what lm-eval and vLLM set for all of theirs changes the last bits of a thread's."""
    from torch.multiprocessing import start_processes

    start_processes(compare, (tiny, tmp_path), start_method="forkserver")


def compare(_: int, tiny: Path, tmp_path: Path) -> None:
    """Train by the flow and by the plain loop, and hold one against the other."""
    import torch
    from safetensors.torch import load_file

    recorded.clear()
    events: list[Event] = []
    options = LocalOptions(run_dir=tmp_path / "run", consume=events.extend, stall_timeout_s=600.0)
    asyncio.run(run_local(graph(tiny), options))
    steps = [event for event in events if isinstance(event, Step)]
    assert len(steps) == STEPS
    assert {age for step in steps for age in step.staleness} == {0}
    rollouts = sorted(recorded, key=lambda group: group.group_id)
    figures, weights = plain_loop(tiny, rollouts, tmp_path.name)
    coefs = [step.metrics["kl.coef"] for step in steps]
    assert coefs[0] == pytest.approx(0.1)
    assert len(set(coefs)) == STEPS
    for step, expected in zip(steps, figures, strict=True):
        assert expected["loss"] != 0.0
        assert expected["texts.nll"] > 0.0
        averaged = {"kl", "reward.shaped", "groups.mixed", "kl.coef"}  # over the groups of the step
        assert {name: step.metrics[name] for name in expected.keys() - averaged} == {
            name: expected[name] for name in expected.keys() - averaged
        }
    assert all("critic.value_loss" in step.metrics for step in steps[1:])
    saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{STEPS:06d}" / "model" / "model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, weights[name]), name
