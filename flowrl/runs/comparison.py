"""Two runs of the same steps, held against each other by their files: the first step and thing that differ.

Within a step the order is that of cause: what the learner got, the figures of the step, the tensors of the version
that it made. Called by `flowrl retrain --diff`.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.messages import Buffer
from flowrl.telemetry.metrics import read_steps
from flowrl.telemetry.rollouts import read_samples, step_path
from flowrl.telemetry.versions import read_digests

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


class Difference(msgspec.Struct, frozen=True):
    """Where two runs part."""

    step: int
    what: str  # a sample's field, a figure or a tensor
    run: str
    again: str


def first_difference(run_dir: Path, again_dir: Path, steps: Iterable[int]) -> Difference | None:
    """Return where training again first differs from its run, or None where every step and version is equal."""
    figures = [read_steps(each / "metrics.jsonl") for each in (run_dir, again_dir)]
    digests = [read_digests(each) for each in (run_dir, again_dir)]
    for step in steps:
        pairs = zip_longest(*(read_samples(step_path(each / "rollouts", step)) for each in (run_dir, again_dir)))
        of_samples = (
            (f"group {ours.group_id} {what}", a, b) for ours, theirs in pairs for what, a, b in _fields(ours, theirs)
        )
        ours, theirs = (each.get(step + 1, {}) for each in figures)
        names = [name for name in ours if name in theirs and not name.endswith("_s")]  # times are never the same
        of_figures = ((name, ours[name], theirs[name]) for name in names)
        a, b = (each.get(step + 1, {}) for each in digests)
        of_tensors = ((f"tensor {name} of version {step + 1}", a.get(name), b.get(name)) for name in {**a, **b})
        for compared in (of_samples, of_figures, of_tensors):
            for what, was, is_now in compared:
                if was != is_now:
                    return Difference(step, what, str(was), str(is_now))
    return None


def _fields(run: Any, again: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield each number of two groups that is not of its own making, with its place."""
    for name in run.__struct_fields__:
        if name not in ("group_id", "generator"):  # which of two replicas sampled it is no matter
            yield from _leaves(name, getattr(run, name), getattr(again, name, None))


def _leaves(place: str, run: Any, again: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(run, Buffer) and isinstance(again, Buffer) and run != again:
        values = zip_longest(run.tolist(), again.tolist())
        yield from ((f"{place}[{token}]", *pair) for token, pair in enumerate(values))
    elif isinstance(run, list) and isinstance(again, list):
        lists = cast("list[Any]", run), cast("list[Any]", again)
        for index, pair in enumerate(zip_longest(*lists)):
            yield from _leaves(f"{place}[{index}]", *pair)
    else:
        yield place, run, again
