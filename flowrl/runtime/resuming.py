"""What a resumed run must have in common with its earlier attempts, and the record of what it has not.

Invariants:
- a run's groups are admitted from one order of one data set, and its figures mean the same from first step to last, or
  it is not resumed;
- what may differ (rates, replicas, limits) stands in `attempts/`, one file for each attempt after the first, and
  `settings.yaml` and `graph.json` are those of the newest.

Called by launch.

Tests: tests/unit/runtime/test_resuming.py
"""

from __future__ import annotations

import time
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.config import Config, resolve, to_tree
from flowrl.errors import ConfigError, DataError
from flowrl.graph.program import plan_of
from flowrl.runtime.rundir import code_of, read_plan, read_starts
from flowrl.telemetry.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from flowrl.graph.program import Program

# Settings, by path, on which a run's data, groups or the meaning of its figures depend.
FIXED = (
    "seed", "model", "*_model", "*_models", "reward_weights", "epochs", "max_staleness", "*_per_step", "*.per_step",
    "data.*", "*.data.*", "*sampling.*", "*.group_size", "algorithm.use", "objective.use", "objective.options.teacher",
    "*.function", "*.adapter", "*.label_column", "*.weight", "reward*.name", "reward*.level", "reward*.clip",
    "reward*.normalise", "reward*.step_*", "evaluation.samples", "evaluation.sets*", "evaluation.task*",
    "evaluation.best_by", "texts.*", "select.*", "writer.*",
    "replay.*", "agent.environment*", "agent.max_turns", "humans.way", "agent.max_tokens", "agent.role",
    "agent.turn_prefix", "*judge.name", "*judge.rubric.*", "judge.*.model", "model_judge.model", "model_judge.verdict",
    "judge.*.temperature", "*judge.*max_tokens", "judge.second_every", "reward_base", "pairs.*",
    "critic.scale_returns",
)  # fmt: skip
# Of these, what only says where something is done.
FREE = ("*.replicas", "*.ranks", "*.cpus", "*.gpus", "*.share")
Changes = dict[str, tuple[Any, Any]]  # path -> old, new


def check_same_graph(run_dir: Path, graph: Path) -> None:
    """Insist on the run's graph, by its file's name: another one's settings would be found to lack or to have some.

    Raises:
        ConfigError: it is another.
    """
    starts = read_starts(run_dir)
    if starts and (began := PurePath(starts[-1].graph)).name != graph.name:
        raise ConfigError(str(graph), f"is not the graph of {run_dir}", f"resume with {began}")


def check_same_run(run_dir: Path, program: Program) -> Changes:
    """Return the settings that differ from the run's newest attempt.

    Raises:
        ConfigError: one of them is fixed for a run, or the graph is another.
    """
    plans = (read_plan(run_dir), plan_of(program.graph))
    there, here = ({name: spec.stage for name, spec in plan.nodes.items()} for plan in plans)
    odd = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    if odd:
        what = f"has another {odd[0]} than the run ({here.get(odd[0], 'none')}, not {there.get(odd[0], 'none')})"
        raise ConfigError(str(program.path), what, "resume with the run's own graph and settings")
    settings: Config = program.settings
    before = resolve(type(settings), config=run_dir / "settings.yaml")
    found = _differences(to_tree(before), to_tree(settings), "")
    changes: Changes = {path: (old, new) for path, old, new in found}
    fixed = [path for path in changes if is_fixed(path)]
    if fixed:
        old, new = changes[fixed[0]]
        also = f" (other than in the run, too: {', '.join(fixed[1:])})" if fixed[1:] else ""
        what = f"is {_shown(new)}, but the run has {_shown(old)}{also}"
        remedy = "its data or its figures would not be the same any more: leave it out, or start a new run"
        raise ConfigError(fixed[0], what, f"{remedy} with model={run_dir}")
    return changes


def check_same_data(run_dir: Path, program: Program) -> None:
    """Insist that a checked program has read the data that the run began with.

    Raises:
        DataError: a source has grown or changed.
    """
    starts = read_starts(run_dir)
    for node, before in starts[0].data.items() if starts else ():
        now = program.graph.nodes[node].data_digest
        if now != before:
            what = f"the data have changed since the run began (then {before}; now {now})"
            raise DataError(node, what, f"put them back, or start a new run with model={run_dir}")


def changed_code(run_dir: Path, program: Program) -> list[str]:
    """Return the files of a program's own code that are not what they were when the run was last started."""
    starts, now = read_starts(run_dir), code_of(program)
    before = starts[-1].code if starts else {}
    return [file for file, digest in now.items() if before.get(file, digest) != digest]


def record_attempt(run_dir: Path, changes: Changes, *, version: int, code: Sequence[str] = ()) -> Iterator[str]:
    """Write down how an attempt differs from the one before, `code` by its files; yield it as lines."""
    number = 1 + len(list((run_dir / "attempts").glob("*.json")))
    changed = {path: {"old": old, "new": new} for path, (old, new) in changes.items()}
    record = {"version": version, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "changed": changed, "code": [*code]}
    (run_dir / "attempts").mkdir(exist_ok=True)
    replace_file(run_dir / "attempts" / f"{number:03d}.json", msgspec.json.format(msgspec.json.encode(record)))
    for file in code:
        yield f"warning: {file} has changed since the run's last start: its results may mean something else"
    for path, (old, new) in changes.items():
        yield f"{path} is {_shown(new)} from here on (it was {_shown(old)})"


def is_fixed(path: str) -> bool:
    """Say whether a setting must stay for a whole run."""
    return _matches(path, FIXED) and not _matches(path, FREE)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        before, after = cast("dict[str, Any]", old), cast("dict[str, Any]", new)
        for name in dict.fromkeys([*before, *after]):
            yield from _differences(before.get(name), after.get(name), f"{path}.{name}" if path else name)
    elif old != new:
        yield path, old, new


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()
