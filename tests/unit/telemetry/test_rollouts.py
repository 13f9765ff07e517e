"""Rollouts on disk: what went in comes out, and nothing half-written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from flowrl.messages import Buffer, Sample, Samples, VersionSpan
from flowrl.telemetry.records import forget_steps, step_files, token_versions, write_rollouts

if TYPE_CHECKING:
    from pathlib import Path


def sample(tokens: list[int], spans: list[VersionSpan], *, finish: str = "stop") -> Sample:
    logprobs = Buffer.floats([-0.5 * token for token in tokens])
    return Sample(
        token_ids=Buffer.ints(tokens), logprobs=logprobs, versions=spans, finish=finish, text=f"said {tokens}"
    )


def group(group_id: int, prompt: Any, scores: dict[str, list[float]]) -> Samples:
    first = sample([5, 6, 7], [VersionSpan(3, 0, 2), VersionSpan(4, 2, 3)])
    second = sample([8], [VersionSpan(4, 0, 1)], finish="length")
    return Samples(
        group_id=group_id,
        token_ids=Buffer.ints([1, 2]),
        columns={} if prompt is None else {"prompt": prompt},
        num_samples=2,
        seed=0,
        samples=[first, second],
        generator="generator.1",
        scores=scores,
        ref_logprobs=[Buffer.floats([0.0] * 3), Buffer.floats([0.0])],
        advantages=[Buffer.floats([1.0, 2.0, 3.0]), Buffer.floats([-2.0])],
    )


def read(path: Path) -> Any:
    return pq.ParquetFile(path).read()


def test_a_step_s_samples_read_back_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step-000005.parquet"
    rows = [
        group(7, "What is 2 + 2?", {"exact": [1.0, 0.0], "length": [-0.25, 0.5]}),
        group(8, None, {"exact": [0.0, 1.0]}),
    ]
    ours = {(7, 0): np.array([-2.0, -3.0, -3.25], dtype=np.float32)}
    write_rollouts(path, rows, 5, ours)
    table = read(path).to_pylist()
    assert [row.pop("message") is not None for row in table] == [True, False] * 2, "once a group"
    assert [(row["group_id"], row["sample"]) for row in table] == [(7, 0), (7, 1), (8, 0), (8, 1)]
    assert table[0] == {
        "group_id": 7,
        "sample": 0,
        "prompt": "What is 2 + 2?",
        "response": "said [5, 6, 7]",
        "prompt_token_ids": [1, 2],
        "token_ids": [5, 6, 7],
        "logprobs": [-2.5, -3.0, -3.5],
        "learner_logprobs": [-2.0, -3.0, -3.25],
        "token_versions": [3, 3, 4],
        "score.exact": 1.0,
        "score.length": -0.25,
        "reward": 0.75,
        "advantage_mean": 2.0,
        "staleness": 2,
        "learned_in_step": 5,
        "finish": "stop",
        "generator": "generator.1",
    }
    assert (table[1]["staleness"], table[1]["finish"], table[1]["advantage_mean"]) == (1, "length", -2.0)
    assert [row["learner_logprobs"] for row in table[1:]] == [None] * 3
    assert (table[3]["prompt"], table[3]["score.length"], table[3]["reward"]) == (None, None, 1.0)


def test_a_conversation_is_kept_as_json(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "step.parquet", [group(0, [{"role": "user", "content": "hé"}], {"exact": [1.0, 0.0]})], 4)
    assert read(tmp_path / "step.parquet")["prompt"][0].as_py() == '[{"role": "user", "content": "hé"}]'


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "step.parquet"
    good = group(0, "p", {"exact": [1.0, 0.0]})
    write_rollouts(path, [good], 4)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="zip"):
        write_rollouts(path, [group(0, "p", {"exact": [1.0, 0.0], "short": [1.0]})], 4)
    assert path.read_bytes() == before


def test_copies_beside_a_step_s_file_are_of_no_step_and_stay(tmp_path: Path) -> None:
    for name in ("step-000010.parquet", "step-000010 (1).parquet", "step-000010.parquet.bak", "step-copy.parquet"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "step-000003.parquet").write_bytes(b"x")
    (tmp_path / "step-000004.parquet").mkdir()
    assert [*step_files(tmp_path)] == [3, 10]
    forget_steps(tmp_path, 4)
    assert [*step_files(tmp_path)] == [3]
    assert (tmp_path / "step-000010 (1).parquet").exists()


def test_each_token_has_its_version() -> None:
    assert token_versions(sample([1, 2, 3], [VersionSpan(0, 0, 2), VersionSpan(1, 2, 3)])) == [0, 0, 1]
