"""On-policy distillation: a student learns a teacher's distribution on its own samples while the next ones are drawn.

    flowrl run graphs/distill_online.py --set objective.teacher=DIR --set objective.direction=reverse

The teacher sits in the learner; rewards are only shown. Staleness is bounded as in graphs/ppo_async.py. On given
responses: `flowrl run graphs/sft.py --set objective=flowrl.algorithms.full_distillation:FullDistillation`.
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


class Settings(RunSettings):
    model: str = "SmolLM2-135M-Instruct"  # Hugging Face id or local directory
    steps: Annotated[int, Meta(ge=1)] = 20  # policy versions to publish
    groups_per_step: Annotated[int, Meta(ge=1)] = 16  # prompt groups learned per policy version
    max_staleness: Annotated[int, Meta(ge=0)] = 1  # policy versions between sampling and learning
    objective: Select = Select(
        use="flowrl.algorithms.full_distillation:FullDistillation", options={"direction": "reverse", "mix": 1.0}
    )
    data: PromptData = PromptData()
    sampling: Sampling = Sampling()
    prompts: Prompts.Config = Prompts.Config()
    generator: Generator.Config = Generator.Config(cpus=1, group_size=1)
    reward: Reward.Config = Reward.Config()
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
    learner = SelectionLearner(s.learner, model=s.model, objective=s.objective, steps=s.steps,
                               groups_per_step=s.groups_per_step, num_samples=group, has_reference=False,
                               max_staleness=s.max_staleness, temperature=s.sampling.temperature)  # fmt: skip
    evaluation = Evaluator(s.evaluation, model=s.model, data=s.data, seed=s.seed, reward=s.reward)
    return Graph(
        nodes=dict(prompts=prompts, generator=generator, reward=reward, learner=learner, evaluation=evaluation),
        edges=[
            Queue(prompts.prompts, generator.prompts, depth=16),
            Queue(generator.rollouts, reward.rollouts, depth=64),
            Queue(reward.scored, learner.samples, depth=credits, window=1, max_staleness=s.max_staleness),
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
