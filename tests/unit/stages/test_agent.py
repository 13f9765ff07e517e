"""The agent in a whole flow on the virtual clock: laws, fairness between groups, failures, evaluation."""

from __future__ import annotations

import json
import random
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.config import Select
from flowrl.data.prompts import PromptRow
from flowrl.engines.base import Sampling
from flowrl.errors import ConfigError, FlowrlError
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Buffer, Samples, Scored, extend
from flowrl.runtime.ledger import read_entries
from flowrl.runtime.local import LocalOptions, run_local
from flowrl.simulation.clock import run_virtual
from flowrl.simulation.costs import Profile
from flowrl.simulation.run import simulate
from flowrl.simulation.stand_ins import stand_in_model
from flowrl.stages.agent import Agent
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.learner import Learner
from flowrl.stages.prompts import Prompts
from flowrl.stages.sampler import Learning, Sampler
from flowrl.telemetry.events import Evaluation
from tests.support import games
from tests.support.flows import NULL, NumberedPrompts, ObservedLearner, run
from tests.support.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.stage import Context

GAMES = "tests.support.games"
seen: list[Scored] = []  # what left the agent, in the order in which it came


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory that passes for a model's and has a tokenizer."""
    directory = tmp_path / "model"
    shutil.copytree(stand_in_model(), directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


class Recorder(Stage):
    """Keeps what the agent gives and hands it on to the learner."""

    class Config(StageConfig):
        pass

    scored: In[Scored]
    samples: Out[Samples]

    def __init__(self, config: Config) -> None:
        self.config = config

    async def run(self, context: Context) -> None:
        async for group in self.scored:
            seen.append(group)
            zeros = [Buffer.floats([0.0] * len(sample.token_ids)) for sample in group.samples]
            await self.samples.put(extend(Samples, group, ref_logprobs=zeros, advantages=zeros))


class HeldoutEvaluator(Evaluator):
    """The real evaluator over three numbered prompts."""

    def _load(self) -> Any:
        return [
            PromptRow(index=k, place=f"rows:{k}", token_ids=[3, 4], text="?", columns={"position": 1000 + k})
            for k in range(3)
        ]


def flow(model: str, environment: str, *, steps: int = 2, per_version: int = 2, initial: int = 4, replicas: int = 1,
         token_s: float = 0.01, update_s: float = 0.05, sampling: Sampling | None = None, evaluates: bool = False,
         max_staleness: int = 1, **agent: Any) -> Graph:  # fmt: skip
    seen.clear()
    games.calls.clear()
    calls = {"update_transfer": {"call_s": update_s}, "train": {"call_s": 0.02 * per_version}}
    costs = {"decode": {"step_s": token_s, "log_sigma": 0.5}, "calls": calls}
    sampler = Sampler(model=model, sampling=sampling or Sampling(max_tokens=6), group_size=2, seed=5)
    learning = Learning(
        algorithm=Select(use=NULL), steps=steps, groups_per_step=per_version, max_staleness=max_staleness
    )
    prompts = NumberedPrompts(Prompts.Config(), sampler)
    playing = Agent(
        Agent.Config(environment=f"{GAMES}:{environment}", isolation="thread", replicas=replicas, timeout_s=1e6,
                     engine="flowrl.simulation.fake:FakeGeneration", engine_options={"costs": costs}, **agent),
        sampler,
    )  # fmt: skip
    recorder = Recorder(Recorder.Config())
    learner = ObservedLearner(
        Learner.Config(engine="flowrl.simulation.fake:FakeTraining", engine_options={"costs": costs},
                       save_rollouts=False, save_every=0),
        sampler, learning,
    )  # fmt: skip
    nodes: dict[str, Stage] = {"prompts": prompts, "agent": playing, "recorder": recorder, "learner": learner}
    edges: list[Any] = [
        Queue(prompts.prompts, playing.prompts, depth=8),
        Queue(playing.rollouts, recorder.scored, depth=8),
        Queue(recorder.samples, learner.samples),
        Latest(learner.weights, playing.weights),
        Credits(learner.released, prompts.credits, initial=initial),
    ]
    if evaluates:
        evaluation = nodes["evaluation"] = HeldoutEvaluator(Evaluator.Config(function="", samples=2), sampler)
        edges += [
            Latest(learner.evaluations, evaluation.requests),
            Queue(evaluation.prompts, playing.heldout, depth=2),
            Queue(playing.heldout_rollouts, evaluation.rollouts, depth=64, most=64),
        ]
    return Graph(nodes=nodes, edges=edges, until=learner)


def test_whole_episodes_reach_the_learner_under_the_newest_weights(model: str, tmp_path: Path):
    outcome = run(flow(model, "AsyncEcho", environment_options={"turns": 3, "delay_s": 0.1}), tmp_path / "run").outcome
    assert outcome.totals["learned"] == 4
    group = min(seen, key=lambda each: each.group_id)
    assert group.scores == {"AsyncEcho": [1.5, 1.5]}
    assert group.rewards == [float(placed.numpy().sum()) for placed in group.placed or []]
    asked = str(tiny_tokenizer().decode(group.token_ids.tolist()))
    assert asked.endswith("user\nplay 0<|im_end|>\n<|im_start|>assistant\n")
    for sample in group.samples:
        assert sample.mask is not None
        assert sample.text.count("you said") == 2, "three turns, two observations between them"
        assert sample.finish == "stop"


@pytest.mark.parametrize("first", range(0, 12, 3))
def test_random_schedules_keep_the_laws(first: int, model: str, tmp_path: Path):
    for seed in range(first, first + 3):
        draw = random.Random(seed)
        per_version, max_staleness = draw.randint(1, 3), draw.choice([0, 1, 2])
        graph = flow(
            model, "AsyncEcho", steps=3, per_version=per_version, initial=(max_staleness + 1) * per_version,
            max_staleness=max_staleness, replicas=draw.randint(1, 2), max_groups=draw.randint(1, 3),
            token_s=draw.choice([0.0, 0.05]), update_s=draw.choice([0.0, 0.05, 5.0]), max_turns=draw.randint(1, 4),
            environment_options={"turns": draw.randint(1, 4), "delay_s": draw.choice([0.0, 0.1, 2.0])},
        )  # fmt: skip
        ran = run(graph, tmp_path / str(seed))
        staleness = [age for step in ran.steps for age in step.staleness]
        assert ran.outcome.totals["learned"] == len(staleness) == 3 * per_version, seed
        assert max(staleness) <= max_staleness, seed
        assert ran.outcome.totals["unfinished"] == 0, seed


def test_new_weights_arrive_in_the_middle_of_an_episode(model: str, tmp_path: Path):
    run(flow(model, "AsyncEcho", steps=4, environment_options={"turns": 4, "delay_s": 0.4}), tmp_path / "run")
    versions = [[span.version for span in sample.versions] for group in seen for sample in group.samples]
    assert any(len(set(each)) > 1 for each in versions)
    assert all(each == sorted(each) for each in versions)


def test_a_graph_with_an_environment_is_not_simulated(model: str):
    with pytest.raises(ConfigError, match=r"do not say how they are simulated: agent \(Agent\), recorder \(Recorder\)"):
        simulate(flow(model, "AsyncEcho"), Profile(format=1, nodes={}), steps=2)


def test_a_slow_environment_holds_up_its_own_group_only(model: str, tmp_path: Path):
    graph = flow(model, "AsyncEcho", initial=4, per_version=4, steps=1, max_staleness=0, max_groups=4,
                 environment_options={"delay_s": 0.01, "slow_s": 1000.0})  # fmt: skip
    run(graph, tmp_path / "run")
    assert [group.group_id for group in seen][-1] == 0
    assert sorted(group.group_id for group in seen[:3]) == [1, 2, 3]


def test_an_episode_that_fails_is_played_again(model: str, tmp_path: Path):
    games.Fails.failures = 0
    options = {"positions": [1], "times": 1}
    outcome = run(flow(model, "Fails", environment_options=options, retries=1), tmp_path / "run").outcome
    assert (outcome.totals["learned"], outcome.totals["failed"]) == (4, 0)


def test_a_group_whose_environment_fails_each_time_is_kept_and_rejected(model: str, tmp_path: Path):
    games.Fails.failures = 0
    outcome = run(flow(model, "Fails", environment_options={"positions": [1, 2]}), tmp_path / "run").outcome
    assert outcome.totals["learned"] == 4
    assert outcome.totals["failed"] == 2
    reasons = {e.group: e.reason for e in read_entries(tmp_path / "run" / "ledger.jsonl") if e.event == "failed"}
    assert set(reasons) == {1, 2}
    assert "raised OSError: the board fell off the table" in reasons[1]
    kept = json.loads((tmp_path / "run" / "quarantine" / "group-2.json").read_text())
    assert kept["input"]["columns"] == {"position": 2}


def test_a_failure_ends_the_run_where_that_is_set(model: str, tmp_path: Path):
    graph = flow(model, "Fails", environment_options={"positions": [1]}, on_error="stop")
    with pytest.raises(FlowrlError, match="the board fell off the table"):
        run(graph, tmp_path / "run", max_restarts=0)


def test_samples_of_a_group_must_begin_alike(model: str, tmp_path: Path):
    graph = flow(model, "Moody", on_error="stop")
    with pytest.raises(FlowrlError, match=r"samples 0 and 1 of group . begin with different observations"):
        run(graph, tmp_path / "run", max_restarts=0)


def test_held_out_tasks_are_played_to_the_end_and_scored_by_their_environment(model: str, tmp_path: Path):
    events: list[Any] = []
    graph = flow(model, "AsyncEcho", evaluates=True, environment_options={"turns": 3})
    options = LocalOptions(run_dir=tmp_path / "run", is_virtual=True, consume=events.extend, stall_timeout_s=1e5)
    run_virtual(run_local(graph, options))
    found = [event for event in events if isinstance(event, Evaluation)]
    assert [each.version for each in found] == [0, 2]
    assert found[0].scores == [[1.5, 1.5]] * 3
    assert found[0].completions[0]["completion"].count("you said") == 2
