"""The paper's rows, simulated: serial totals as published, and asynchronous runs held against arithmetic."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, get_args

import msgspec
import pytest

from flowrl.tuning.trials import Searcher, TuneRequest
from perf.paper import GRAPH, KNOBS, compare, step_s, write_settings
from perf.paper_report import Found, Placed, Report, markdown
from perf.paper_rows import Row, System, profile, read_tables, settings

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.tuning.knobs import Setting

TABLES = read_tables()
ROWS = {row.size: row for row in TABLES.rows}
SYSTEMS = get_args(System)


@functools.cache
def found(size: str) -> Found:
    return compare(TABLES, ROWS[size], num_settings=0)


@pytest.mark.parametrize("size", ROWS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_paper_s_stages_add_up_to_its_totals(size: str, system: System) -> None:
    stages = getattr(ROWS[size], system)
    assert stages.generation + stages.sync + stages.logits_reward + stages.training == pytest.approx(stages.total)


@pytest.mark.slow  # three simulations of each size
@pytest.mark.parametrize("size", ROWS)
def test_serial_simulations_reproduce_the_paper_within_two_percent(size: str) -> None:
    for error in found(size).errors:
        assert abs(error) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("size", ROWS)
def test_asynchronous_on_the_same_gpus_is_within_five_percent_of_the_bound(size: str) -> None:
    # by hand, for 7B: max(262.96, 32.7, 171.13) + 4.32 = 267.28
    stages = ROWS[size].openrlhf
    bound_s = max(stages.generation, stages.logits_reward, stages.training) + stages.sync
    assert -1e-3 < found(size).same.step_s / bound_s - 1 < 0.05
    assert found(size).same.gpus == {
        "generator": ROWS[size].openrlhf_gpus.vllm.dp * ROWS[size].openrlhf_gpus.vllm.tp,
        "learner": ROWS[size].openrlhf_gpus.actor,
        "critic": ROWS[size].openrlhf_gpus.critic,
        "reference": ROWS[size].openrlhf_gpus.ref,
        "reward_model": ROWS[size].openrlhf_gpus.rm,
    }


@pytest.mark.slow
def test_a_stage_that_takes_longer_shows_in_the_serial_step() -> None:
    row = ROWS["7B"]
    longer = msgspec.structs.replace(row.openrlhf, training=row.openrlhf.training + 50)
    slow = msgspec.structs.replace(row, openrlhf=longer)
    serial = functools.partial(step_s, TABLES, system="openrlhf", max_staleness=0)
    assert serial(slow) - serial(row) == pytest.approx(50)


@pytest.mark.slow
def test_the_search_turns_only_the_gpus_of_each_role(tmp_path: Path) -> None:
    row = ROWS["7B"]
    costs = tmp_path / "profile.json"
    costs.write_bytes(msgspec.json.encode(profile(TABLES, row, "openrlhf")))
    config = write_settings(tmp_path, settings(TABLES, row, "openrlhf", max_staleness=1))
    searcher = Searcher(TuneRequest(graph=GRAPH, profile=costs, config=config, gpus=row.gpus, only=KNOBS))
    assert {knob.name for knob in searcher.knobs()} == {
        "generator.replicas", "reward_model.replicas", "reference.replicas", "critic.ranks", "learner.ranks",
    }  # fmt: skip
    better: Setting = {"reward_model.replicas": 1, "reference.replicas": 1, "generator.replicas": 6}
    whole = searcher.measure({})
    assert searcher.measure(better).samples_per_s > 1.25 * whole.samples_per_s  # 2 GPUs from scoring to generation
    assert searcher.look({**better, "generator.replicas": 8}) is None  # 18 GPUs


@pytest.mark.parametrize("size", ROWS)
def test_a_row_s_placement_takes_all_its_gpus_and_none_twice(size: str) -> None:
    row = ROWS[size]
    tree = settings(TABLES, row, "openrlhf", max_staleness=1)
    parts = [tree[node] for node in ("generator", "reward_model", "reference", "critic", "learner")]
    assert sum(part["gpus"] * part.get("replicas", 1) * part.get("ranks", 1) for part in parts) == row.gpus


def test_the_report_has_the_paper_s_figures_the_doubt_and_ours_as_simulated() -> None:
    row: Row = ROWS["7B"]
    same, best = Placed(step_s=267.28, gpus={"generator": 4}), Placed(step_s=200.0, gpus={"generator": 6})
    seen = Found(row=row, dschat_s=855.09, openrlhf_s=480.5322, same=same, best=best)
    text = markdown(Report(source="s", notes=(), sizes=(seen,)))
    assert "| 7B | 16 | 855.1 | 471.1 | 1.82 | 267.3 | 1.76 | 3.20 | 200.0 | 2.36 | 4.28 |" in text
    assert "| 7B | 855.1 | 855.1 | +0.00% | 471.1 | 480.5 | +2.00% |" in text
    assert "disputed" in text
    assert "issue 327" in text
    assert "flowrl 2.01" in text  # 538 / 267.28
    assert "Simulated, not measured" in text
    report = Report(source="s", notes=(), sizes=(seen,))
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
