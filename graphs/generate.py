"""Batch inference: n samples of every prompt with their rewards, into JSONL files that are a data set.

    flowrl run graphs/generate.py --set data.source=prompts.jsonl --set generator.group_size=4
    flowrl run graphs/generate.py --set writer.take=best --set writer.min_reward=1.0     # rejection sampling
    flowrl run graphs/generate.py --set writer.take=pair                                # preferences

Other runs read what it writes: `--set data.source=runs/<name>`. Scores are a reward function's (`reward`; without a
function there is none) and those of `reward_models`, each a node of its own, one after the other; a sample's reward is
their sum. With a `reference_model` each response carries its log-prob under that model as well.
"""

from typing import Annotated

import msgspec

from flowrl.config import Meta
from flowrl.data.prompts import PromptData
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.stages.generator import Generator
from flowrl.stages.judge import Judge, ModelJudge
from flowrl.stages.online import SamplingSettings
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference, referenced
from flowrl.stages.reward import Reward, RewardModel
from flowrl.stages.scorers import scorers
from flowrl.stages.writer import Writer


class Settings(SamplingSettings):
    epochs: Annotated[int, Meta(ge=1)] = 1  # passes over the prompts, each with samples of its own
    reward_models: list[str] = msgspec.field(default_factory=list)  # their scores are added up, and to the function's
    reward_weights: list[float] = msgspec.field(default_factory=list)  # one for each of them; []: reward_model.weight
    reference_model: str = ""  # "": none
    data: PromptData = PromptData(num_heldout=0)
    generator: Generator.Config = Generator.Config(cpus=1, group_size=4)
    reward: Reward.Config = Reward.Config()  # function="": none
    reward_model: RewardModel.Config = RewardModel.Config()
    judge: Judge.Config = Judge.Config()  # server.url="": none
    model_judge: ModelJudge.Config = ModelJudge.Config()  # model="": none
    reference: Reference.Config = Reference.Config()
    writer: Writer.Config = Writer.Config()


def build(s: Settings) -> Graph:
    sampler = s.sampler(s.generator)
    prompts = Prompts(s.prompts, sampler, epochs=s.epochs)
    generator = Generator(s.generator, sampler)
    scoring = scorers(generator.rollouts, sampler, s)
    reference = referenced(scoring.scored, s.reference, sampler, model=s.reference_model)
    writer = Writer(s.writer, sampler)
    return Graph(
        nodes=dict(prompts=prompts, generator=generator, **scoring.nodes, **reference.nodes, writer=writer),
        edges=[
            Queue(prompts.prompts, generator.prompts),
            *scoring.edges,
            *reference.edges,
            Queue(reference.scored, writer.scored),
            Latest(prompts.ended, writer.ended),
            Credits(writer.released, prompts.credits),
        ],
        until=writer,
    )
