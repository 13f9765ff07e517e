"""A run is resumed with its own data, groups and figures, or not at all; what else differs is written down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flowrl.errors import ConfigError, DataError
from flowrl.graph.program import Program, load_program
from flowrl.runtime.resuming import (
    changed_code,
    check_same_data,
    check_same_graph,
    check_same_run,
    is_fixed,
    record_attempt,
)
from flowrl.runtime.rundir import write_plan

GRAPHS = Path(__file__).parents[3] / "graphs"


def program(*overrides: str, run: Path | None = None, graph: str = "group_async.py") -> Program:
    config = None if run is None else run / "settings.yaml"
    found = load_program(GRAPHS / graph, config=config, overrides=overrides)
    for node in ("prompts", "examples"):
        if node in found.graph.nodes:
            found.graph.nodes[node].data_digest = "24 rows, 0f"
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_plan(tmp_path, program("learner.lr=1e-6"))
    return tmp_path


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.seed=7", "data.seed: is 7, but the run has 0"),
        ("data.num_heldout=8", "data.num_heldout: is 8, but the run has 64"),
        ("data.source=other.jsonl", 'data.source: is "other.jsonl", but the run has "reasoning-gym"'),
        ("seed=1", "seed: is 1, but the run has 0"),
        ("generator.group_size=2", "generator.group_size: is 2, but the run has 8"),
        ("groups_per_step=4", "groups_per_step: is 4, but the run has 16"),
        ("model=other", 'model: is "other"'),
        ("sampling.temperature=0.5", "sampling.temperature: is 0.5"),
        ("algorithm=flowrl.algorithms.rloo:RLOO", "algorithm.use: is"),
        ("reward.function=flowrl.rewards.verify:exact_answer", "reward.function: is"),
        ("reward.weight=2", "reward.weight: is 2.0"),
        ("evaluation.samples=1", "evaluation.samples: is 1, but the run has 4"),
        ("max_staleness=2", "max_staleness: is 2"),
        ("reward_models=[a]", "group_async.py: has another reward_model_0 than the run"),
    ],
)
def test_what_changes_data_groups_or_figures_is_refused_by_name(run: Path, override: str, said: str):
    with pytest.raises(ConfigError) as caught:
        check_same_run(run, program(override, run=run))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_that_is_refused_is_named(run: Path):
    with pytest.raises(ConfigError, match=r"has 0 \(other than in the run, too: data\.seed, generator\.group_size\)"):
        check_same_run(run, program("seed=1", "data.seed=1", "generator.group_size=2", "steps=3", run=run))


def test_who_judges_and_by_what_stays_where_it_judges_does_not():
    stays = (
        "judge.rubric.constitution",
        "judge.server.model",
        "model_judge.model",
        "model_judge.rubric.way",
        "model_judge.verdict",
        "judge.name",
    )
    assert all(map(is_fixed, stays))
    assert not any(map(is_fixed, ("judge.server.url", "judge.replicas", "model_judge.max_running", "judge.in_flight")))


def test_another_graph_is_refused(run: Path):
    check_same_graph(run, Path("moved") / "group_async.py")
    with pytest.raises(ConfigError, match=r"^sft\.py: is not the graph of .*; resume with .*group_async\.py"):
        check_same_graph(run, Path("sft.py"))
    with pytest.raises(ConfigError, match="than the run"):
        check_same_run(run, program(graph="preference.py"))


def test_the_same_settings_are_taken_and_the_rest_is_recorded(run: Path):
    assert check_same_run(run, program(run=run)) == {}
    other = program("learner.lr=1e-3", "steps=40", "generator.replicas=2", "wandb.name=b", run=run)
    changes = check_same_run(run, other)
    assert changes["learner.lr"] == (1e-6, 1e-3)
    assert sorted(changes) == ["generator.replicas", "learner.lr", "steps", "wandb.name"]
    said = list(record_attempt(run, changes, version=3))
    write_plan(run, other)
    assert "learner.lr is 0.001 from here on (it was 1e-6)" in said
    assert yaml.safe_load((run / "settings.yaml").read_text())["learner"]["lr"] == 1e-3
    record = json.loads((run / "attempts" / "001.json").read_text())
    assert record["version"] == 3
    assert record["changed"]["steps"] == {"old": 20, "new": 40}
    assert check_same_run(run, program(run=run)) == {}, "the next attempt goes on with the newest settings"
    assert list(record_attempt(run, {}, version=5)) == []
    assert len(list((run / "attempts").iterdir())) == 2


def test_data_that_grew_since_the_run_began_are_noticed(run: Path):
    again = program(run=run)
    check_same_data(run, again)
    again.graph.nodes["prompts"].data_digest = "28 rows, 1e"
    with pytest.raises(DataError, match=r"prompts: the data have changed.*then 24 rows, 0f; now 28 rows, 1e"):
        check_same_data(run, again)


def test_code_of_the_run_s_own_that_was_changed_is_told_and_recorded(tmp_path: Path):
    (mine := tmp_path / "mine.py").write_text("def score(completion): return 1.0\n")
    write_plan(tmp_path, program(f"reward.function={mine}:score"))
    again = program(run=tmp_path)
    assert changed_code(tmp_path, again) == []
    mine.write_text("def score(completion): return 2.0\n")
    (line,) = record_attempt(tmp_path, {}, version=1, code=changed_code(tmp_path, again))
    assert line.startswith(f"warning: {mine} has changed since the run's last start")
    assert json.loads((tmp_path / "attempts" / "001.json").read_text())["code"] == [str(mine)]
