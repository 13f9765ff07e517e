"""The flow on many GPUs: messages counted against the graph's edges, and a queue host that is full."""

from __future__ import annotations

import pytest

from flowrl.runtime.supervisor import report_interval_s
from perf.paper_rows import read_tables
from perf.scale import calls_per_s, simulated
from perf.scale_report import Scaling, full_at, markdown, signs_per_s

GROUP = 8


@pytest.fixture(scope="module")
def base():
    return simulated(8, GROUP, 0.0)


def test_a_host_s_calls_from_what_the_channels_benchmark_prints() -> None:
    # groups of 8 at 1 ms a rollout are 125 groups/s, each of 1 + 3 + 2 + 3/16 calls
    assert calls_per_s(1.0) == pytest.approx(773.4, abs=0.1)
    assert calls_per_s(0.5) == pytest.approx(2 * calls_per_s(1.0))


def test_without_a_limit_eight_gpus_run_at_half_the_paper_s_sixteen(base) -> None:
    row = read_tables().rows[0]
    assert base.rollouts_per_s == pytest.approx(512 / row.openrlhf.bound_s, rel=0.01)
    assert (base.generators, base.processes) == (2, 9)


def test_a_group_costs_as_many_calls_as_its_way_through_the_graph_has_ends(base) -> None:
    # a credit, five queues with two ends each; a batch: done, credits returned, the version published, and by each of
    # two generators read and confirmed: 7 calls in 267 s
    groups_per_s = base.rollouts_per_s / GROUP
    per_batch = 7 / 267.28
    assert base.calls_per_s == pytest.approx(11 * groups_per_s + per_batch, rel=0.01)


@pytest.mark.slow
def test_a_full_host_holds_the_flow_at_its_own_rate(base) -> None:
    limit = base.calls_per_s * 0.8  # of 16 GPUs, which want twice as many as 8
    full = simulated(16, GROUP, 1 / limit)
    assert full.calls_per_s == pytest.approx(limit, rel=0.02)
    assert full.rollouts_per_s == pytest.approx(0.8 * base.rollouts_per_s, rel=0.03)


def test_one_host_is_full_where_calls_and_signs_of_life_reach_its_rate(base) -> None:
    limit = 4 * base.calls_per_s  # of 32 GPUs
    by_calls, by_signs, by_both = full_at(limit, base)
    # nine processes on eight GPUs, the prompts' own among them, show twice a second that they live
    assert (by_calls, by_signs) == pytest.approx((32.0, limit / 2 - 1), rel=2e-3)
    assert by_both == pytest.approx((limit - 2) / (base.calls_per_s / 8 + 2), rel=2e-3)


def test_many_processes_show_less_often_that_they_live(base) -> None:
    assert signs_per_s(100) == pytest.approx(200)
    assert signs_per_s(1000) == pytest.approx(250)
    assert signs_per_s(10_000) == pytest.approx(10_000 / 15), "four times within the minute after which one is dead"
    assert report_interval_s(1, 1.0) == 0.25, "likewise where it is a second"
    report = Scaling(
        size="7B", limit_per_s=773.4, ms_per_rollout=1.0, bases=(base,), points=(base,), machine="m", took_s=1.0
    )
    by_calls, by_signs, _ = full_at(report.limit_per_s, base)
    assert by_calls < by_signs == pytest.approx(15 * 773.4, rel=2e-3)
    assert "What breaks first: the flow's calls." in markdown(report)
    assert "nothing shards it" in markdown(report)
