"""What graphs of online training have in common: their settings, and the nodes that stand beside the main row.

A graph file's `Settings` extends `OnlineSettings` by the nodes of its own; `evaluated`, `texts_for` and `replayed`
return nodes with their edges, which are empty where the settings ask for none. Imports no heavy library.

Tests: tests/graphs/test_commands.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec

from flowrl.config import Meta, Select
from flowrl.data.prompts import PromptData
from flowrl.engines.base import Sampling
from flowrl.errors import ConfigError
from flowrl.graph.edges import Edge, Latest, Queue
from flowrl.graph.graph import RunSettings, Section
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.generator import Examiner, Generator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.replay_buffer import ReplayBuffer
from flowrl.stages.reward import Reward
from flowrl.stages.sampler import Learning, Sampler
from flowrl.stages.texts import TextSource

if TYPE_CHECKING:
    from flowrl.graph.ports import Out
    from flowrl.graph.stage import Stage
    from flowrl.messages import Samples
    from flowrl.stages.agent import Agent
    from flowrl.stages.serving import Generation


class SamplingSettings(RunSettings):
    """Settings of a graph in which a model answers prompts."""

    model: str = "SmolLM2-135M-Instruct"  # Hugging Face id or local directory
    data: PromptData = PromptData()
    sampling: Sampling = Sampling()
    prompts: Prompts.Config = Prompts.Config()

    def sampler(self, generation: Generation) -> Sampler:
        """Return what the nodes agree on, with the numbers of the node that samples."""
        return Sampler(
            model=self.model,
            data=self.data,
            sampling=self.sampling,
            group_size=generation.group_size,
            max_model_len=generation.max_model_len,
            max_turns=getattr(generation, "max_turns", 1),
            seed=self.seed,
            engine=generation.engine,
        )


class OnlineSettings(SamplingSettings):
    """Settings of a graph in which a policy learns from its own samples."""

    elsewhere = {"objective": "algorithm"}

    steps: Annotated[int, Meta(ge=1)] = 20  # policy versions to publish
    groups_per_step: Annotated[int, Meta(ge=1)] = 16  # prompt groups learned per policy version
    max_staleness: Annotated[int, Meta(ge=0)] = 1  # policy versions between sampling and learning
    learner: Learner.Config = Learner.Config(cpus=1, lr=1e-5)
    evaluation: Evaluator.Config = Evaluator.Config()

    def sampler(self, generation: Generation, *, greedy: bool = False) -> Sampler:
        """Return what the nodes agree on, with what the learner asks of those that sample."""
        asked = {"adapter": self.learner.lora, "routing": self.learner.routing}
        return msgspec.structs.replace(super().sampler(generation), **asked, greedy=greedy)

    def learning(self, algorithm: Select) -> Learning:
        """Return what the nodes that learn agree on."""
        return Learning(
            algorithm=algorithm,
            steps=self.steps,
            groups_per_step=self.groups_per_step,
            max_staleness=self.max_staleness,
        )


def evaluated(
    config: Evaluator.Config, learner: Learner, generator: Generator | Agent, reward: Reward.Config | None = None
) -> Section:
    """Return the evaluation of a learner's versions on held-out prompts.

    The generator answers them as well, or with `beside` an examiner with the generator's settings.
    """
    evaluation = Evaluator(config, generator.sampler, reward=reward)
    nodes: dict[str, Stage] = {"evaluation": evaluation}
    edges: list[Edge] = [Latest(learner.evaluations, evaluation.requests)]
    if config.best_by:
        edges.append(Latest(evaluation.results, learner.results))
    if config.tasks and not config.beside:
        what = "are asked of a generator that keeps a version, and there is none beside training"
        raise ConfigError("evaluation.tasks", what, "set evaluation.beside=1")
    if config.beside:
        if not isinstance(generator, Generator):
            what = f"is {config.beside}, but an agent's episodes are evaluated by the training's own agents"
            raise ConfigError("evaluation.beside", what, "leave it 0")
        settings = msgspec.structs.replace(generator.config, replicas=config.beside, spare_samples=0)
        nodes["examiner"] = generator = Examiner(settings, generator.sampler, answers=bool(config.tasks))
        edges.append(Latest(learner.examined, generator.weights))
    edges += [
        Queue(evaluation.prompts, generator.heldout, depth=16),
        Queue(generator.heldout_rollouts, evaluation.rollouts, depth=config.in_flight, most=config.in_flight),
    ]
    return Section(nodes, edges)


def texts_for(learner: Learner) -> Section:
    """Return the source of a learner's pre-training loss, where it has one."""
    if not learner.beside.per_step:
        return Section()
    texts = TextSource(learner.beside, model=learner.sampler.model)
    edges: list[Edge] = [
        Queue(learner.wanted, texts.wanted, depth=1),
        Queue(texts.texts, learner.texts, depth=1, most=1),
    ]
    return Section({"texts": texts}, edges)


class Replayed(NamedTuple):
    """A replay buffer with its edge, or none, and where the samples go on to the learner."""

    nodes: dict[str, Stage]
    edges: list[Edge]
    samples: Out[Samples]


def replayed(samples: Out[Samples], config: ReplayBuffer.Config, learner: Learner) -> Replayed:
    """Put a replay buffer behind what leaves at `samples` on its way to a learner, where there is to be one."""
    if not config.ratio:
        return Replayed({}, [], samples)
    replay = ReplayBuffer(config, learner.sampler, learner.learning)
    return Replayed({"replay": replay}, [Queue(samples, replay.fresh)], replay.samples)
