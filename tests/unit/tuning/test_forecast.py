"""Forecasts: what is said before a run, from which earlier run, and when nothing is said."""

from __future__ import annotations

import copy
import os
import re
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.errors import ConfigError
from flowrl.graph.graph import Graph
from flowrl.graph.program import load_program
from flowrl.simulation.costs import load_profile
from flowrl.simulation.run import simulate
from flowrl.stages.generator import Generator
from flowrl.tuning import advisor
from flowrl.tuning.advisor import fitting_profile, forecast
from tests.support.command import ROOT
from tests.support.timed_past import ppo, ppo_costs, timed_past

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flowrl.graph.edges import Edge
    from flowrl.graph.stage import Context

Tree = dict[str, Any]
COSTS = ppo_costs(train_s=0.5)


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy with other tests takes longer than a user's does."""
    monkeypatch.setattr(advisor, "FORECAST_S", 100.0)


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one run in it, whose generator took 0.8 s for each group."""
    directory = tmp_path_factory.mktemp("runs")
    timed_past(directory / "earlier", COSTS)
    return directory


def figures(lines: list[str]) -> tuple[float, float]:
    """Return the predicted seconds of a step and samples per second."""
    found = re.search(r": ([\d.]+) s a step, ([\d.]+) samples/s; 12 steps in \d+ s after the start", lines[0])
    assert found, lines
    return float(found[1]), float(found[2])


@pytest.mark.slow
def test_a_run_is_forecast_from_an_earlier_one_of_the_same_machine_and_model(runs_dir: Path) -> None:
    lines = forecast(ppo(), runs_dir)
    ahead, sync = (simulate(ppo(f"max_staleness={m}").graph, COSTS, steps=12) for m in (1, 0))
    assert os.path.relpath(runs_dir / "earlier") in lines[0]
    assert figures(lines) == pytest.approx((1 / ahead.steps_per_s, ahead.samples_per_s), rel=0.005)
    assert lines[1].startswith("  bottleneck: generator, computing")
    gain = re.fullmatch(r"  \+(\d+)% over the synchronous run \(max_staleness=0\)", lines[2])
    assert gain, lines
    assert float(gain[1]) / 100 == pytest.approx(ahead.samples_per_s / sync.samples_per_s - 1, abs=0.006)


@pytest.mark.slow
def test_a_synchronous_run_is_told_what_one_version_of_staleness_would_be_worth(runs_dir: Path) -> None:
    ahead, sync = forecast(ppo(), runs_dir), forecast(ppo("max_staleness=0"), runs_dir)
    said = re.fullmatch(r"  synchronous: max_staleness=1 would be \+(\d+)%", sync[2])
    assert said, sync
    assert float(said[1]) / 100 == pytest.approx(figures(ahead)[1] / figures(sync)[1] - 1, abs=0.01)


@pytest.mark.slow
def test_more_replicas_and_other_depths_are_forecast_from_the_same_profile(runs_dir: Path) -> None:
    one, two = (figures(forecast(ppo(f"generator.replicas={n}", "max_staleness=4"), runs_dir))[1] for n in (1, 2))
    assert two > 1.5 * one


@pytest.mark.parametrize(
    "other",
    [
        "model=Qwen3-0.6B",
        "sampling.max_tokens=512",
        "generator.engine=flowrl.simulation.fake:FakeGeneration",
        "learner.lora.rank=8",
        "critic.dtype=float16",
        "reward.function=flowrl.rewards.math:math_answer",
    ],
)
def test_nothing_is_forecast_from_a_run_of_something_else(other: str, runs_dir: Path) -> None:
    assert forecast(ppo(), runs_dir)
    assert forecast(ppo(other), runs_dir) == []


def changed(runs_dir: Path, target: Path, change: Callable[[Tree], object]) -> Path:
    """Copy the run into another directory with its profile changed."""
    run_dir = target / "other"
    run_dir.mkdir()
    tree = msgspec.json.decode((runs_dir / "earlier" / "profile.json").read_bytes())
    change(tree)
    (run_dir / "profile.json").write_bytes(msgspec.json.encode(tree))
    (run_dir / "graph.json").write_bytes((runs_dir / "earlier" / "graph.json").read_bytes())
    return run_dir


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(machine="another, 96 cores"),
        lambda tree: tree.update(format=0),
        lambda tree: tree["nodes"].pop("critic"),
    ],
    ids=["machine", "format", "node"],
)
def test_a_profile_that_does_not_fit_is_passed_over(
    change: Callable[[Tree], object], runs_dir: Path, tmp_path: Path
) -> None:
    changed(runs_dir, tmp_path, change)
    assert fitting_profile(ppo().graph, tmp_path) is None


def test_of_several_runs_that_fit_the_newest_counts(runs_dir: Path, tmp_path: Path) -> None:
    other = changed(runs_dir, tmp_path, lambda tree: tree.update(message_s=0.5))
    (tmp_path / "earlier").symlink_to(runs_dir / "earlier")
    for age_s, newest in ((10.0, runs_dir / "earlier"), (-10.0, other)):
        at_s = (runs_dir / "earlier" / "profile.json").stat().st_mtime - age_s
        os.utime(other / "profile.json", (at_s, at_s))
        found = fitting_profile(ppo().graph, tmp_path)
        assert found is not None
        assert found[1] == load_profile(newest)


def test_what_goes_wrong_costs_the_forecast_and_not_the_run(runs_dir: Path, tmp_path: Path) -> None:
    changed(runs_dir, tmp_path, lambda tree: tree["nodes"]["generator"].pop("decode"))
    (line,) = forecast(ppo(), tmp_path)
    assert line.startswith("no prediction: ConfigError: profile: node 'generator' has no `decode`")


def test_nothing_is_said_where_there_is_no_run_or_nothing_to_simulate(runs_dir: Path, tmp_path: Path) -> None:
    assert forecast(ppo(), tmp_path / "nowhere") == []
    assert forecast(load_program(ROOT / "graphs" / "sft.py", overrides=["data.source=x.jsonl"]), runs_dir) == []


def test_a_node_with_more_threads_is_forecast_from_the_same_profile(runs_dir: Path) -> None:
    one, two = (figures(forecast(ppo(f"generator.threads={n}", "max_staleness=4"), runs_dir))[1] for n in (1, 2))
    assert two > 1.2 * one


class Endless(Generator):
    """A user's own stage, which must not be run to find out how it behaves."""

    async def run(self, context: Context) -> None:
        raise AssertionError("user code was run on made-up data")


def test_a_graph_with_a_stage_that_does_not_say_how_it_is_simulated_is_not_and_that_is_said(runs_dir: Path) -> None:
    program = ppo()
    generator: Any = program.graph.nodes["generator"]
    own = Endless(**generator.arguments)
    nodes = {**program.graph.nodes, "generator": own}
    edges = [
        edge_with(edge, own if program.graph.node_of(edge.source) == "generator" else None,
                  own if program.graph.node_of(edge.target) == "generator" else None)
        for edge in program.graph.edges
    ]  # fmt: skip
    graph = Graph(nodes=nodes, edges=edges, until=program.graph.until)
    said = "the graph has stages that do not say how they are simulated: generator (Endless)"
    assert forecast(msgspec.structs.replace(program, graph=graph), runs_dir) == [f"no prediction: {said}"]
    with pytest.raises(ConfigError, match="has stages that do not say how they are simulated") as error:
        simulate(graph, COSTS)
    assert "\n" not in str(error.value)


def edge_with(edge: Edge, source: Any, target: Any) -> Edge:
    other = copy.copy(edge)
    for name, stage in (("source", source), ("target", target)):
        if stage is not None:
            object.__setattr__(other, name, getattr(stage, getattr(edge, name).name))
    return other


def test_a_forecast_that_takes_too_long_is_given_up_in_one_line(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advisor, "FORECAST_S", 0.0)
    (line,) = forecast(ppo(), runs_dir)
    assert re.fullmatch(r"no prediction: RunError: simulation: 0 s were not enough .*", line)
