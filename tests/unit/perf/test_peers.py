"""What both sides of `flowrl bench peers` are given, the floor under them, and the table of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
import yaml

from flowrl.graph.program import load_program
from perf.peers import GRAPHS, Side, settings, table
from perf.peers_data import METHODS, Method, contains_answer, write_data
from perf.peers_floor import Sizes, floor_s
from perf.peers_order import PeerStep, PeerWork
from perf.runs import ROOT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("method", METHODS)
def test_each_method_s_settings_make_its_graph(method: Method, tmp_path: Path):
    work = PeerWork(method=method, model="m", data="rows.jsonl", beta=0.3, cores=2, steps=3, warmup=2)
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(settings(work)))
    made = load_program(ROOT / "graphs" / f"{GRAPHS[method]}.py", config=config).settings
    assert made.learner.threads == (1 if method == "grpo" else 2)
    assert made.steps == (6 if method == "grpo" else 5)
    found = {"grpo": lambda: made.algorithm.options["kl"]["coef"], "dpo": lambda: made.objective.options["beta"]}
    assert method == "sft" or found[method]() == 0.3


@pytest.mark.slow
def test_rows_take_turns_through_the_tasks_and_have_what_the_method_learns(tiny: Path, tmp_path: Path):
    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        write_data(path, "dpo", model=tiny, num_rows=24, seed=3, is_varied=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    rows = [msgspec.json.decode(line) for line in paths[0].read_bytes().splitlines()]
    assert len({row["prompt"] for row in rows}) == 24
    assert all(row["chosen"] != row["rejected"] and row["chosen"].startswith(" ") for row in rows)
    halves = [sum(len(row["prompt"]) for row in part) for part in (rows[::2], rows[1::2], rows[:12], rows[12:])]
    assert max(halves) < 1.6 * min(halves)  # in the order they are made, the first half is the short sums


def test_the_reward_is_1_where_the_answer_stands_in_the_completion():
    assert contains_answer([" 12.", " 13"], ["12", "12"], prompts=["a", "b"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("method", "tokens", "each"), [("sft", 8 * 15, 6), ("dpo", 8 * 15, 8), ("grpo", 2 * 10 + 40, 10)]
)
def test_the_floor_counts_prompts_once_and_each_token_s_operations(tiny: Path, method: Method, tokens: int, each: int):
    work = PeerWork(method=method, model=str(tiny), data="", groups=2, group_size=4, examples=8)
    step = PeerStep(wall_s=1.0, sequences=8, sampled_tokens=40)
    num_parameters = 320 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    found = floor_s(work, step, Sizes(prompt=10.0, responses=5.0), rate=1e6)
    assert found == pytest.approx(each * tokens * num_parameters / 1e6)


def test_the_table_has_both_sides_their_waste_and_the_ratio(tiny: Path):
    work = PeerWork(method="sft", model=str(tiny), data="")
    slow = PeerStep(wall_s=4.0, sequences=8, tokens=60, fed_tokens=80)
    quick = PeerStep(wall_s=1.0, sequences=8)
    sides = [
        Side(name="TRL", work=work, steps=(slow,), floor_s=0.5, settings={"way": "autocast"}),
        Side(name="flowrl", work=work, steps=(quick,), floor_s=0.5, settings={}),
    ]
    text = table(sides, "sft")
    assert "| TRL | 4.00 (4.00 to 4.00), 1 steps | 2.00 | 25% of what is fed | 0.50 | 12% |" in text
    assert "flowrl over TRL: **4.00**" in text
