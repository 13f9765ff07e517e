"""Batch inference: n samples of every prompt with their rewards, into JSONL files that are a data set.

    flowrl run graphs/generate.py --set data.source=prompts.jsonl --set generator.group_size=4
    flowrl run graphs/generate.py --set writer.take=best --set writer.min_reward=1.0     # rejection sampling
    flowrl run graphs/generate.py --set writer.take=pair                                # preferences

Other runs read what it writes: `--set data.source=runs/<name>`. Scores are a reward function's (`reward`; without a
function there is none) and those of `reward_models`, each a node of its own, one after the other; a sample's reward is
their sum. With a `reference_model` each response carries its log-prob under that model as well.
"""

from typing import Annotated, Any

import msgspec

from flowrl.config import Meta
from flowrl.data.prompts import PromptData
from flowrl.engines.base import Sampling
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.graph.settings import RunSettings
from flowrl.stages.generator import Generator
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference
from flowrl.stages.reward import Reward, RewardModel, scorers_of
from flowrl.stages.writer import Writer


class Settings(RunSettings):
    model: str = "SmolLM2-135M-Instruct"  # Hugging Face id or local directory, or a run's directory
    epochs: Annotated[int, Meta(ge=1)] = 1  # passes over the prompts, each with samples of its own
    reward_models: list[str] = msgspec.field(default_factory=list)  # their scores are added up, and to the function's
    reference_model: str = ""  # "": none
    data: PromptData = PromptData(num_heldout=0)
    sampling: Sampling = Sampling()
    prompts: Prompts.Config = Prompts.Config()
    generator: Generator.Config = Generator.Config(cpus=1, group_size=4)
    reward: Reward.Config = Reward.Config()  # function="": none
    reward_model: RewardModel.Config = RewardModel.Config()
    reference: Reference.Config = Reference.Config()
    writer: Writer.Config = Writer.Config()


def build(s: Settings) -> Graph:
    credits = 2 * s.writer.groups_per_file
    room = s.generator.max_model_len - s.sampling.max_tokens
    prompts = Prompts(s.prompts, model=s.model, data=s.data, group_size=s.generator.group_size, seed=s.seed, room=room,
                      epochs=s.epochs)  # fmt: skip
    generator = Generator(s.generator, model=s.model, sampling=s.sampling, heldout_sampling=s.sampling)
    writer = Writer(s.writer, data=s.data)
    scorers = scorers_of(s.reward, s.reward_model, s.reward_models, policy=s.model, data=s.data)
    in_a_row = [generator.rollouts, *(scorer.scored for scorer in scorers.values())]
    nodes: dict[str, Any] = dict(prompts=prompts, generator=generator, **scorers, writer=writer)
    edges: list[Any] = [
        Queue(prompts.prompts, generator.prompts, depth=16),
        *(Queue(given, scorer.rollouts, depth=64) for given, scorer in zip(in_a_row, scorers.values(), strict=False)),
        Latest(prompts.ended, writer.ended),
        Credits(writer.released, prompts.credits, initial=credits, per_version=s.writer.groups_per_file),
    ]
    last = in_a_row[-1]
    if s.reference_model:
        nodes["reference"] = reference = Reference(s.reference, model=s.reference_model, policy=s.model,
                                                   temperature=s.sampling.temperature)  # fmt: skip
        edges.append(Queue(last, reference.scored, depth=64))
        last = reference.referenced
    edges.append(Queue(last, writer.scored, depth=credits, window=1))
    return Graph(nodes=nodes, edges=edges, until=writer)
