"""Constitutional AI's first half: the model criticises and revises its own answers, which become data for SFT.

    flowrl run graphs/critique.py --set data.source=prompts.jsonl --set agent.environment_options.constitution=mine.yaml
    flowrl run graphs/sft.py --set data.source=runs/<name>

Each prompt is answered, the answer criticised by a principle of the constitution and written anew; what is written to
JSONL files is the prompt with its last revision. The second half is AI feedback: a judge (`judge.server.url`,
`judge.rubric.constitution`) in graphs/iterative_dpo.py, group_async.py or ppo_async.py, or in generate.py for pairs.
"""

from typing import Annotated

from flowrl.config import Meta
from flowrl.data.prompts import PromptData
from flowrl.engines.base import Sampling
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.stages.agent import Agent
from flowrl.stages.online import SamplingSettings
from flowrl.stages.prompts import Prompts
from flowrl.stages.writer import Writer

TURNS = 3  # an answer, its critique, its revision


class Settings(SamplingSettings):
    epochs: Annotated[int, Meta(ge=1)] = 1  # passes over the prompts, each with samples of its own
    data: PromptData = PromptData(num_heldout=0)
    sampling: Sampling = Sampling(max_tokens=128)  # of one turn
    agent: Agent.Config = Agent.Config(
        cpus=1, group_size=1, max_turns=TURNS, max_model_len=1024, environment="flowrl.rewards.revision:Revision"
    )
    writer: Writer.Config = Writer.Config(take="best", min_reward=1.0, turns="last")  # whole episodes alone


def build(s: Settings) -> Graph:
    sampler = s.sampler(s.agent)
    prompts = Prompts(s.prompts, sampler, epochs=s.epochs)
    agent = Agent(s.agent, sampler)
    writer = Writer(s.writer, sampler)
    return Graph(
        nodes=dict(prompts=prompts, agent=agent, writer=writer),
        edges=[
            Queue(prompts.prompts, agent.prompts),
            Queue(agent.rollouts, writer.scored),
            Latest(prompts.ended, writer.ended),
            Credits(writer.released, prompts.credits),
        ],
        until=writer,
    )
