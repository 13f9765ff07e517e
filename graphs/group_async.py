"""Asynchronous group algorithms (GRPO, RLOO, REINFORCE++, ...): PPO's graph with `advantage` in place of a critic.

    flowrl run graphs/group_async.py --set algorithm=flowrl.algorithms.rloo:RLOO --set generator.group_size=8

Advantages come from the rewards of a prompt's own samples, so a group has two samples or more. With a teacher as
`reference_model` and algorithm=flowrl.algorithms.on_policy_distillation:OnPolicyDistillation it distils instead.
"""

from flowrl.config import Select
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.stages.advantage import Advantage
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.online import evaluated, replayed, texts_for
from flowrl.stages.prompts import Prompts
from flowrl.stages.reference import Reference
from flowrl.stages.replay_buffer import ReplayBuffer
from flowrl.stages.scorers import ScoredSettings, scorers
from flowrl.stages.texts import TextSource


class Settings(ScoredSettings):
    reference_model: str = ""  # "": the policy as it begins; with on-policy distillation the teacher
    algorithm: Select = Select(use="flowrl.algorithms.grpo:GRPO")
    greedy_baseline: bool = False  # of each prompt sample the likeliest response as well, for ReMax
    generator: Generator.Config = Generator.Config(cpus=1, group_size=8)
    reference: Reference.Config = Reference.Config(share="learner")
    advantage: Advantage.Config = Advantage.Config()
    replay: ReplayBuffer.Config = ReplayBuffer.Config()  # learned groups learned once more; ratio=0: none
    texts: TextSource.Config = TextSource.Config()  # a pre-training loss beside the policy's; per_step=0: none


def build(s: Settings) -> Graph:
    sampler, learning = s.sampler(s.generator, greedy=s.greedy_baseline), s.learning(s.algorithm)
    prompts = Prompts(s.prompts, sampler)
    generator = Generator(s.generator, sampler)
    scoring = scorers(generator.rollouts, sampler, s)
    reference = Reference(s.reference, sampler, model=s.reference_model, learning=learning)
    advantage = Advantage(s.advantage, sampler, learning)
    learner = Learner(s.learner, sampler, learning, beside=s.texts)
    replay = replayed(advantage.samples, s.replay, learner)
    texts, evaluation = texts_for(learner), evaluated(s.evaluation, learner, generator, s.reward)
    row = dict(**scoring.nodes, reference=reference, advantage=advantage, **replay.nodes, learner=learner)
    return Graph(
        nodes=dict(prompts=prompts, generator=generator, **row, **texts.nodes, **evaluation.nodes),
        edges=[
            Queue(prompts.prompts, generator.prompts),
            *scoring.edges,
            Queue(scoring.scored, reference.scored),
            Queue(reference.referenced, advantage.referenced),
            *replay.edges,
            Queue(replay.samples, learner.samples),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits),
            *texts.edges,
            *evaluation.edges,
        ],
        until=learner,
    )
