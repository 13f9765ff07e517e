"""What a user can get wrong ends in one clear line and exit code 2, with nothing started or written."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from flowrl import __main__ as as_module
from flowrl import __version__
from flowrl.cli import main
from tests.support.command import GRAPH, ROOT, SCRIPT, flowrl, tiny_settings

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

MINIMAL = """
from flowrl.graph.graph import RunSettings
class Settings(RunSettings):
    pass
"""


class Refused:
    """Runs a command in this process and insists that it is refused in one line."""

    def __init__(self, cwd: Path, capture: pytest.CaptureFixture[str]) -> None:
        self._cwd = cwd
        self._capture = capture

    def __call__(self, *arguments: str | Path) -> str:
        code = main([str(argument) for argument in arguments])
        printed = self._capture.readouterr()
        assert code == 2, printed
        said = printed.err.splitlines()
        assert len(said) == 1, printed
        assert said[0].startswith("flowrl: "), printed
        assert not (self._cwd / "runs").exists(), "nothing was written"
        return said[0]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    monkeypatch.chdir(tmp_path)
    return Refused(tmp_path, capsys)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("learner.lrr=1", "did you mean 'lr'"),
        ("lerner.lr=1", "did you mean 'learner'"),
        ("steps=0", "steps"),
        ("learner.lr=fast", "learner.lr"),
        ("max_staleness=-1", "max_staleness"),
        ("algorithm=flowrl.algorithms.ppo:PPOO", "did you mean 'PPO'"),
        ("algorithm.clip_loww=0.1", "did you mean 'clip_low'"),
        ("algorithm.beta=0.1", "PPO has no setting 'beta', did you mean algorithm.kl.coef?"),
        ("algorithm=no.such.module:X", "no module 'no' is installed"),
        ("algorithm=grop", "did you mean GRPO"),
        ("reward.function=flowrl.rewards.verify:nothing", "nothing"),
        ("generator.cpus=64", "cores asked for"),
        ("learner.gpus=8", "8 GPUs for one rank"),
        ("learner.minibatches=3", "3 minibatches do not divide"),
        ("model=/no/such/directory", "/no/such/directory"),
        ("data.source=/no/such/file.jsonl", "/no/such/file.jsonl"),
        ("data.tasks=[]", "data.tasks"),
        ("data.max_prompt_tokens=5", "tokens"),
        ("generator.max_model_len=40", "max_model_len"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(setting: str, said: str, tiny: Path, refused: Refused) -> None:
    line = refused("run", GRAPH, *tiny_settings(tiny), "--set", setting)
    assert said in line, line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "has no 'Settings'"),
        (MINIMAL, "has no 'build'"),
        (MINIMAL + "def build(s):\n    return 1 / 0\n", "ZeroDivisionError"),
        (MINIMAL + "def build(s):\n    return 7\n", "build returned int"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
    ],
)
def test_a_wrong_graph_file_is_refused_in_one_line(text: str, said: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "graph.py").write_text(text)
    assert said in refused("check", tmp_path / "graph.py")


def test_a_missing_graph_file_is_refused(refused: Refused) -> None:
    assert "no such graph file" in refused("check", "nowhere.py")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', ":2"),
        ('{"promt": "a"}\n', "promt"),
        ("", "data.jsonl"),
    ],
)
def test_a_bad_data_file_is_refused_with_its_line(
    rows: str, said: str, tiny: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "data.jsonl").write_text(rows)
    settings = [*tiny_settings(tiny), "--set", f"data.source={tmp_path / 'data.jsonl'}"]
    assert said in refused("check", GRAPH, *settings)


def test_a_directory_that_holds_a_run_is_not_written_into(tiny: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "old" / "run").mkdir(parents=True)
    (tmp_path / "old" / "run" / "metrics.jsonl").write_text("{}")
    line = refused("run", GRAPH, "--runs-dir", tmp_path / "old", "--name", "run", *tiny_settings(tiny))
    assert "holds a run already" in line


def test_check_prints_the_plan_and_starts_nothing(tiny: Path, tmp_path: Path) -> None:
    result = flowrl("check", GRAPH, *tiny_settings(tiny), cwd=tmp_path)
    assert result.code == 0, result.text
    assert "staleness: at most 1" in result.text
    assert "nothing was started" in result.text
    assert not (tmp_path / "runs").exists()


def test_show_prints_edges_and_a_diagram(tmp_path: Path) -> None:
    assert "learner.samples" in flowrl("show", GRAPH, cwd=tmp_path).text
    assert flowrl("show", GRAPH, "--mermaid", cwd=tmp_path).text.startswith("flowchart LR")


@pytest.mark.parametrize("graph", sorted((ROOT / "graphs").glob("*.py")), ids=lambda path: path.stem)
def test_every_shipped_graph_checks(graph: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"distill_online": f"objective.teacher={tiny}", "critique": "agent.max_model_len=512"}.get(graph.stem)
    further = ["--set", own] if own else []
    code = main(["check", str(graph), *map(str, tiny_settings(tiny, graph)), *further])
    printed = capsys.readouterr()
    assert code == 0, printed
    assert "nothing was started" in printed.out + printed.err


def test_a_refusal_leaves_the_process_with_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    result = flowrl("run", "nowhere.py", cwd=tmp_path)
    assert result.code == 2
    assert len(result.lines) == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in flowrl("run", "nowhere.py", "--debug", cwd=tmp_path).text


def test_a_module_of_its_name_is_the_command(tmp_path: Path):
    assert as_module.main is main
    for command in ([sys.executable, "-m", "flowrl"], [SCRIPT]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=tmp_path, check=True)
        assert done.stdout == f"flowrl {__version__}\n"
