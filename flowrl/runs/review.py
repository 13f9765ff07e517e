"""Look back on a run from its directory: the report's page and single rollouts, with what every layer knows of them.

The page is drawn by telemetry/page and rollouts are found by runs/inspection.py; what these cannot know (whether a
process of the run lives, the ledger, the simulator's advice, the tokenizer) is gathered here.

Invariants:
- nothing in the run's directory is changed but the page that is written;
- a run may be going on.

Called by `flowrl report` and `inspect`.

Tests: tests/unit/runs/test_review.py
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from flowrl.config import redacted
from flowrl.data.pieces import pieces_of
from flowrl.errors import ConfigError, DataError, FlowrlError, one_line
from flowrl.graph.program import graph_of
from flowrl.graph.show import bounds
from flowrl.runs.inspection import RecordedRollouts, as_json, as_table, describe_group
from flowrl.runs.page.page import Subject, write_page
from flowrl.runs.verify import describe, verify_run
from flowrl.runtime.ledger import ENDINGS, read_entries, surviving
from flowrl.runtime.rundir import existing_run, is_held, read_plan, read_settings
from flowrl.telemetry.metrics import read_state
from flowrl.telemetry.records import step_files
from flowrl.telemetry.report import read_ending
from flowrl.tuning.advisor import advice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flowrl.graph.program import GraphPlan
    from flowrl.runtime.ledger import Entry

MOST_REASONS = 20  # rows of groups that were not learned


def write_review(run: Path, out: Path | None, graph_file: Path | None, *, say: Callable[[str], None]) -> Path:
    """Write a run's page to `out`, by default `report.html` in its directory, and return where it is.

    `graph_file` is the graph that the run was of: with it the advice comes from the tuner.

    Raises:
        UserError: there is no such run, `out` cannot be written, or `graph_file` does not fit the run.
    """
    run_dir = existing_run(run).resolve()
    path = out or run_dir / "report.html"
    plan = read_plan(run_dir)
    settings = read_settings(run_dir / "settings.yaml")
    say(f"reading {run_dir}")
    subject = _subject(run_dir, plan, settings, graph_file)
    try:
        write_page(path, subject, pieces_of(run_dir, str(settings.get("model", ""))))
    except OSError as error:
        raise ConfigError(str(path), f"cannot be written ({error.strerror})", "choose another --out") from error
    return path


def inspect_rollouts(run: Path, where: str, *, columns: list[str], limit: int, as_lines: bool) -> Iterator[str]:
    """Return the samples that `where` chooses as a table, or as lines of JSON.

    Raises:
        UserError: there is no such run, it recorded none, or `where` or `columns` cannot be used.
    """
    if limit < 1:
        raise ConfigError("--limit", f"{limit} lists nothing", "give 1 or more")
    listing = RecordedRollouts(existing_run(run)).choose(where, limit=limit, columns=columns)
    return as_json(listing) if as_lines else as_table(listing)


def inspect_group(run: Path, group_id: int) -> Iterator[str]:
    """Return one group in full as lines; of one that was not learned, what the ledger says of it.

    Raises:
        UserError: there is no such run or no such group.
    """
    run_dir = existing_run(run)
    fate = fate_of(read_entries(run_dir / "ledger.jsonl"), group_id)
    rows = RecordedRollouts(run_dir).group(group_id) if step_files(run_dir / "rollouts") else []
    if not rows and not fate:
        raise ConfigError("--group", f"{run} has no group {group_id}", "flowrl inspect RUN lists those it recorded")
    if not rows:
        return iter(_without_rows(run_dir, group_id, fate))
    model = str(read_settings(run_dir / "settings.yaml").get("model", ""))
    return describe_group(rows, fate or "not in the ledger", pieces_of(run_dir, model))


def _without_rows(run_dir: Path, group_id: int, fate: str) -> list[str]:
    why = "this run records none" if fate.startswith("learned") else "only what is learned is recorded"
    lines = [one_line(f"group {group_id}: {fate}"), f"there are no samples of it: {why}"]
    quarantined = run_dir / "quarantine" / f"group-{group_id}.json"
    return [*lines, f"what could not be handled is in {quarantined}"] if quarantined.exists() else lines


def fate_of(entries: list[Entry], group_id: int) -> str:
    """Say what became of a group in the history that survived; "" where it never entered."""
    told = [entry for entry in surviving(entries) if entry.group == group_id]
    ending = next((entry for entry in told if entry.event in ENDINGS), None)
    if ending is None:
        return "admitted, without an ending yet" if told else ""
    if ending.event != "learned":
        return f"{ending.event}: {ending.reason}"
    again = [str(entry.step) for entry in told if entry.event == "replayed"]
    return f"learned in step {ending.step}" + (f", and again in {', '.join(again)}" if again else "")


def _subject(run_dir: Path, plan: GraphPlan, settings: dict[str, Any], graph_file: Path | None) -> Subject:
    condition, is_sound = _condition(run_dir)
    ending = None if condition == "running" else read_ending(run_dir)
    totals, reasons, verdict = _ledger(run_dir)
    return Subject(
        run_dir=run_dir,
        condition=condition,
        is_sound=is_sound,
        failure=ending.failure if ending and condition == "failed" else "",
        resume=ending.resume if ending and condition in ("failed", "stopped") else "",
        nodes=list(plan.nodes),
        edges=_edges(plan),
        settings=[*flattened(redacted(settings))],
        totals=totals,
        reasons=reasons,
        verdict=verdict,
        advice=advice(run_dir, plan, graph_file),
        has_generator=any(edge.kind == "latest" for edge in plan.edges),
    )


def _condition(run_dir: Path) -> tuple[str, bool]:
    """Return how the run stands, and whether that is how it should be."""
    state, ending = read_state(run_dir), read_ending(run_dir)
    if is_held(run_dir):
        return "running", True
    if state is not None and not state.is_ended:
        return "killed: it did not come to its end", False
    if ending is not None:
        return ("failed", False) if ending.failure else ("stopped", True) if ending.was_stopped else ("finished", True)
    if (run_dir / "report.txt").exists():
        return "ended", True
    return "killed: it did not come to its end", False


def _ledger(run_dir: Path) -> tuple[dict[str, int], list[tuple[str, str, int]], list[str]]:
    """Return the totals, the reasons of what was not learned, and the verdict; nothing where there is no ledger."""
    try:
        alive = surviving(read_entries(run_dir / "ledger.jsonl"))
    except DataError as error:
        return {}, [], [str(error)]
    counts = Counter(entry.event for entry in alive)
    ended = sum(counts[ending] for ending in ENDINGS)
    admitted = counts["admitted"]
    totals = {"admitted": admitted, **{ending: counts[ending] for ending in ENDINGS}, "unfinished": admitted - ended}
    try:
        verdict = describe(verify_run(run_dir), run_dir).splitlines()
    except FlowrlError as error:
        verdict = [str(error)]
    return totals, _reasons(alive), verdict


def _reasons(alive: list[Entry]) -> list[tuple[str, str, int]]:
    counts = Counter((entry.event, entry.reason) for entry in alive if entry.event in ("filtered", "failed"))
    return [(event, reason, count) for (event, reason), count in counts.most_common(MOST_REASONS)]


def flattened(settings: dict[str, Any], at: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting by its path; {"learner": {"lr": 0.1}} yields ("learner.lr", "0.1")."""
    for name, value in settings.items():
        inner = _inner(value)
        if inner:
            yield from flattened(inner, f"{at}{name}.")
        else:
            yield f"{at}{name}", value if isinstance(value, str) and value else repr(value)


def _inner(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _edges(plan: GraphPlan) -> list[tuple[str, ...]]:
    """Return kind, ends and bounds of every edge; without what its stages alone know where they are not there."""
    try:
        told = [bounds(edge) for edge in graph_of(plan).edges]
    except FlowrlError:
        told = [", ".join(f"{name} {value}" for name, value in edge.bounds.items() if value) for edge in plan.edges]
    return [(edge.kind, edge.source, edge.target, text) for edge, text in zip(plan.edges, told, strict=True)]
