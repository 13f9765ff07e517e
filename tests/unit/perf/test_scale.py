"""The flow on many GPUs: messages counted against the graph's edges, and a hub that is full, or has proxies."""

from __future__ import annotations

import pytest

from flowrl.runtime.supervisor import report_interval_s
from perf.paper_rows import read_tables
from perf.scale import Hub, simulated
from perf.scale_report import Scaling, markdown, signs_per_s

GROUP = 8


@pytest.fixture(scope="module")
def base():
    return simulated(8, GROUP, Hub(0.0, 0.0))


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
def test_a_full_hub_holds_the_flow_at_its_own_rate_until_proxies_take_its_work(base) -> None:
    limit = base.calls_per_s * 0.8  # of 16 GPUs, which want twice as many as 8
    full = simulated(16, GROUP, Hub(1 / limit, 0.0))
    assert full.calls_per_s == pytest.approx(limit, rel=0.02)
    assert full.rollouts_per_s == pytest.approx(0.8 * base.rollouts_per_s, rel=0.03)
    halved = simulated(16, GROUP, Hub(1 / limit, 0.0, proxies=2))
    assert full.calls_per_s < 0.9 * halved.calls_per_s <= 0.9 * 2 * limit, "each proxy is full at that rate"
    behind = simulated(16, GROUP, Hub(1e-6, 1 / limit, proxies=2))
    assert behind.calls_per_s == pytest.approx(limit, rel=0.02), "the hub answers no more than it can"


def test_many_processes_show_less_often_that_they_live(base) -> None:
    assert signs_per_s(100) == pytest.approx(200)
    assert signs_per_s(1000) == pytest.approx(250)
    assert signs_per_s(10_000) == pytest.approx(10_000 / 15), "four times within the minute after which one is dead"
    assert report_interval_s(1, 1.0) == 0.25, "likewise where it is a second"
    report = Scaling(size="7B", call_us=30.0, bundled_us=15.0, bases=(base,), points=(base,), machine="m", took_s=1.0)
    assert f"{8e6 / 30 / base.calls_per_s:,.0f} GPUs on average, and keeps up at every size" in markdown(report)
