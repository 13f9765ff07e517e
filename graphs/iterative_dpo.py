"""Iterative DPO: the best and the worst of n samples by reward are the pair that is learned while the next are drawn.

    flowrl run graphs/iterative_dpo.py --set objective.beta=0.05 --set generator.group_size=8
    flowrl run graphs/iterative_dpo.py --set objective=flowrl.algorithms.ipo:IPO

Groups whose rewards tie are filtered and others admitted in their place. The reference is the policy as it starts.
Staleness is bounded as in graphs/ppo_async.py: `max_staleness=0` samples, then learns, in turns.
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
from flowrl.stages.reference import Reference
from flowrl.stages.reward import Reward
from flowrl.stages.selection_learner import SelectionLearner
from flowrl.stages.selector import Selector


class Settings(RunSettings):
    model: str = "SmolLM2-135M-Instruct"  # Hugging Face id or local directory
    steps: Annotated[int, Meta(ge=1)] = 20  # policy versions to publish
    groups_per_step: Annotated[int, Meta(ge=1)] = 16  # pairs learned per policy version
    max_staleness: Annotated[int, Meta(ge=0)] = 1  # policy versions between sampling and learning
    objective: Select = Select(use="flowrl.algorithms.dpo:DPO")
    data: PromptData = PromptData()
    sampling: Sampling = Sampling()
    prompts: Prompts.Config = Prompts.Config()
    generator: Generator.Config = Generator.Config(cpus=1, group_size=8)
    reward: Reward.Config = Reward.Config()
    select: Selector.Config = Selector.Config()
    reference: Reference.Config = Reference.Config(share="learner")
    learner: Learner.Config = Learner.Config(cpus=1, lr=1e-6)
    evaluation: Evaluator.Config = Evaluator.Config()


def build(s: Settings) -> Graph:
    in_flight = s.evaluation.in_flight
    credits = most_credits(s.max_staleness, s.groups_per_step, window=1)
    group = s.generator.group_size
    room = s.generator.max_model_len - s.sampling.max_tokens
    prompts = Prompts(s.prompts, model=s.model, data=s.data, group_size=group, seed=s.seed, room=room)
    generator = Generator(s.generator, model=s.model, sampling=s.sampling, heldout_sampling=s.sampling)
    reward = Reward(s.reward, data=s.data)
    select = Selector(s.select, take="pair")
    reference = Reference(s.reference, model=s.model, temperature=s.sampling.temperature)
    learner = SelectionLearner(s.learner, model=s.model, objective=s.objective, steps=s.steps,
                               groups_per_step=s.groups_per_step, num_samples=2, has_reference=True,
                               max_staleness=s.max_staleness, temperature=s.sampling.temperature)  # fmt: skip
    evaluation = Evaluator(s.evaluation, model=s.model, data=s.data, seed=s.seed, reward=s.reward)
    return Graph(
        nodes=dict(
            prompts=prompts,
            generator=generator,
            reward=reward,
            select=select,
            reference=reference,
            learner=learner,
            evaluation=evaluation,
        ),
        edges=[
            Queue(prompts.prompts, generator.prompts, depth=16),
            Queue(generator.rollouts, reward.rollouts, depth=64),
            Queue(reward.scored, select.scored, depth=64),
            Queue(select.selected, reference.scored, depth=64),
            Queue(reference.referenced, learner.samples, depth=credits, window=1, max_staleness=s.max_staleness),
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
