"""Estimates: what is said of a run's time before there is any run like it."""

from __future__ import annotations

import re
import time

import pytest

from flowrl.graph.program import load_program
from flowrl.tuning import duration as module
from flowrl.tuning.duration import rough_duration
from tests.support.command import ROOT

# On two cores: the default run and the recipes as docs/learning.md has them, agent_async as a user saw it (over three
# minutes a step).
MEASURED = {"ppo_async": (6, 20), "agent_async": (40, 120), "sft": (5, 40), "preference": (5, 60)}


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "num_cores", lambda: 2)


def minutes(graph: str, *overrides: str) -> float:
    line = rough_duration(load_program(ROOT / "graphs" / f"{graph}.py", overrides=[*overrides]))
    found = re.match(r"about (?:(\d+) minutes?|(\d+)h(\d+)m), give or take", line)
    assert found, line
    return float(found[1] or 60 * int(found[2]) + int(found[3]))


@pytest.mark.slow
@pytest.mark.parametrize("graph", MEASURED)
def test_a_graph_as_it_is_says_about_how_long_it_takes(graph: str) -> None:
    least, most = MEASURED[graph]
    assert least <= minutes(graph) <= most


@pytest.mark.slow
def test_the_estimate_grows_with_what_is_to_be_done_and_costs_a_moment() -> None:
    one = minutes("group_async")
    assert minutes("group_async", "steps=200") == pytest.approx(10 * one, rel=0.1)
    assert minutes("group_async", "sampling.max_tokens=256") > 5 * one
    assert minutes("group_async", "max_staleness=0") > one
    assert minutes("group_async", "learner.epochs=2") > 1.3 * one
    program = load_program(ROOT / "graphs" / "agent_async.py")
    start_s = time.perf_counter()
    rough_duration(program)
    assert time.perf_counter() - start_s < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["generate", "critique"])
def test_batch_inference_takes_the_time_of_its_prompts(graph: str) -> None:
    one = minutes(graph, "data.num_train=4000", "sampling.max_tokens=100")
    assert minutes(graph, "data.num_train=4000", "sampling.max_tokens=100", "epochs=10") == pytest.approx(
        10 * one, rel=0.1
    )
    assert minutes(graph, "data.num_train=400", "sampling.max_tokens=100") == pytest.approx(one / 10, rel=0.3)


@pytest.mark.slow
def test_a_judge_takes_the_time_of_what_it_reads() -> None:
    """Each of 6 pairs of a group of 4 is read in both orders, and each answer is once."""
    judged = ["steps=40", "generator.group_size=4", "model_judge.model=SmolLM2-135M-Instruct"]
    alone, points = minutes("group_async", *judged[:2]), minutes("group_async", *judged)
    pairs = minutes("group_async", *judged, "model_judge.rubric.way=pairs")
    assert alone < points
    assert 2.0 < pairs / points < 4.0
    assert minutes("group_async", *judged, "model_judge.verdict=written") > 2 * points


@pytest.mark.parametrize(
    ("graph", "override", "why"),
    [
        ("group_async", "learner.gpus=1", "first run: learner has GPUs"),
        ("generate", "generator.gpus=1", "first run: generator has GPUs"),
        ("group_async", "learner.engine=tests.support.offline:TokenEngine", "learner has tests.support.offline:"),
        ("group_async", "model=/nowhere", "ModelError: model /nowhere: no such directory"),
    ],
)
def test_what_cannot_be_estimated_is_said_to_be_so(graph: str, override: str, why: str) -> None:
    line = rough_duration(load_program(ROOT / "graphs" / f"{graph}.py", overrides=[override]))
    assert line.startswith("how long it will take cannot be said before a first run")
    assert why in line


@pytest.mark.slow
def test_what_the_critic_learns_as_often_as_the_policy_is_counted() -> None:
    one = minutes("ppo_async")
    assert minutes("ppo_async", "learner.epochs=2") > 1.5 * one  # the critic's, too
    assert minutes("ppo_async", "critic.epochs=4") > 1.5 * one
    single = [f"{node}.threads=1" for node in ("generator", "reference", "critic", "learner")]
    assert minutes("ppo_async", *single) == pytest.approx(one, rel=0.2)  # the cores have the same work
