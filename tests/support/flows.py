"""A small flow on fakes for the virtual clock: real channels, generator and learner, random speeds from a seed.

`random_flow(seed)` draws depths, windows, replicas, speeds and tails; `run(graph)` runs it to its end in milliseconds.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from flowrl.algorithms.base import Algorithm
from flowrl.config import Select
from flowrl.engines.base import Sampling
from flowrl.graph.edges import Edge
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import PassesOn
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Buffer, Rollouts, Samples, Scored, extend
from flowrl.runtime.local import LocalOptions, Outcome, run_local
from flowrl.simulation.clock import run_virtual
from flowrl.simulation.stand_ins import stand_in_model
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.generator import Examiner, Generator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.replay_buffer import ReplayBuffer
from flowrl.stages.sampler import Learning, Sampler
from flowrl.telemetry.events import Evaluation, Event, Notice, Span, Step

if TYPE_CHECKING:
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say


NO_REPLAY = ReplayBuffer.Config()
NULL = "tests.support.flows:NullAlgorithm"


class NullAlgorithm(Algorithm):
    """Nothing to credit and nothing to minimise: the fake training engine never asks."""


@dataclass
class NumberedRow:
    token_ids: list[int]
    columns: dict[str, Any]
    text: str = "a number"
    begun: str = ""


class NumberedRows:
    """Prompt k is the number k."""

    def row_at(self, position: int) -> NumberedRow:
        return NumberedRow(token_ids=[3 + position % 50, 4, 5], columns={"position": position})


class NumberedPrompts(Prompts):
    """The real admission of prompts over numbered ones, without a tokenizer."""

    def load(self) -> Any:
        return NumberedRows()

    def check(self, say: Say) -> None:
        """Numbers need no preparation."""

    simulated = Prompts.simulated


class Scorer(Stage):
    """Turns rollouts into samples after a random time; filters or fails some groups by their number."""

    class Config(StageConfig):
        mean_s: float = 0.01
        filter_every: int = 0  # every n-th group is filtered; 0: none
        seed: int = 0

    rollouts: In[Rollouts]
    samples: Out[Samples]

    def __init__(self, config: Config) -> None:
        self.config: Scorer.Config = config

    def simulated(self, costs: Costs) -> PassesOn:
        return PassesOn()

    async def run(self, context: Context) -> None:
        async for group in self.rollouts:
            draw = random.Random(self.config.seed * 1_000_003 + group.group_id)
            await asyncio.sleep(draw.expovariate(1 / self.config.mean_s) if self.config.mean_s else 0)
            if self.config.filter_every and group.group_id % self.config.filter_every == 0:
                await self.rollouts.reject(group, kind="filtered", reason="every n-th")
                continue
            zeros = [Buffer.floats([0.0] * len(sample.token_ids)) for sample in group.samples]
            advantages = [Buffer.floats([draw.gauss(0.0, 1.0)] * len(each)) for each in zeros]
            samples = extend(
                Samples, group, scores={"zero": [0.0] * len(zeros)}, ref_logprobs=zeros, advantages=advantages
            )
            await self.samples.put(samples)


class Judge(Stage):
    """Gives every held-out sample a score after a time: 1, or less the further its version is from `peak`."""

    class Config(StageConfig):
        mean_s: float = 0.0
        peak: int = -1  # -1: all versions are alike

    rollouts: In[Rollouts]
    scored: Out[Scored]

    def __init__(self, config: Config) -> None:
        self.config: Judge.Config = config

    async def run(self, context: Context) -> None:
        async for group in self.rollouts:
            await asyncio.sleep(self.config.mean_s)
            away = 0 if self.config.peak < 0 else abs(group.oldest_version - self.config.peak)
            await self.scored.put(extend(Scored, group, scores={"one": [1 / (1 + away)] * len(group.samples)}))


class NumberedEvaluator(Evaluator):
    """The real evaluator over `config.in_flight` numbered prompts, without a tokenizer."""

    def _load(self) -> Any:
        return [NumberedRow([3, 4, 5], {}) for _ in range(self.config.in_flight)]

    def _load_sets(self) -> Any:
        return {name: [NumberedRow([3, 4, 5], {})] * int(count) for name, count in self.config.sets.items()}


class ObservedLearner(Learner):
    """The real learner; notes the oldest version in every group it is given, by its own reckoning."""

    seen: ClassVar[dict[tuple[str, int, int], int]] = {}  # run directory, step, group -> version
    simulated = Learner.simulated

    async def _step(self, context: Context, engine: Any, algorithm: Any, batch: list[Samples], *rest: Any) -> Any:
        for group in batch:
            oldest = min(span.version for sample in group.samples for span in sample.versions)
            self.seen[str(context.run_dir), context.version, group.group_id] = oldest
        return await super()._step(context, engine, algorithm, batch, *rest)


@dataclass(frozen=True)
class FlowSettings:
    """One random flow; printing it is enough to run it again."""

    seed: int
    steps: int
    groups_per_step: int
    window: int
    max_staleness: int
    generators: int
    scorers: int
    depth: int
    token_s: float
    sigma: float
    update_s: float
    score_s: float
    train_s: float
    filter_every: int
    initial: int
    save_every: int = 0
    is_finite: bool = True  # no group is admitted that the run would not learn
    replay: ReplayBuffer.Config = NO_REPLAY
    ranks: int = 1  # of the learner
    evaluate_every: int = -1  # versions; 0: before and after; -1: no evaluator
    sets: dict[str, str] = field(default_factory=dict[str, str])  # further held-out prompts, by name: how many
    judge_s: float = 0.0  # for each held-out prompt
    beside: int = 0  # generators that keep a version while it is evaluated
    peak: int = -1  # version that scores best, by which the best checkpoint is chosen; -1: none is
    on_update: Literal["keep", "wait", "resume"] = "keep"
    turn_limit_s: float = 0.0  # generator and learner take turns on the same devices; 0: each has its own


# For a run in a process of its own, which goes on until it is stopped.
ENDLESS = FlowSettings(
    seed=0, steps=1_000_000, groups_per_step=4, window=1, max_staleness=2, generators=1, scorers=1, depth=8,
    token_s=0.005, sigma=0.5, update_s=0.02, score_s=0.02, train_s=0.02, filter_every=7, initial=12, save_every=5,
    is_finite=False,
)  # fmt: skip


def random_settings(seed: int) -> FlowSettings:
    draw = random.Random(seed)
    per_version = draw.randint(1, 6)
    max_staleness = draw.choice([0, 0, 1, 1, 2, 4])
    most = (max_staleness + 1) * per_version
    window = draw.randint(1, max(1, min(4, most - per_version + 1)))
    return FlowSettings(
        seed=seed,
        steps=draw.randint(2, 6),
        groups_per_step=per_version,
        window=window,
        max_staleness=max_staleness,
        generators=draw.randint(1, 3),
        scorers=draw.randint(1, 3),
        depth=draw.randint(1, 8),
        token_s=draw.choice([0.0, 0.001, 0.05]),
        sigma=draw.choice([0.0, 0.5, 2.0]),
        update_s=draw.choice([0.0, 0.05, 5.0]),
        score_s=draw.choice([0.0, 0.01, 1.0]),
        train_s=draw.choice([0.0, 0.02, 1.0]),
        filter_every=draw.choice([0, 0, 2, 5]),
        initial=draw.randint(per_version, max(per_version, most + 1 - window)),
        is_finite=draw.random() < 0.7,
        on_update=draw.choice(["keep", "keep", "resume", "wait"]),  # drawn anew at each update, some would never end
    )


def flow(s: FlowSettings, learner_class: type[Learner] = ObservedLearner) -> Graph:
    costs = {
        "decode": {"step_s": s.token_s, "log_sigma": s.sigma},
        "calls": {
            "update_transfer": {"call_s": s.update_s},
            "train": {"call_s": s.train_s * s.groups_per_step},
            "sleep": {"call_s": 0.3},
            "wake": {"call_s": 0.2},
        },
    }
    sampler = Sampler(model=stand_in_model(), sampling=Sampling(max_tokens=8), group_size=2, seed=s.seed)
    grpo = Select(use="flowrl.algorithms.grpo:GRPO" if s.replay.ratio else NULL)
    learning = Learning(algorithm=grpo, steps=s.steps, groups_per_step=s.groups_per_step, max_staleness=s.max_staleness)
    prompts = NumberedPrompts(Prompts.Config(), sampler)
    module, kind = ("tests.support.turns", "Shared") if s.turn_limit_s else ("flowrl.simulation.fake", "Fake")
    shared = {"share": "learner", "turns": True, "turn_limit_s": s.turn_limit_s} if s.turn_limit_s else {}
    generator = Generator(
        Generator.Config(replicas=s.generators, max_groups=2, group_size=2, on_update=s.on_update,
                         engine=f"{module}:{kind}Generation", engine_options={"costs": costs}, **shared),
        sampler,
    )  # fmt: skip
    scorer = Scorer(Scorer.Config(replicas=s.scorers, mean_s=s.score_s, filter_every=s.filter_every, seed=s.seed))
    engine = f"{module}:{kind}Training" if s.ranks == 1 else "tests.support.marching_engine:MarchingTraining"
    learner = learner_class(
        Learner.Config(ranks=s.ranks, engine=engine, engine_options={"costs": costs}, save_rollouts=False,
                       save_every=s.save_every, evaluate_every=max(0, s.evaluate_every)),
        sampler, learning,
    )  # fmt: skip
    nodes: dict[str, Stage] = {"prompts": prompts, "generator": generator, "scorer": scorer, "learner": learner}
    samples, edges = scorer.samples, list[Edge]()
    if s.replay.ratio:
        nodes["replay"] = replay = ReplayBuffer(s.replay, sampler, learning)
        edges.append(Queue(scorer.samples, replay.fresh))
        samples = replay.samples
    if s.evaluate_every >= 0:
        nodes["judge"] = judge = Judge(Judge.Config(mean_s=s.judge_s, peak=s.peak))
        config = Evaluator.Config(samples=1, in_flight=4, sets=s.sets, best_by="heldout" if s.peak >= 0 else "")
        nodes["evaluation"] = evaluation = NumberedEvaluator(config, sampler)
        examiner = generator
        if s.beside:
            settings = msgspec.structs.replace(generator.config, replicas=s.beside)
            nodes["examiner"] = examiner = Examiner(settings, sampler)
            edges.append(Latest(learner.examined, examiner.weights))
        if s.peak >= 0:
            edges.append(Latest(evaluation.results, learner.results))
        edges += [
            Latest(learner.evaluations, evaluation.requests),
            Queue(evaluation.prompts, examiner.heldout, depth=4, most=4),
            Queue(examiner.heldout_rollouts, judge.rollouts, depth=4, most=4),
            Queue(judge.scored, evaluation.rollouts, depth=4, most=4),
        ]
    return Graph(
        nodes=nodes,
        edges=[
            *edges,
            Queue(prompts.prompts, generator.prompts, depth=s.depth),
            Queue(generator.rollouts, scorer.rollouts, depth=s.depth),
            Queue(samples, learner.samples, window=s.window),
            Latest(learner.weights, generator.weights),
            Credits(learner.released, prompts.credits, initial=s.initial, is_endless=not s.is_finite),
        ],
        until=learner,
    )


@dataclass(frozen=True)
class Ran:
    outcome: Outcome
    steps: list[Step]
    spans: list[Span]
    notices: list[Notice]
    evaluations: list[Evaluation]


def run(graph: Graph, run_dir: Any, **options: Any) -> Ran:
    """Run a flow on the virtual clock; raises what the run raises."""
    events: list[Event] = []
    settings = LocalOptions(
        run_dir=run_dir, is_virtual=True, consume=events.extend, status_interval_s=50.0, stall_timeout_s=10_000.0,
        **options,
    )  # fmt: skip
    outcome = run_virtual(run_local(graph, settings))
    steps = [event for event in events if isinstance(event, Step)]
    spans = [event for event in events if isinstance(event, Span)]
    notices = [event for event in events if isinstance(event, Notice)]
    return Ran(outcome, steps, spans, notices, [event for event in events if isinstance(event, Evaluation)])
