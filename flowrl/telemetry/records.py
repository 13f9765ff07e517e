"""What a run keeps of its groups and versions: learned samples, groups set aside, digests of published weights.

`step-000012.parquet` has the learned samples of a step, one row a sample. Read it with `pyarrow.parquet`, pandas or
DuckDB; nothing in it is pickled. It appears whole under its name or not at all. The learner writes it after each step.

`versions.jsonl` has a line for each policy version, with the digests of its tensors. Two runs that agree in them have
published the same weights, bit for bit; where they do not, the first tensor that differs is known by name. A version
that was published again after a rollback has a line for each time; the last one counts.

`quarantine/` has a readable JSON file, whole or not there, for each group that could not be scored or that kept killing
its stage. Written by the reward stages and by the supervisor.

Tests: tests/unit/telemetry/test_rollouts.py
Tests: tests/unit/telemetry/test_quarantine.py
"""

from __future__ import annotations

import contextlib
import errno
import json
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.messages import Buffer, Samples, decode, encode
from flowrl.telemetry.files import (
    UNREADABLE,
    RecordFile,
    new_file,
    read_file,
    replace_file,
    run_id,
    set_aside,
    steps_in,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from flowrl.messages import FloatArray, Sample, Scored

    Ours = Mapping[tuple[int, int], FloatArray]  # (group id, sample) -> the learner's log-probs
    from flowrl.messages import Message


RUN = b"flowrl.run"  # in a file's metadata: which run it is of


def write_rollouts(path: Path, rows: Sequence[Scored], version: int, ours: Ours | None = None) -> None:
    """Write the groups that the policy at `version` learned from, replacing a file of an earlier attempt.

    A row a sample. Columns that do not say it themselves:
    - sample: its place in the group; prompt: text, or messages as JSON, null where the data has none;
    - logprobs: the behaviour's; learner_logprobs: as they were learned, null from other ranks than the first;
    - token_versions: one for each token, -1 on an environment's;
    - score.<name>: every score; column.<name>: of a user's stage, a list for each token, or a number;
    - reward: the scores' sum; advantage_mean: of the policy's tokens;
    - message: on a group's first row all that the learner got of it, in the wire form of messages.py.
    """
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    table = rollout_table(rows, version, ours or {}).replace_schema_metadata({RUN: run_id(path.parent.parent)})
    with new_file(path) as aside:
        pq.write_table(table, aside, compression="zstd")


def rollout_table(rows: Sequence[Scored], version: int, ours: Ours) -> Any:
    """Return the samples of the groups as a `pyarrow.Table`."""
    import pyarrow as pa

    scores = list(dict.fromkeys(name for group in rows for name in group.scores))
    columns: dict[str, Any] = {}
    for sample in (sample for group in rows for sample in group.samples):
        for name, value in sample.columns.items():
            columns[name] = pa.list_(pa.float32()) if isinstance(value, Buffer) else columns.get(name, pa.float64())
    schema = pa.schema(
        [
            ("group_id", pa.int64()),
            ("sample", pa.int32()),
            ("prompt", pa.string()),
            ("response", pa.string()),
            ("prompt_token_ids", pa.list_(pa.int32())),
            ("token_ids", pa.list_(pa.int32())),
            ("logprobs", pa.list_(pa.float32())),
            ("learner_logprobs", pa.list_(pa.float32())),
            ("token_versions", pa.list_(pa.int32())),
            *((f"score.{name}", pa.float64()) for name in scores),
            *((f"column.{name}", kind) for name, kind in columns.items()),
            ("reward", pa.float64()),
            ("advantage_mean", pa.float64()),
            ("staleness", pa.int32()),
            ("learned_in_step", pa.int32()),
            ("finish", pa.string()),
            ("generator", pa.string()),
            ("message", pa.binary()),
        ]
    )
    samples = [
        _row(group, place, reward, version, scores, columns, ours)
        for group in rows
        for place, reward in enumerate(group.rewards)
    ]
    return pa.Table.from_pylist(samples, schema=schema)


def _row(
    group: Scored, place: int, reward: float, version: int, scores: Sequence[str], columns: Iterable[str], ours: Ours
) -> dict[str, Any]:
    sample, learned = group.samples[place], ours.get((group.group_id, place))
    return {
        "group_id": group.group_id,
        "sample": place,
        "prompt": _prompt_text(group.columns.get("prompt")),
        "response": sample.text,
        "prompt_token_ids": group.token_ids.tolist(),
        "token_ids": sample.token_ids.tolist(),
        "logprobs": sample.logprobs.tolist(),
        "learner_logprobs": None if learned is None else learned.tolist(),
        "token_versions": token_versions(sample),
        **{f"score.{name}": group.scores[name][place] if name in group.scores else None for name in scores},
        **{f"column.{name}": _plain(sample.columns.get(name)) for name in columns},
        "reward": reward,
        "advantage_mean": _advantage_mean(group, place),
        "staleness": version - sample.oldest_version,
        "learned_in_step": version,
        "finish": sample.finish,
        "generator": group.generator,
        "message": encode(group) if place == 0 else None,
    }


def _plain(value: Buffer | float | None) -> Any:
    return value.tolist() if isinstance(value, Buffer) else value


def _advantage_mean(group: Scored, place: int) -> float | None:
    if not isinstance(group, Samples):
        return None
    advantages, mask = group.advantages[place].numpy(), group.samples[place].mask
    if mask is not None:
        advantages = advantages[mask.numpy() > 0]
    return float(advantages.mean()) if len(advantages) else None


def token_versions(sample: Sample) -> list[int]:
    """Return the policy version of each token, -1 for an environment's.

    Spans (0, 0, 2) and (1, 3, 4) of four tokens give [0, 0, -1, 1].
    """
    versions = [-1] * len(sample.token_ids)
    for span in sample.versions:
        versions[span.start : span.end] = [span.version] * (span.end - span.start)
    return versions


def _prompt_text(prompt: Any) -> str | None:
    return prompt if prompt is None or isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def read_samples(path: Path) -> list[Samples]:
    """Return the groups of a step's file as the learner got them, in the order in which it learned them."""
    import pyarrow.parquet as pq

    wires = pq.read_table(path, columns=["message"]).column("message").drop_null().to_pylist()
    return [cast("Samples", decode(wire)) for wire in wires]


def forget_steps(directory: Path, first: int) -> None:
    """Set the files of step `first` and later ones aside: a history that was given up."""
    set_aside([path for step, path in step_files(directory).items() if step >= first])


def step_path(directory: Path, step: int) -> Path:
    """Return the file of a step."""
    return directory / f"step-{step:06d}.parquet"


def step_files(directory: Path) -> dict[int, Path]:
    """Return the files of steps, by step and in its order: step-000012.parquet is of step 12, a copy of it of none."""
    return {step: path for step, path in steps_in(directory, ".parquet") if path.is_file()}


def read_groups(path: Path) -> tuple[str, set[int]]:
    """Return which run a step's file is of, "" where it does not say, and the ids of the groups in it."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["group_id"])
    run = (table.schema.metadata or {}).get(RUN, b"").decode(errors="replace")
    return run, set(table.column("group_id").to_pylist())


SHOWN_DIGITS = 16  # of a digest: 64 bits tell any two versions of a run apart


class VersionLine(msgspec.Struct, frozen=True):
    """One published version."""

    version: int
    tensors: dict[str, str]  # name -> first digits of the blake3 digest of its bytes


def write_digests(run_dir: Path, version: int, digests: dict[str, str]) -> None:
    """Append a version; an engine that has no tensors writes nothing.

    Raises:
        OSError: the disk is full; nothing was written.
    """
    if not digests:
        return
    line = VersionLine(version, {name: digest[:SHOWN_DIGITS] for name, digest in digests.items()})
    with contextlib.closing(RecordFile(run_dir / "versions.jsonl")) as file:
        file.append(msgspec.json.encode(line) + b"\n")
        if file.is_waiting:
            raise OSError(errno.ENOSPC, file.trouble)  # whoever writes waits and writes the line again


def read_digests(run_dir: Path) -> dict[int, dict[str, str]]:
    """Return version -> tensor -> digest; a line cut short by a kill is passed over."""
    path = run_dir / "versions.jsonl"
    found: dict[int, dict[str, str]] = {}
    for line in (read_file(path) or b"").splitlines():
        try:
            each = msgspec.json.decode(line, type=VersionLine)
        except UNREADABLE:
            continue
        found[each.version] = each.tensors
    return found


def quarantine(run_dir: Path, group_id: int, group: Message, *, where: str, error: Exception) -> Path:
    """Write down a group, the replica that could not take it and the last error; returns the file."""
    directory = run_dir / "quarantine"
    directory.mkdir(parents=True, exist_ok=True)
    record = {"group_id": group_id, "where": where, "error": str(error), "input": _as_data(group)}
    path = directory / f"group-{group_id}.json"
    replace_file(path, msgspec.json.format(msgspec.json.encode(record)))
    return path


def _as_data(value: Any) -> Any:
    """Return a message as dictionaries and lists, with its buffers as numbers."""
    match value:
        case Buffer():
            return value.tolist()
        case msgspec.Struct():
            return {name: _as_data(getattr(value, name)) for name in value.__struct_fields__}
        case list():
            return [_as_data(each) for each in value]
        case dict():
            return {name: _as_data(each) for name, each in value.items()}
        case _:
            return value
