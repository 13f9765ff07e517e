"""A stage and a message of the user's own, in the graph file or beside it, are found in every process.

The flow's host and each replica rebuild their part of the plan; here another interpreter does, in another directory and
without a path to the graph.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec
import pytest

from flowrl.graph.program import load_program, plan_of
from flowrl.messages import Buffer, Sample, encode
from tests.support.command import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

BESIDE = """
from flowrl import messages
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig

class Judged(messages.Scored):
    verdict: str = ""

class Judge(Stage):
    class Config(StageConfig):
        strictness: int = 3

    rollouts: In[messages.Rollouts]
    judged: Out[Judged]
"""
GRAPH = """
from my_stages import Judge
from flowrl.graph import ports
from flowrl.graph.graph import Graph, Queue
from flowrl.graph.graph import RunSettings
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Rollouts, Scored

class Repeat(Stage):
    scored: ports.In[Scored]
    rollouts: ports.Out[Rollouts]

class Settings(RunSettings):
    judge: Judge.Config = Judge.Config()

def build(s: Settings) -> Graph:
    judge, repeat = Judge(s.judge), Repeat(StageConfig())
    edges = [Queue(judge.judged, repeat.scored), Queue(repeat.rollouts, judge.rollouts, depth=1, most=1)]
    return Graph(nodes=dict(judge=judge, repeat=repeat), edges=edges, until=repeat)
"""
ELSEWHERE = """
import sys, msgspec
from pathlib import Path
from flowrl.graph.program import GraphPlan, graph_of
from flowrl.messages import Scored, decode
message = decode(Path(sys.argv[2]).read_bytes())
assert isinstance(message, Scored)
graph = graph_of(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=GraphPlan))
graph.check()
print(graph.nodes["judge"].config.strictness, graph.nodes["repeat"].scored.brings.__name__, message.verdict)
"""


def test_a_stage_and_a_message_of_the_users_are_found_in_another_process(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "my_stages.py").write_text(BESIDE)
    (home / "graph.py").write_text(GRAPH)
    program = load_program(home / "graph.py", overrides=["judge.strictness=7"])
    (tmp_path / "plan.json").write_bytes(msgspec.json.encode(plan_of(program.graph)))
    judged = program.graph.nodes["judge"].ports["judged"].message
    sample = Sample(token_ids=Buffer.ints([1]), logprobs=Buffer.floats([0.0]), versions=[], finish="stop", text="x")
    message = judged(
        group_id=0, token_ids=Buffer.ints([1]), columns={}, num_samples=1, seed=0, samples=[sample], generator="g.0",
        scores={"judge": [1.0]}, verdict="guilty",
    )  # fmt: skip
    (tmp_path / "message").write_bytes(encode(message))
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "plan.json"), str(tmp_path / "message")]
    found = subprocess.run(command, cwd="/", env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert found.stdout.split() == ["7", "Judged", "guilty"], found.stderr
