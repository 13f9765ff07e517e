"""Runs on data and rewards of every common shape, through the console script; what was scored is what the shape says.

All rewards say the same of a sample: its length in characters, and 1000 for each of the row's answer, which is 7.
"""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.contracts.test_reward_models import tiny_reward_model
from tests.graphs.test_first_minutes import GROUP, flowrl, settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.long]

ASKED = [f"What is {k} + 1?" for k in range(12)]
REWARDS = """
async def trl(prompts, completions, answer, **columns):
    return [len(c) + 1000.0 * int(a) if len(c) % 2 else None for c, a in zip(completions, answer)]

def one(completion, answer, prompt, **columns):
    assert prompt[-1]["role"] == "user"
    return len(completion) + 1000.0 * answer

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert (data_source, extra_info["split"]) == ("sums", "train")
    return {"score": len(solution_str) + 1000.0 * int(ground_truth), "acc": True}

def reward_func(queries, prompts, labels):
    import torch
    return torch.tensor([len(q) - len(p) + 1000.0 * int(l) for q, p, l in zip(queries, prompts, labels)])

def check(completions, **columns):
    return [float(len(c)) for c in completions]
"""


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def parquet(here: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    truth = {"style": "rule", "ground_truth": "7"}
    rows = [
        {"question": asked, "data_source": "sums", "reward_model": truth, "extra_info": {"split": "train"}}
        for asked in ASKED
    ]
    pq.write_table(pa.Table.from_pylist(rows), here / "d.parquet")


def several(here: Path) -> None:
    from datasets import Dataset

    Dataset.from_list([{"problem": asked} for asked in ASKED]).save_to_disk(here / "saved")
    (here / "d.tsv").write_text("instruction\tinput\n" + "".join(f"Add\t{asked}\n" for asked in ASKED))


SHAPES: dict[str, tuple[Callable[[Path], Any], dict[str, str]]] = {
    "prompt and answer, TRL's lists": (
        lambda here: (here / "d.jsonl.gz").write_bytes(
            gzip.compress(lines([{"prompt": asked, "answer": "7"} for asked in ASKED]).encode())
        ),
        {"data.source": "d.jsonl.gz", "reward.function": "my_rewards:trl"},
    ),
    "messages, one sample": (
        lambda here: (here / "d.jsonl").write_text(lines([{"messages": user(a), "answer": 7} for a in ASKED])),
        {"data.source": "d.jsonl", "reward.function": "my_rewards.py:one"},
    ),
    "Parquet, verl's": (parquet, {"data.source": "d.parquet", "reward.function": "my_rewards.py:compute_score"}),
    "context_messages, OpenRLHF's": (
        lambda here: (here / "d.json").write_text(
            json.dumps([{"context_messages": user(asked), "label": 7} for asked in ASKED])
        ),
        {"data.source": "d.json", "reward.function": "my_rewards:reward_func", "reward.label_column": "label"},
    ),
    "several sources, a reward model": (
        several,
        {
            "data.source": "reasoning-gym", "data.mix": '[{"source": "saved", "weight": 2}, {"source": "d.tsv"}]',
            "reward.function": "",
            "reward_models": '["judge"]', "reward_model.clip": "1e9", "evaluation.function": "my_rewards:check",
        },
    ),
}  # fmt: skip


def rollouts_of(here: Path) -> list[dict[str, Any]]:
    code, said = flowrl(here, "inspect", "runs/own", "--json", "--limit", "99", "--columns", "response,reward,prompt")
    assert code == 0, said
    return [json.loads(line) for line in said]


def run(here: Path, tiny: Path, given: dict[str, str], graph: Path = GROUP) -> None:
    (here / "my_rewards.py").write_text(REWARDS)
    small = {"runtime": "local", "hints": "false", "steps": 1, "learner.engine": "flowrl.engines.torch:TorchEngine"}
    code, said = flowrl(here, "run", graph, *settings(tiny, graph, **{**small, **given}), "--name", "own")
    assert code == 0, said
    assert any("held-out score, 2 prompts" in line for line in said), said
    assert not (here / "runs" / "own" / "quarantine").exists()


@pytest.mark.parametrize("shape", SHAPES)
def test_data_and_a_reward_of_one_s_own_shape_are_scored_as_they_say(shape: str, tiny: Path, tmp_path: Path):
    write, given = SHAPES[shape]
    write(tmp_path)
    tiny_reward_model(tmp_path / "judge", seed=3)
    run(tmp_path, tiny, given)
    found = rollouts_of(tmp_path)
    assert len(found) == 8
    if "reward model" in shape:
        assert len({row["reward"] for row in found}) > 4
        return
    for row in found:
        length = len(row["response"].removesuffix("<|im_end|>"))
        assert row["reward"] == (0.0 if "TRL" in shape and length % 2 == 0 else length + 7000.0), row
