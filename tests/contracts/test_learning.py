"""The flow learns: a student its teacher, counters in the staleness benchmark; torch samples and real gradients."""

from __future__ import annotations

import json
from statistics import fmean
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import msgspec
import pytest

from flowrl.graph.graph import Graph, Queue
from flowrl.runtime.local import LocalOptions, run_local
from flowrl.simulation.clock import run_virtual
from flowrl.stages.reference import Reference
from flowrl.telemetry.events import Event, Step
from perf import staleness
from perf.staleness_chart import smoothed
from perf.staleness_task import CountingReward, Setting, counting_graph, spans_of, tiny_counter

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def distilling(student: Path, teacher: Path) -> Graph:
    """group_async's flow with a teacher in the reference's place; the reward is only shown."""
    algorithm = "flowrl.algorithms.on_policy_distillation:OnPolicyDistillation"
    setting = Setting(seed=0, staleness=1, method=algorithm, steps=70, groups_per_step=5, group_size=8, lr=3e-3,
                      minibatches=1, entropy=0.0)  # fmt: skip
    graph = counting_graph(setting, student)
    reward, advantage = graph.nodes["reward"], graph.nodes["advantage"]
    assert isinstance(reward, CountingReward)
    reference = Reference(
        Reference.Config(engine="flowrl.engines.torch:TorchEngine", dtype="float32"),
        graph.nodes["prompts"].arguments["sampler"],
        model=str(teacher),
    )
    edges = [edge for edge in graph.edges if edge.source is not reward.referenced]
    edges += [
        Queue(reward.referenced, reference.scored, depth=10),
        Queue(reference.referenced, advantage.ports["referenced"]),  # type: ignore[arg-type]
    ]
    return Graph(nodes={**graph.nodes, "reference": reference}, edges=edges, until=graph.until)


def test_a_student_learns_its_teacher_from_its_own_samples_though_they_are_a_version_old(tmp_path: Path) -> None:
    teacher = tiny_counter(tmp_path / "teacher", 1, share_shown=0.95)
    student = tiny_counter(tmp_path / "student", 0)  # it says any digit: to count it must learn to look
    CountingReward.seen.clear()
    events: list[Event] = []
    told = LocalOptions(run_dir=tmp_path / "run", is_virtual=True, consume=events.extend, status_interval_s=1e6)
    run_virtual(run_local(distilling(student, teacher), told))
    steps = [event for event in events if isinstance(event, Step)]
    kls = [step.metrics["kl"] for step in steps]
    assert fmean(kls[-5:]) < 0.3 * fmean(kls[:3])
    assert max(kls) < 2.0 * kls[0]
    rewards = [fmean(CountingReward.seen[version]) for version in sorted(CountingReward.seen)]
    assert fmean(rewards[-5:]) > fmean(rewards[:3]) + 0.3, "the teacher counts, and nobody paid for counting"
    assert {age for step in steps[1:] for age in step.staleness} == {1}


def test_the_staleness_benchmark_writes_its_figures_and_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--seeds", "2", "--staleness", "0", "2", "--methods", "truncated", "--steps", "6", "--groups", "5"]
    assert staleness.main([*options, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "staleness.json").read_bytes())
    runs = msgspec.convert(found["runs"], list[staleness.Ran])
    assert [(ran.setting.seed, ran.setting.staleness) for ran in runs] == [(0, 0), (0, 2), (1, 0), (1, 2)]
    assert [ran.mean_staleness for ran in runs] == [0.0, 2.0, 0.0, 2.0]
    assert all(len(ran.scores) == 6 for ran in runs)
    rows = msgspec.convert(found["summary"], list[staleness.Row])
    assert [(row.staleness, row.method, row.change is None) for row in rows] == [
        (0, "-", True),
        (2, "truncated", False),
    ]
    drawn = ElementTree.fromstring((tmp_path / "staleness.svg").read_text())
    assert len(drawn.findall(".//{http://www.w3.org/2000/svg}polyline")) == 2
    assert "against synchronous" in capsys.readouterr().out


def test_a_synchronous_run_of_one_seed_is_the_same_each_time(tmp_path: Path) -> None:
    setting = Setting(seed=3, staleness=0, method="behaviour", steps=3, groups_per_step=5, group_size=4, lr=3e-3,
                      minibatches=1, entropy=0.01)  # fmt: skip
    first, second = (staleness.run_once(setting, tmp_path / name) for name in ("a", "b"))
    assert first.scores == second.scores


def test_tokens_of_one_version_are_one_span() -> None:
    spans = spans_of([4, 4, 5, 5, 5])
    assert [(span.version, span.start, span.end) for span in spans] == [(4, 0, 2), (5, 2, 5)]


def test_a_long_curve_is_drawn_by_its_means() -> None:
    assert smoothed([1.0, 3.0, 5.0], points=2) == [(0.5, 2.0), (2.0, 5.0)]
