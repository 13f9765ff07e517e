"""The end of a run in words and figures: `report.txt`, and the last thing printed.

`report` is a pure function of the view and of what only the launcher knows (the ledger's totals, the checkpoint); what
a run does not have is left out. Every figure says what it is a share or a mean of, and every sum that ought to come
out is checked and said.

Tests: tests/unit/telemetry/test_report.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from flowrl.errors import DataError, one_line, shortened
from flowrl.telemetry.events import Cause
from flowrl.telemetry.files import UNREADABLE, read_file, replace_file
from flowrl.telemetry.intervals import mean_interval, paired_interval, prompt_means
from flowrl.telemetry.view import format_duration, shares, words

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.telemetry.events import Evaluation
    from flowrl.telemetry.intervals import Interval
    from flowrl.telemetry.view import RunView

NUM_SHOWN = 3  # completions
SHOWN_CHARACTERS = 300  # of a prompt or completion
COVERAGE = 0.02  # charged time may miss the wall clock by this much: statuses are stamped a moment after they are read
BUSY = 0.6  # a node computing less than this is no bottleneck; the run is waiting in turns
WORTH_SAYING = 0.05  # share of its time a node must spend waiting to be named
WINDOW = "between the first and the last step"
COLUMNS = (
    Cause.COMPUTE, Cause.WAIT_INPUT, Cause.WAIT_ROOM, Cause.WAIT_DEVICES, Cause.UPDATE, Cause.START, Cause.RECOVERY,
)  # fmt: skip


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """What the launcher knows about the end of a run."""

    name: str
    totals: dict[str, int] = {}  # the ledger's: admitted, learned, filtered, failed, unfinished
    checkpoint: str = ""  # path of the newest complete one
    best: str = ""  # which version scored best, where evaluations say that, and where it is
    resume: str = ""  # command that goes on from it, or begins again where there is none
    was_stopped: bool = False  # the user asked for it
    failure: str = ""  # the error that ended the run


def report(view: RunView, ending: Ending) -> str:
    """Return the report as plain text, ending in a newline."""
    sections = [
        [_headline(view, ending)],
        _heldout(view),
        _benchmarks(view),
        _completions(view),
        _throughput(view),
        _time_by_cause(view),
        [*bottleneck(view), *_occupancy(view)],
        _samples(view),
        _whereabouts(ending),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def write_report(path: Path, text: str) -> None:
    """Write the report, whole or not at all."""
    replace_file(path, text.encode())


def write_ending(run_dir: Path, ending: Ending) -> None:
    """Write how the run ended as `ending.json`, for programs."""
    write_report(run_dir / "ending.json", msgspec.json.format(msgspec.json.encode(ending)).decode() + "\n")


def read_ending(run_dir: Path) -> Ending | None:
    """Return how a run ended, or None where it has not, or was killed before it could say.

    Raises:
        DataError: the file is damaged.
    """
    path = run_dir / "ending.json"
    if (body := read_file(path)) is None:
        return None
    try:
        return msgspec.json.decode(body, type=Ending)
    except UNREADABLE as error:
        raise DataError(str(path), f"is damaged ({error})", "restore the file, or remove it") from error


def _headline(view: RunView, ending: Ending) -> str:
    how = "failed" if ending.failure else "stopped" if ending.was_stopped else "finished"
    step = view.last_step
    steps = f"{step.version} of {step.num_steps} steps" if step else "no step"
    elapsed_s = view.now_s - view.started_s if view.started_s is not None else 0.0
    line = f"{ending.name} {how}: {steps} in {format_duration(elapsed_s)}"
    return f"{line}\n  {one_line(ending.failure)}" if ending.failure else line


def _heldout(view: RunView) -> list[str]:
    scored = [view.evaluations[version] for version in sorted(view.evaluations) if view.evaluations[version].scores]
    if not scored:
        return []
    first, last = scored[0], scored[-1]
    num_samples = len(first.scores[0])
    lines = [
        f"held-out score, {len(first.scores)} prompts x {num_samples} samples (95 % t intervals over prompt means)"
    ]
    rows = [
        (f"version {evaluation.version}", *_interval_cells(mean_interval(prompt_means(evaluation.scores)), "{:.4f}"))
        for evaluation in ((first, last) if last is not first else (first,))
    ]
    change = paired_interval(first.scores, last.scores) if last is not first else None
    if change is not None:
        rows.append(("change", *_interval_cells(change, "{:+.4f}")))
    for name, scores in last.sets.items():
        further = mean_interval(prompt_means(scores))
        rows.append((f"{one_line(name)}, version {last.version}", *_interval_cells(further, "{:.4f}")))
        moved = paired_interval(first.sets.get(name, []), scores) if last is not first else None
        if moved is not None:
            rows.append((f"{one_line(name)}, change", *_interval_cells(moved, "{:+.4f}")))
    lines += _aligned(rows, left=1)
    if change is not None:
        lines.append(f"  the change is paired by prompt; {verdict(change)}")
    elif last is not first:
        lines.append("  the two were not scored on the same prompts: no paired change")
    return lines


def _benchmarks(view: RunView) -> list[str]:
    asked = [view.evaluations[version] for version in sorted(view.evaluations) if view.evaluations[version].tasks]
    if not asked:
        return []
    rows = [
        (f"{one_line(name)}, version {version}", bounds.said(), f"{bounds.num} items")
        for name in asked[-1].tasks
        for version in dict.fromkeys((asked[0].version, asked[-1].version))
        for bounds in [view.evaluations[version].tasks.get(name)]
        if bounds is not None
    ]
    return ["benchmarks (95 % intervals over items)", *_aligned(rows, left=1)]


def _interval_cells(interval: Interval, form: str) -> tuple[str, ...]:
    mean = form.format(interval.mean)
    if math.isinf(interval.half_width):
        return mean, "(one prompt: no interval)"
    return mean, f"[{form.format(interval.low)}, {form.format(interval.high)}]"


def verdict(change: Interval) -> str:
    """Say in words what a paired change shows."""
    if math.isinf(change.half_width):
        return "one prompt says nothing about others"
    if change.half_width == 0 and change.mean == 0:
        return "no prompt's score changed"
    if change.low > 0:
        return "its interval lies above 0: the policy is better on prompts like these"
    if change.high < 0:
        return "its interval lies below 0: the policy is worse on prompts like these"
    return "its interval contains 0: no change is shown"


def _completions(view: RunView) -> list[str]:
    versions = sorted(version for version, evaluation in view.evaluations.items() if evaluation.completions)
    if not versions:
        return []
    first, last = view.evaluations[versions[0]], view.evaluations[versions[-1]]
    after = {row.get("prompt", ""): row for row in last.completions} if last is not first else {}
    lines = ["held-out completions"]
    for row in first.completions[:NUM_SHOWN]:
        lines.append(f"  prompt: {shortened(row.get('prompt', ''), SHOWN_CHARACTERS)}")
        lines.append(_completion_line(first, row))
        if row.get("prompt", "") in after:
            lines.append(_completion_line(last, after[row.get("prompt", "")]))
    return lines


def _completion_line(evaluation: Evaluation, row: dict[str, str]) -> str:
    completion = shortened(row.get("completion", ""), SHOWN_CHARACTERS)
    return f"    version {evaluation.version}, score {row.get('reward', '?')}: {completion}"


def _throughput(view: RunView) -> list[str]:
    rows = [
        (name, _rate(samples, "{:,.2f}"), _rate(tokens, "{:,.0f}"))
        for name, samples, tokens in (
            ("first to last step", view.steady_per_s("samples"), view.steady_per_s("tokens")),
            ("from the start", view.overall_per_s("samples"), view.overall_per_s("tokens")),
        )
        if tokens is not None
    ]
    return ["learned per second", *_aligned([("", "samples", "tokens"), *rows], left=1)] if rows else []


def _rate(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _time_by_cause(view: RunView) -> list[str]:
    parts = {node: part for node in view.nodes if (part := shares(view.node_seconds(node)))}
    has_turns = any(part.get(Cause.WAIT_DEVICES) for part in parts.values())
    columns = [cause for cause in COLUMNS if cause is not Cause.WAIT_DEVICES or has_turns]
    rows = [("node", "replicas", *(words(cause) for cause in columns), "sum")]
    for node, part in parts.items():
        cells = [100 * part.get(cause, 0.0) for cause in columns]
        num_replicas = sum(replica.node == node for replica in view.replicas)
        rows.append((node, str(num_replicas), *(f"{cell:.1f}" for cell in cells), f"{sum(cells):.1f}"))
    if len(rows) == 1:
        return []
    return ["time by cause, % of each node's replicas' time", *_aligned(rows, left=1), _coverage_line(view)]


def _coverage_line(view: RunView) -> str:
    """Hold the charged seconds against the wall clock: a second that no cause was charged with would show here."""
    observed = [replica for replica in view.replicas if replica.observed_s > 0]
    off = [
        f"{replica.name} {replica.charged_s:.1f} of {replica.observed_s:.1f} s"
        for replica in observed
        if abs(replica.charged_s - replica.observed_s) > COVERAGE * replica.observed_s + 0.1
    ]
    if off:
        return "  DOES NOT ADD UP, charged against wall clock: " + ", ".join(off)
    observed_s, charged_s = sum(r.observed_s for r in observed), sum(r.charged_s for r in observed)
    if not observed_s:
        return "  (too short to hold against the wall clock)"
    return f"  adds up: {100 * charged_s / observed_s:.1f} % of the replicas' wall clock is charged to a cause"


def bottleneck(view: RunView) -> list[str]:
    """Name the node that computes most between the first and the last step, and who waits; nothing before two steps."""
    parts = {node: shares(view.steady_seconds(node)) for node in view.nodes if node in view.path_nodes}
    parts = {node: part for node, part in parts.items() if part}
    if not parts:
        return []
    busy = {node: part.get(Cause.COMPUTE, 0.0) for node, part in parts.items()}
    order = sorted(busy, key=lambda node: -busy[node])
    named = order[0]
    lines = [f"bottleneck: {named}, computing {busy[named]:.0%} of the time {WINDOW}"]
    if len(order) > 1:
        lines[0] += f", more than any other node on the path (next {order[1]}, {busy[order[1]]:.0%})"
    for cause in (Cause.WAIT_INPUT, Cause.WAIT_ROOM, Cause.WAIT_DEVICES):
        share, node = max((part.get(cause, 0.0), node) for node, part in parts.items())
        if node != named and share >= WORTH_SAYING:
            lines.append(f"  {node} spends {share:.0%} of that time {words(cause)}")
    occupancy = view.slot_occupancy(named)
    if occupancy is not None:
        lines.append(f"  {occupancy:.0%} of its decode slots are filled: that is the part of its full batch's tokens/s")
    if busy[named] < BUSY:
        lines.append("  no node is busy most of the time: they wait for each other in turns; more groups in flight")
        lines.append("  (max_staleness, queue depths) would overlap them")
    else:
        lines.append(f"  to go faster, give {named} more replicas or ranks, or less work, before any other node")
    return lines


def _occupancy(view: RunView) -> list[str]:
    lines: list[str] = []
    for node in sorted(view.generator_nodes & view.path_nodes):
        part = shares(view.steady_seconds(node))
        if part:
            paused = part.get(Cause.UPDATE, 0.0)
            filled = view.slot_occupancy(node)
            lines.append(f"{node} slot occupancy {WINDOW}: " + ("not told" if filled is None else f"{filled:.1%}"))
            lines[-1] = f"{lines[-1]}, paused for new weights {paused:.1%}" if paused >= 0.0005 else lines[-1]
    return lines


def _samples(view: RunView) -> list[str]:
    lines: list[str] = [f"WARNING: {view.cut_responses}"] if view.cut_responses else []
    if view.staleness:
        total = sum(view.staleness.values())
        mean = sum(stale * count for stale, count in view.staleness.items()) / total
        lines.append(
            f"staleness of {total} learned groups, in policy versions: mean {mean:.2f}, max {max(view.staleness)}"
        )
        rows = [
            (str(s), str(n), f"{n / total:.1%}", "#" * round(40 * n / total)) for s, n in sorted(view.staleness.items())
        ]
        lines += _aligned(rows, left=0, last_left=True)
    if view.logprob_gap is not None:
        mean, greatest = view.logprob_gap
        lines.append(f"generator vs learner log-probs of sampled tokens: mean |d| {mean:.2g}, max {greatest:.2g}")
    return lines


def _whereabouts(ending: Ending) -> list[str]:
    lines: list[str] = []
    totals = ending.totals
    if totals:
        parts = [name for name in totals if name != "admitted"]
        says = " + ".join(f"{name} {totals[name]}" for name in parts)
        gap = totals.get("admitted", 0) - sum(totals[name] for name in parts)
        lines.append(
            f"ledger: admitted {totals.get('admitted', 0)} = {says}" + (f"; DOES NOT ADD UP, by {gap}" if gap else "")
        )
    if ending.checkpoint:
        lines.append(f"checkpoint: {ending.checkpoint}")
    if ending.best:
        lines.append(f"best:       {ending.best}")
    if ending.resume:
        lines.append(f"{'continue:  ' if ending.checkpoint else 'begin again:'} {ending.resume}")
    return lines


def _aligned(rows: Sequence[tuple[str, ...]], *, left: int, last_left: bool = False) -> list[str]:
    """Return rows as indented lines; the first `left` columns flush left, numbers flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: list[str] = []
    for row in rows:
        cells = [
            cell.ljust(width) if place < left or (last_left and place == len(row) - 1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
