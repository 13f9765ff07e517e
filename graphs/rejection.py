"""Rejection sampling, repeated: the best of n samples by reward is learned by SFT while the next ones are drawn.

    flowrl run graphs/rejection.py --set generator.group_size=16 --set select.min_reward=1.0

Groups without a sample good enough are filtered and others admitted in their place. Staleness is bounded as in
graphs/ppo_async.py: `max_staleness=0` samples, then learns, in turns.
"""

from typing import Annotated

from flowrl.config import Meta, Select
from flowrl.data.prompts import PromptData
from flowrl.engines.base import Sampling
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.graph.settings import RunSettings
from flowrl.graph.staleness import most_credits
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.reward import Reward
from flowrl.stages.selection_learner import SelectionLearner
from flowrl.stages.selector import Selector


class Settings(RunSettings):
    model: str = "SmolLM2-135M-Instruct"  # Hugging Face id or local directory
    steps: Annotated[int, Meta(ge=1)] = 20  # policy versions to publish
    groups_per_step: Annotated[int, Meta(ge=1)] = 16  # best samples learned per policy version
    max_staleness: Annotated[int, Meta(ge=0)] = 1  # policy versions between sampling and learning
    objective: Select = Select(use="flowrl.algorithms.sft:SFT")
    data: PromptData = PromptData()
    sampling: Sampling = Sampling()
    prompts: Prompts.Config = Prompts.Config()
    generator: Generator.Config = Generator.Config(cpus=1, group_size=8)
    reward: Reward.Config = Reward.Config()
    select: Selector.Config = Selector.Config(min_reward=1.0)
    learner: Learner.Config = Learner.Config(cpus=1, lr=1e-5)
    evaluation: Evaluator.Config = Evaluator.Config()


def build(s: Settings) -> Graph:
    in_flight = s.evaluation.in_flight
    credits = most_credits(s.max_staleness, s.groups_per_step, window=1)
    group = s.generator.group_size
    room = s.generator.max_model_len - s.sampling.max_tokens
    prompts = Prompts(s.prompts, model=s.model, data=s.data, group_size=group, seed=s.seed, room=room)
    generator = Generator(s.generator, model=s.model, sampling=s.sampling, heldout_sampling=s.sampling)
    reward = Reward(s.reward, data=s.data)
    select = Selector(s.select, take="best")
    learner = SelectionLearner(s.learner, model=s.model, objective=s.objective, steps=s.steps,
                               groups_per_step=s.groups_per_step, num_samples=1, has_reference=False,
                               max_staleness=s.max_staleness, temperature=s.sampling.temperature)  # fmt: skip
    evaluation = Evaluator(s.evaluation, model=s.model, data=s.data, seed=s.seed, reward=s.reward)
    return Graph(
        nodes=dict(
            prompts=prompts, generator=generator, reward=reward, select=select, learner=learner, evaluation=evaluation
        ),
        edges=[
            Queue(prompts.prompts, generator.prompts, depth=16),
            Queue(generator.rollouts, reward.rollouts, depth=64),
            Queue(reward.scored, select.scored, depth=64),
            Queue(select.selected, learner.samples, depth=credits, window=1, max_staleness=s.max_staleness),
            Latest(learner.weights, generator.weights),
            Credits(
                learner.released, prompts.credits, initial=credits, per_version=s.groups_per_step, versions=s.steps
            ),
            Latest(learner.checkpoints, evaluation.checkpoints),
            Queue(evaluation.prompts, generator.heldout, depth=16),
            Queue(generator.heldout_rollouts, evaluation.rollouts, depth=in_flight, most=in_flight),
        ],
        until=learner,
    )
