"""The first ten minutes with data, a reward and a game of one's own, in a directory of one's own.

One of each kind goes through the console script as a user calls it: no PYTHONPATH, none of the variables that the
tests' own processes are kept quiet with. The others call the command in this process, which has the libraries loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.cli import main
from tests.support.command import ROOT, SCRIPT, tiny_settings

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

GROUP = ROOT / "graphs" / "group_async.py"
KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "VIRTUAL_ENV")
ROWS = [{"prompt": f"What is {k} + 1?", "answer": str(k + 1)} for k in range(12)]
PLAN = "node        stage"  # how the output of a check begins


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def flowrl(here: Path, *arguments: object) -> tuple[int, list[str]]:
    """Run the console script; returns its exit code and what it said."""
    environment = {name: os.environ[name] for name in KEPT if name in os.environ} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [SCRIPT, *map(str, arguments)], cwd=here, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines()


@pytest.fixture
def in_process(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command in this process; returns its exit code and what it said, standard output first."""
    monkeypatch.chdir(here)

    def call(*arguments: object) -> tuple[int, list[str]]:
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, [*printed.out.splitlines(), *printed.err.splitlines()]

    return call


def settings(tiny: Path, graph: Path = GROUP, **more: Any) -> list[str]:
    small = tiny_settings(tiny, graph, **{"data.num_train": 0, "data.num_heldout": 2})
    given = {"data.source": "rows.jsonl", **{name.replace("__", "."): value for name, value in more.items()}}
    return [*small, *(part for name, value in given.items() for part in ("--set", f"{name}={value}"))]


TRL = """
def score(prompts, completions, answer, **columns):
    return [float(a in c) for c, a in zip(completions, answer)]
"""
ONE = """
from my_words import found
async def score(completion, answer, **columns):
    return found(answer, completion)
"""
VERL = """
def score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": ground_truth in solution_str}
"""
OPENRLHF = """
def score(queries, prompts, labels):
    return {"rewards": [float(label in query) for query, label in zip(queries, labels)]}
"""
PARTLY = """
def score(completions, **columns):
    return [None for c in completions]
"""


def test_a_reward_beside_its_user_is_all_that_a_check_needs(tiny: Path, here: Path):
    (here / "my_rewards.py").write_text(TRL)
    code, said = flowrl(here, "check", GROUP, *settings(tiny, reward__function="my_rewards:score"))
    assert code == 0, said
    assert said[0].startswith(PLAN), "no stray line before the plan"
    assert said[-1] == "ok: nothing was started"


@pytest.mark.parametrize(
    ("code", "path"),
    [
        (ONE, "my_rewards.py:score"), (VERL, "./my_rewards.py:score"), (OPENRLHF, "my_rewards:score"),
        (PARTLY, "{here}/my_rewards.py:score"),
    ],
)  # fmt: skip
def test_a_reward_in_any_common_shape_is_found_where_its_user_stands(
    code: str, path: str, tiny: Path, here: Path, in_process: Any
):
    (here / "my_rewards.py").write_text(code)
    (here / "my_words.py").write_text("def found(word, text):\n    return float(word in text)\n")
    code_, said = in_process("check", GROUP, *settings(tiny, reward__function=path.format(here=here)))
    assert code_ == 0, said
    assert said[-1] == "ok: nothing was started"


def test_code_beside_the_graph_file_is_found_and_pinned(tiny: Path, here: Path, in_process: Any):
    mine = here / "mine"
    mine.mkdir()
    (mine / "graph.py").write_text(GROUP.read_text())
    (mine / "my_rewards.py").write_text(TRL)
    (mine / "my_algo.py").write_text("from flowrl.algorithms.grpo import GRPO\nclass Mine(GRPO):\n    pass\n")
    given = settings(tiny, mine / "graph.py", reward__function="my_rewards:score", algorithm="my_algo:Mine")
    code, said = in_process("check", mine / "graph.py", *given)
    assert code == 0, said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {},
            "reward.function: flowrl.rewards.verify:reasoning_gym_score was tried on a row of the data (",
        ),
        (
            {"reward__function": "nowhere:score"},
            "no module 'nowhere' is installed, and there is no nowhere.py in {here} or",
        ),
        (
            {"reward__function": "my_rewards:wrong"},
            "(text, gold) has no signature that is known; take lists, `def score(",
        ),
        ({"reward__function": "my_rewards:gold"}, "needs a column 'gold' that the data lacks; it has answer, "),
        ({"reward__function": "my_rewards:raises"}, " like it) and raised ZeroDivisionError: "),
        (
            {"reward__function": "my_rewards:right", "evaluation__function": "my_rewards:gold"},
            "evaluation.function: ",
        ),
        ({"reward__function": "my_rewards:right", "algorithm": "grop"}, "did you mean GRPO? there are CISPO, DAPO, "),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_starts(
    more: dict[str, Any], said: str, tiny: Path, here: Path, in_process: Any
):
    (here / "my_rewards.py").write_text(
        "def wrong(text, gold): ...\n"
        "def gold(completions, gold): ...\n"
        "def raises(completion): return 1 / 0\n"
        "def right(completion, answer): return float(completion == answer)\n"
    )
    through = in_process if more else partial(flowrl, here)
    code, lines = through("run", GROUP, *settings(tiny, **more))
    refusals = [line for line in lines if line.startswith("flowrl: ")]
    assert code == 2, lines
    assert lines[-1:] == refusals, lines
    assert said.format(here=here) in refusals[0]
    assert not (here / "runs").exists()


def test_an_environment_of_ones_own_is_tried_on_a_task(tiny: Path, here: Path, in_process: Any):
    graph = ROOT / "graphs" / "agent_async.py"
    (here / "my_game.py").write_text(
        "class Game:\n"
        "    def reset(self, task, seed):\n        return task['prompt']\n"
        "    def step(self, action):\n        return '', 1.0, True\n"
        "class Lost(Game):\n"
        "    def step(self, action):\n        return 1.0\n"
    )
    code, said = flowrl(here, "check", graph, *settings(tiny, graph, agent__environment="my_game:Game"))
    assert code == 0, said
    code, said = in_process("check", graph, *settings(tiny, graph, agent__environment="my_game:Lost"))
    assert code == 2
    assert "my_game.py:Lost was tried on a row of the data (" in said[-1]
    assert " and step returned a float; return (observ" in said[-1]


ENGINES = """
from flowrl.engines.torch import SequenceScoringEngine, TorchEngine
class Mine(TorchEngine):
    def __init__(self, *arguments, note="", **options):
        super().__init__(*arguments, **options)
        assert note in ("", "mine")
class Judge(SequenceScoringEngine):
    pass
"""
STAGE = """
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Scored
class Passing(Stage):
    class Config(StageConfig):
        shout: bool = False
    scored: In[Scored]
    passed: Out[Scored]
    async def run(self, context):
        async for group in self.scored:
            await self.passed.put(group)
"""


def own_parts(here: Path) -> Path:
    """Write engines, a stage and a graph that has it, each in a file of its own; returns the graph's."""
    (here / "my_engine.py").write_text(ENGINES)
    (here / "my_stage.py").write_text(STAGE)
    text = GROUP.read_text()
    for before, after in (
        ("from flowrl.config import Select\n", "from flowrl.config import Select\nfrom my_stage import Passing\n"),
        ("    reference: ", "    passing: Passing.Config = Passing.Config()\n    reference: "),
        ("row = dict(", "passing = Passing(s.passing)\n    row = dict(passing=passing, "),
        (
            "Queue(scoring.scored, reference.scored)",
            "Queue(scoring.scored, passing.scored),\n            Queue(passing.passed, reference.scored)",
        ),
    ):
        assert text.count(before) == 1
        text = text.replace(before, after)
    (here / "my_graph.py").write_text(text)
    return here / "my_graph.py"


def test_engines_and_a_stage_of_ones_own_are_found_where_their_user_stands(tiny: Path, here: Path, in_process: Any):
    (here / "my_rewards.py").write_text(TRL)
    graph = own_parts(here)
    given = {"reward__function": "my_rewards:score", "learner__engine": "my_engine:Mine",
             "reference__engine": "my_engine.py:Mine", "reward_model__engine": "./my_engine.py:Judge",
             "learner__engine_options": "{note: mine}"}  # fmt: skip
    code, said = flowrl(here, "check", graph, *settings(tiny, graph, **given))
    assert code == 0, said
    code, said = in_process("check", graph, *settings(tiny, graph, **{**given, "learner__engine": "my_engine:Main"}))
    assert (code, "did you mean 'Mine'?" in said[-1]) == (2, True), said


def test_data_reward_engines_and_a_stage_of_ones_own_make_a_run_with_a_held_out_score(tiny: Path, here: Path):
    (here / "my_rewards.py").write_text(TRL)
    graph = own_parts(here)
    given = settings(tiny, graph, reward__function="my_rewards:score", runtime="local", hints="false", steps=2,
                     learner__engine="my_engine:Mine", reference__engine="./my_engine.py:Mine",
                     learner__engine_options="{note: mine}")  # fmt: skip
    code, said = flowrl(here, "run", graph, *given, "--name", "first")
    assert code == 0, said
    assert f"{here}/my_engine.py:Mine" in (here / "runs" / "first" / "settings.yaml").read_text()
    rows = [json.loads(line) for line in (here / "runs" / "first" / "metrics.jsonl").read_text().splitlines()]
    assert [row["mean"] is not None for row in rows if row["kind"] == "evaluation"][-1:] == [True]
    assert any("held-out score, 2 prompts" in line for line in said)
    assert not (here / "runs" / "first" / "quarantine").exists()
    for stray in ("de-quantizing", "Setting accelerator", "it/s]"):
        assert not [line for line in said if stray in line]


def test_a_recipe_that_needs_another_run_says_which_command_makes_it(tiny: Path, in_process: Any):
    recipe = ROOT / "graphs" / "recipes" / "smollm2-distill.yaml"
    code, said = in_process("run", ROOT / "graphs" / "sft.py", "--config", recipe, "--set", f"model={tiny}")
    assert code == 2
    assert said[-1] == (
        "flowrl: ./runs/teacher: is not there, and the run reads from it; make it first: "
        "flowrl run graphs/group_async.py --config graphs/recipes/smollm2-grpo.yaml --name teacher"
    )


def test_room_for_answers_follows_from_whose_data_they_are(tiny: Path, here: Path):
    from flowrl.graph.program import load_program

    def room(*overrides: str) -> int:
        return load_program(GROUP, overrides=list(overrides)).settings.sampling.max_tokens

    assert (room(), room("data.source=rows.jsonl"), room("data.source=x", "sampling.max_tokens=32")) == (16, 256, 32)
