"""Verify a run from its own files: nothing lost, nothing learned twice, nothing staler than the bound.

The ledger says what became of every group in the history that survived. It is held against every other record, each
written apart from it. These are the record of the run's starts (how stale a sample might be then), the recorded
rollouts (which groups each step was trained on); every checkpoint (its files, and how far the ledger had come), the
published versions, the figures, the ending.

Invariants:
- a run is clean only where every record is there and all agree;
- what cannot be read is an error with file and place.

Called by `flowrl verify`, and by the tests after every simulated schedule.

Tests: tests/unit/runs/test_verify.py
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.engines.checkpoint import checkpoint_version, checkpoints_in, damage, read_cut, strays
from flowrl.errors import DataError
from flowrl.runtime.ledger import ENDINGS, Cut, Entry, foreign, read_entries, surviving
from flowrl.runtime.rundir import digest_of, existing_run, is_held, read_plan, read_settings, read_starts
from flowrl.telemetry.files import REPLACED, UNREADABLE, read_file, run_id
from flowrl.telemetry.metrics import read_steps
from flowrl.telemetry.records import read_digests, read_groups, step_files, step_path
from flowrl.telemetry.report import read_ending

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flowrl.runtime.rundir import RunStart

MOST_SHOWN = 1000  # groups named as lost: a number that was forged may leave out any many


@dataclass
class Verdict:
    """What was found; each list holds group ids."""

    counts: dict[str, int]
    rollbacks: int
    steps: int  # learned in the surviving history
    unfinished: list[int]  # admitted and without an ending
    lost: list[int] = field(default_factory=list[int])  # of a finished run: unfinished; of any: numbers left out
    duplicated: list[int] = field(default_factory=list[int])  # with more than one ending
    over_stale: list[int] = field(default_factory=list[int])
    # Replayed when they were too old, twice in a step, or not in a step after the one that learned them.
    misreplayed: list[int] = field(default_factory=list[int])
    disagreeing: list[str] = field(default_factory=list[str])  # where another record says something else
    missing: list[str] = field(default_factory=list[str])  # records that ought to be there
    strays: list[str] = field(default_factory=list[str])  # files that are no record; they prove and break nothing

    @property
    def is_clean(self) -> bool:
        """Return whether every guarantee holds."""
        wrong = (self.lost, self.duplicated, self.over_stale, self.misreplayed, self.disagreeing, self.missing)
        return not any(wrong)


def judge(
    entries: list[Entry],
    *,
    max_staleness: int | None,
    is_finished: bool,
    max_age: int | None = None,
    bounds: Mapping[int, int | None] | None = None,
) -> Verdict:
    """Return what a ledger's entries prove.

    `max_age` is the greatest staleness of a replayed group, `bounds` the greatest of a group by the start of the
    command in which it was learned, if not `max_staleness`.
    """
    bound_of = _bounds(entries, max_staleness, bounds or {})
    alive = surviving(entries)
    admitted = {entry.group for entry in alive if entry.event == "admitted"}
    endings = Counter(entry.group for entry in alive if entry.event in ENDINGS)
    learned = [entry for entry in alive if entry.event == "learned"]
    unfinished = sorted(admitted - endings.keys())
    left_out = _gaps(admitted)
    stale = [e.group for e in learned if (most := bound_of[id(e)]) is not None and e.step - e.oldest > most]
    counts = Counter(entry.event for entry in alive)
    odd = _disordered(alive)
    return Verdict(
        counts={
            name: counts[name] for name in ("admitted", *ENDINGS, "replayed") if counts[name] or name != "replayed"
        },
        rollbacks=sum(entry.event == "rollback" for entry in entries),
        steps=len({entry.step for entry in learned}),
        unfinished=unfinished,
        lost=left_out + (unfinished if is_finished else []),
        duplicated=sorted(group for group, count in endings.items() if count > 1),
        over_stale=sorted(stale),
        misreplayed=_misreplayed(alive, max_age),
        disagreeing=[f"ledger.jsonl: groups {_some(odd)} end before they are admitted, or are twice"] if odd else [],
    )


def _bounds(entries: list[Entry], most: int | None, bounds: Mapping[int, int | None]) -> dict[int, int | None]:
    """Return by entry how stale a group might be when it was written."""
    found: dict[int, int | None] = {}
    now = bounds.get(0, most)
    for entry in entries:
        if entry.event == "rollback" and entry.start >= 0:
            now = bounds.get(entry.start, most)
        found[id(entry)] = now
    return found


def _gaps(admitted: set[int]) -> list[int]:
    """Return numbers below the greatest that were never admitted, at most `MOST_SHOWN`."""
    found: list[int] = []
    expected = 0
    for group in sorted(admitted):
        found += range(expected, min(group, expected + MOST_SHOWN))
        expected = group + 1
        if len(found) >= MOST_SHOWN:
            break
    return found


def _disordered(alive: list[Entry]) -> list[int]:
    """Return the groups that were admitted twice, or ended before they were admitted."""
    admitted: set[int] = set()
    found: set[int] = set()
    for entry in alive:
        if entry.event != "rollback" and (entry.event == "admitted") == (entry.group in admitted):
            found.add(entry.group)
        if entry.event == "admitted":
            admitted.add(entry.group)
    return sorted(found)


def _misreplayed(alive: list[Entry], max_age: int | None) -> list[int]:
    learned_in = {entry.group: entry.step for entry in alive if entry.event == "learned"}
    replayed = [entry for entry in alive if entry.event == "replayed"]
    times = Counter((entry.group, entry.step) for entry in replayed)
    return sorted(
        {
            entry.group
            for entry in replayed
            if learned_in.get(entry.group, entry.step) >= entry.step
            or times[entry.group, entry.step] > 1
            or (max_age is not None and entry.step - entry.oldest > max_age)
        }
    )


def verify_run(run_dir: Path) -> Verdict:
    """Judge a run's ledger and hold it against every other record.

    Raises:
        UserError: the directory holds no run, or a file in it cannot be read.
    """
    settings = read_settings(existing_run(run_dir) / "settings.yaml")
    entries = read_entries(run_dir / "ledger.jsonl")
    starts = read_starts(run_dir)
    ending = read_ending(run_dir)
    learned = {entry.step for entry in surviving(entries) if entry.event == "learned"}
    has_ended = ending is not None and not ending.failure
    has_finished = ending is not None and has_ended and not ending.was_stopped
    bounds = {start.number: _whole(start.settings.get("max_staleness")) for start in starts}
    verdict = judge(
        entries,
        max_staleness=_whole(settings.get("max_staleness")),
        is_finished=settings.get("steps") == len(learned) or has_finished,
        max_age=_whole(_node(settings, "replay").get("max_age")),
        bounds=bounds,
    )
    saved = _compare_checkpoints(run_dir, entries, verdict)
    _compare_starts(run_dir, starts, settings, verdict)
    _compare_rollouts(run_dir, entries, settings, saved, verdict)
    _compare_versions(run_dir, saved, verdict, is_whole=0 in learned)
    _compare_metrics(run_dir, entries, verdict, is_whole=len(starts) == 1 and has_ended)
    if ending is not None and (name := Path(ending.checkpoint).name) and not (run_dir / "checkpoints" / name).is_dir():
        verdict.missing.append(f"checkpoints/{name}: the run ended with it")
    if ending is not None and ending.totals and not is_held(run_dir):
        totals = {name: verdict.counts[name] for name in ("admitted", *ENDINGS)}
        told = {name: ending.totals.get(name) for name in totals}
        if told != totals:
            verdict.disagreeing.append(f"ending.json: the run ended with {told}, the ledger has {totals}")
    return verdict


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _node(settings: dict[str, Any], name: str) -> dict[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def _compare_starts(run_dir: Path, starts: list[RunStart], settings: dict[str, Any], verdict: Verdict) -> None:
    """Hold settings.yaml and graph.json against what the run was started with."""
    if not starts:
        verdict.missing.append("starts.jsonl: with which settings the run was started is not known")
        return
    if [start.number for start in starts] != list(range(len(starts))):
        verdict.disagreeing.append(f"starts.jsonl: starts {[s.number for s in starts]} are not numbered from 0 on")
    if settings not in [start.settings for start in starts[-2:]]:
        verdict.disagreeing.append("settings.yaml: is not what the run was started with: the file was changed")
    graph = run_dir / "graph.json"
    read_plan(run_dir)
    if digest_of(graph.read_bytes()) not in [start.plan_digest for start in starts[-2:]]:
        verdict.disagreeing.append("graph.json: is not the graph that the run was started with: the file was changed")


def _compare_checkpoints(run_dir: Path, entries: list[Entry], verdict: Verdict) -> int:
    """Hold every checkpoint against its manifest, and its cut against the ledger; returns the newest one's version."""
    newest = 0
    ledger = run_dir / "ledger.jsonl"
    lines = (read_file(ledger) or b"").splitlines(keepends=True)
    for checkpoint in checkpoints_in(run_dir / "checkpoints"):
        if wrong := damage(checkpoint):
            verdict.disagreeing.append(f"checkpoints/{checkpoint.name}: {wrong}")
            continue
        verdict.strays += [f"checkpoints/{checkpoint.name}/{name}" for name in strays(checkpoint)]
        try:
            cut = msgspec.json.decode(read_cut(checkpoint), type=Cut)
        except UNREADABLE as error:
            verdict.disagreeing.append(f"checkpoints/{checkpoint.name}/cut.json: is not a cut ({error})")
            continue
        newest = max(newest, checkpoint_version(checkpoint))
        where = f"checkpoints/{checkpoint.name}"
        if cut.records > len(entries):
            what = f"was made after {cut.records} entries of the ledger, which has {len(entries)}"
            verdict.disagreeing.append(f"{where}: {what}")
            continue
        if wrong := foreign(ledger, lines, cut):
            verdict.disagreeing.append(f"{where}: ledger.jsonl: {wrong}")
        ended = Counter(entry.event for entry in surviving(entries[: cut.records]))
        for name in ENDINGS:
            if ended[name] != getattr(cut, name):
                what = f"{getattr(cut, name)} groups had {name}, of the ledger until then {ended[name]}"
                verdict.disagreeing.append(f"{where}: {what}")
    return newest


def _compare_rollouts(
    run_dir: Path, entries: list[Entry], settings: dict[str, Any], saved: int, verdict: Verdict
) -> None:
    """Hold the recorded groups of every step against the ledger's."""
    directory = run_dir / "rollouts"
    by_step: dict[int, set[int]] = defaultdict(set)
    for entry in surviving(entries):
        if entry.event == "learned":
            by_step[entry.step].add(entry.group)
    recorded = step_files(directory)
    there = {path.name for path in directory.iterdir()} if directory.is_dir() else set[str]()
    known = {REPLACED, *(path.name for path in recorded.values())}
    verdict.strays += [f"rollouts/{name}" for name in sorted(there - known)]
    given_up, here = _given_up(entries), run_id(run_dir)
    for step, path in recorded.items():
        if given_up is not None and step >= given_up:
            continue  # killed before the learner could set it aside
        run, groups = _groups_of(path)
        if run and here and run != here:
            verdict.disagreeing.append(f"rollouts/{path.name}: is of another run ({run}, this one is {here})")
        if groups != by_step.get(step, set()):
            odd = _some(sorted(groups ^ by_step.get(step, set())))
            verdict.disagreeing.append(f"step {step}: groups {odd} are in one of ledger and {path.name} only")
    if _node(settings, "learner").get("save_rollouts"):
        # The newest step may have been learned and not recorded when the run was killed.
        needed = [step for step in sorted(by_step) if step < saved or step < max(by_step)]
        verdict.missing += [f"rollouts/{step_path(directory, step).name}" for step in needed if step not in recorded]


def _given_up(entries: list[Entry]) -> int | None:
    """Return the version that the run has gone back to where it has learned nothing since, else None."""
    for entry in reversed(entries):
        if entry.event == "learned":
            return None
        if entry.event == "rollback":
            return entry.step
    return None


def _groups_of(path: Path) -> tuple[str, set[int]]:
    import pyarrow as pa

    try:
        return read_groups(path)
    except (OSError, KeyError, pa.ArrowException) as error:
        what = " ".join(str(error).split())
        raise DataError(str(path), f"cannot be read ({what})", "the record of that step is lost") from error


def _compare_versions(run_dir: Path, saved: int, verdict: Verdict, *, is_whole: bool) -> None:
    """See that every version up to the newest checkpoint's was published, where weights are.

    Only a run that has not learned its first step, but one of the run that it trains again, begins with another than 0.
    """
    path = run_dir / "versions.jsonl"
    publishes = any(e.kind == "latest" and e.source.endswith(".weights") for e in read_plan(run_dir).edges)
    if not path.exists():
        if publishes and saved:
            verdict.missing.append("versions.jsonl: which weights were published is not known")
        return
    versions = read_digests(run_dir)
    first = 0 if is_whole else min(versions, default=0)
    if gone := [version for version in range(first, saved + 1) if version not in versions]:
        verdict.disagreeing.append(f"versions.jsonl: lacks versions {_some(gone)}, the newest checkpoint is of {saved}")


def _compare_metrics(run_dir: Path, entries: list[Entry], verdict: Verdict, *, is_whole: bool) -> None:
    """See that the figures of the steps are there, and that the step whose came last is in the ledger.

    Only a run that never was killed (`is_whole`) has every step's: they reach the driver a moment after the step.
    """
    steps = read_steps(run_dir / "metrics.jsonl")
    learned = {entry.step + 1 for entry in surviving(entries) if entry.event == "learned"}
    if gone := sorted(learned - steps.keys()) if is_whole or not steps else []:
        verdict.missing.append(f"metrics.jsonl: the figures of versions {_some(gone)} are not known")
    newest = next(reversed(steps), 0)
    if (
        newest
        and _given_up(entries) is None
        and not any(e.event == "learned" and e.step == newest - 1 for e in entries)
    ):
        verdict.disagreeing.append(
            f"metrics.jsonl: has version {newest}, the ledger nothing learned in step {newest - 1}"
        )


def describe(verdict: Verdict, run_dir: Path) -> str:
    """Return a verdict as text."""
    counts = ", ".join(f"{name} {number}" for name, number in verdict.counts.items())
    lines = [
        f"{run_dir}: {verdict.steps} steps, {counts}, unfinished {len(verdict.unfinished)}, "
        f"rollbacks {verdict.rollbacks}",
        *(
            f"  {name:<10} {len(groups)}" + (f": groups {_some(groups)}" if groups else "")
            for name, groups in (
                ("lost", verdict.lost),
                ("duplicated", verdict.duplicated),
                ("over-stale", verdict.over_stale),
                ("replayed wrongly", verdict.misreplayed),
            )
        ),
        *(f"  disagrees: {line}" for line in verdict.disagreeing),
        *(f"  missing: {line}" for line in verdict.missing),
        *(f"  not of the run, left alone: {line}" for line in verdict.strays),
    ]
    return "\n".join(lines)


def _some(groups: list[int]) -> str:
    shown = ", ".join(map(str, groups[:20]))
    return shown + (f" and {len(groups) - 20} more" if len(groups) > 20 else "")
