"""Of n samples the best, or the best and the worst, are learned; groups without them are filtered with the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from flowrl.config import Select
from flowrl.engines.base import Sampling
from flowrl.errors import ConfigError, DataError
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Buffer, Referenced, Rollouts, Sample, Scored, VersionSpan, extend
from flowrl.runtime.ledger import read_entries
from flowrl.simulation.stand_ins import stand_in_model
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference
from flowrl.stages.sampler import Learning, Sampler
from flowrl.stages.selector import Selection, SelectionLearner, Selector, choose, chosen_samples
from flowrl.telemetry.records import read_samples, step_path
from tests.support.flows import NumberedPrompts, run

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.stage import Context
    from flowrl.stages.selector import Take

FAKE = "flowrl.simulation.fake:FakeTraining"
DPO, SFT = "flowrl.algorithms.dpo:DPO", "flowrl.algorithms.sft:SFT"


def scored(rewards: list[float], *, tokens: list[int] | None = None) -> Scored:
    samples = [
        Sample(token_ids=Buffer.ints([token]), logprobs=Buffer.floats([-0.1 * place]), finish="stop", text="",
               versions=[VersionSpan(0, 0, 1)])
        for place, token in enumerate(tokens or range(len(rewards)))
    ]  # fmt: skip
    return Scored(
        group_id=3, token_ids=Buffer.ints([1]), columns={}, num_samples=len(samples), seed=0, samples=samples,
        generator="generator.0", scores={"task": rewards, "style": [0.0] * len(rewards)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("take", "rules", "rewards", "places"),
    [
        ("best", {}, [0.2, 1.0, 0.5], [1]),
        ("best", {}, [1.0, 1.0], [0]),
        ("best", {"min_reward": 1.0}, [0.2, 1.0, 0.5], [1]),
        ("best", {"min_reward": 1.5}, [0.2, 1.0, 0.5], "the best of 3 rewards is 1, below min_reward=1.5"),
        ("pair", {}, [0.2, 1.0, 0.5], [1, 0]),
        ("pair", {}, [1.0, 0.0, 1.0, 0.0], [0, 1]),
        ("pair", {}, [0.5, 0.5, 0.5], "rewards from 0.5 to 0.5 differ by no more than 0"),
        ("pair", {"min_gap": 0.75}, [0.25, 1.0, 0.5], "rewards from 0.25 to 1 differ by no more than 0.75"),
    ],
)
def test_rewards_say_what_is_taken(take: Take, rules: dict[str, float], rewards: list[float], places: list[int] | str):
    found = choose(
        scored(rewards),
        take,
        Selection(min_reward=rules.get("min_reward"), min_gap=rules.get("min_gap", 0.0)),
        range(len(rewards)),
    )
    assert found == (([], places) if isinstance(places, str) else (places, ""))


def test_only_candidates_are_taken():
    group = scored([1.0, 0.0, 0.5, 0.25])
    assert choose(group, "pair", Selection(), [2, 3]) == ([2, 3], "")
    assert choose(group, "best", Selection(), []) == ([], "none of 4 samples can be taken")


def test_the_same_answer_is_not_better_than_itself():
    _, reason = choose(scored([1.0, 0.0], tokens=[7, 7]), "pair", Selection(), range(2))
    assert "same tokens" in reason


def test_a_narrowed_group_keeps_what_belongs_to_its_samples():
    wide = extend(Referenced, scored([0.2, 1.0, 0.6]), ref_logprobs=[Buffer.floats([float(k)]) for k in range(3)],
                  placed=[Buffer.floats([k / 2]) for k in range(3)])  # fmt: skip
    group = chosen_samples(wide, [1, 0])
    assert isinstance(group, Referenced)
    assert [sample.token_ids.tolist() for sample in group.samples] == [[1], [0]]
    assert group.rewards == [1.0, 0.2]
    assert [buffer.tolist() for buffer in group.ref_logprobs] == [[1.0], [0.0]]
    assert group.placed is not None
    assert [buffer.tolist() for buffer in group.placed] == [[0.5], [0.0]]
    assert group.metrics == {"reward.sampled": pytest.approx(0.6), "reward.best": 1.0}


class Judge(Stage):
    """Rewards sample i of group k with i, or every sample alike where k is a multiple of three."""

    class Config(StageConfig):
        pass

    rollouts: In[Rollouts]
    scored: Out[Scored]

    def __init__(self, config: Config) -> None:
        self.config = config

    async def run(self, context: Context) -> None:
        async for group in self.rollouts:
            rewards = [float(i) if group.group_id % 3 else 0.5 for i in range(len(group.samples))]
            await self.scored.put(extend(Scored, group, scores={"judge": rewards}))


def graph(*, steps: int, per_step: int, max_staleness: int, judge: Any = None, save_every: int = 0) -> Graph:
    sampler = Sampler(model=stand_in_model(), sampling=Sampling(max_tokens=4), group_size=4)
    learning = Learning(algorithm=Select(use=DPO), steps=steps, groups_per_step=per_step, max_staleness=max_staleness)
    costs = {"costs": {"decode": {"step_s": 0.05}, "calls": {"train": {"call_s": 0.6}}}}
    prompts = NumberedPrompts(Prompts.Config(), sampler)
    generator = Generator(
        Generator.Config(engine="flowrl.simulation.fake:FakeGeneration", engine_options=costs, replicas=2), sampler
    )
    reward = judge or Judge(Judge.Config())
    select = Selector(Selector.Config(), take="pair")
    reference = Reference(Reference.Config(engine=FAKE, engine_options=costs), sampler)
    config = Learner.Config(engine=FAKE, engine_options=costs, save_every=save_every)
    learner = SelectionLearner(config, sampler, learning, num_samples=select.num_kept)
    return Graph(
        nodes={"prompts": prompts, "generator": generator, "reward": reward, "select": select, "reference": reference,
               "learner": learner},
        edges=[
            Queue(prompts.prompts, generator.prompts, depth=4),
            Queue(generator.rollouts, reward.rollouts, depth=4),
            Queue(reward.scored, select.scored, depth=4),
            Queue(select.selected, reference.scored, depth=4),
            Queue(reference.referenced, learner.samples),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits),
        ],
        until=learner,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_pairs_are_learned_in_order_and_ties_are_filtered(max_staleness: int, tmp_path: Path):
    ran = run(graph(steps=4, per_step=3, max_staleness=max_staleness), tmp_path)
    entries = read_entries(tmp_path / "ledger.jsonl")
    learned = [entry.group for entry in entries if entry.event == "learned"]
    assert learned == [k for k in range(18) if k % 3][:12]
    assert {entry.group % 3 for entry in entries if entry.event == "filtered"} == {0}
    assert max(stale for step in ran.steps for stale in step.staleness) <= max_staleness
    assert ran.steps[-1].metrics["reward.sampled"] == pytest.approx(1.5)
    assert ran.steps[-1].metrics["samples"] == 6
    recorded = read_samples(step_path(tmp_path / "rollouts", 0))
    assert [group.rewards for group in recorded] == [[3.0, 0.0]] * 3
    told = {span.groups[0]: span.args for span in ran.spans if span.name == "select"}
    for group in recorded:
        lengths = [len(sample.token_ids) for sample in group.samples]
        assert told[group.group_id] == {"prompt_tokens": len(group.token_ids), "samples": 2, "tokens": sum(lengths)}


@pytest.mark.parametrize(
    ("objective", "num_samples", "has_reference", "said"),
    [
        (SFT, 1, False, None),
        (DPO, 2, True, None),
        (DPO, 1, True, "a group has 1 responses"),
        (DPO, 2, False, "'reference'"),
        ("flowrl.algorithms.kto:KTO", 2, True, "take DPO, IPO or Pairwise for pairs"),
        (SFT, 2, True, "SFT learns from demonstrations"),
        ("flowrl.algorithms.grpo:GRPO", 2, True, "learns from samples of its own policy"),
    ],
)
def test_an_objective_that_cannot_learn_from_the_selection_is_refused(
    objective: str, num_samples: int, has_reference: bool, said: str | None
):
    learning = Learning(algorithm=Select(use=objective), steps=1, groups_per_step=1, max_staleness=1)
    sampler = Sampler(model=stand_in_model())
    learner = SelectionLearner(Learner.Config(), sampler, learning, num_samples=num_samples)
    learner.samples.brings = Referenced if has_reference else Scored
    if said is None:
        learner.check(lambda _: None)
        return
    with pytest.raises((ConfigError, DataError), match=said):
        learner.check(lambda _: None)
