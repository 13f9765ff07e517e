"""Verify a run from its own files: nothing lost, nothing learned twice, nothing staler than the bound.

The ledger says what became of every group in the history that survived; the settings say how stale a sample may be;
the recorded rollouts say, apart from the ledger, which groups each step was trained on. Called by `flowrl verify`, and
by the tests after every simulated schedule.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowrl.errors import DataError
from flowrl.runtime.ledger import ENDINGS, Entry, read_entries, surviving
from flowrl.telemetry.rollouts import read_groups, step_of

if TYPE_CHECKING:
    from pathlib import Path


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
    disagreeing: list[str] = field(default_factory=list[str])  # where the recorded rollouts say something else

    @property
    def is_clean(self) -> bool:
        """Return whether every guarantee holds."""
        return not (self.lost or self.duplicated or self.over_stale or self.misreplayed or self.disagreeing)


def judge(entries: list[Entry], *, max_staleness: int | None, is_finished: bool, max_age: int | None = None) -> Verdict:
    """Return what a ledger's entries prove; `max_age` is the greatest staleness of a replayed group."""
    alive = surviving(entries)
    admitted = {entry.group for entry in alive if entry.event == "admitted"}
    endings = Counter(entry.group for entry in alive if entry.event in ENDINGS)
    learned = [entry for entry in alive if entry.event == "learned"]
    unfinished = sorted(admitted - endings.keys())
    left_out = sorted(set(range(max(admitted, default=-1) + 1)) - admitted)
    stale = [e.group for e in learned if max_staleness is not None and e.step - e.oldest > max_staleness]
    counts = Counter(entry.event for entry in alive)
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
    )


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
    """Judge a run's ledger and hold it against the rollouts that were recorded.

    Raises:
        DataError: the directory holds no run, or its ledger is damaged.
    """
    import yaml

    entries = read_entries(run_dir / "ledger.jsonl")
    try:
        settings = yaml.safe_load((run_dir / "settings.yaml").read_text())
    except OSError as error:
        raise DataError(str(run_dir / "settings.yaml"), f"cannot be read ({error.strerror})") from error
    steps = settings.get("steps")
    learned = {entry.step for entry in surviving(entries) if entry.event == "learned"}
    verdict = judge(
        entries,
        max_staleness=settings.get("max_staleness"),
        is_finished=steps == len(learned),
        max_age=settings.get("replay", {}).get("max_age"),
    )
    verdict.disagreeing = _compare(run_dir / "rollouts", entries)
    return verdict


def _compare(directory: Path, entries: list[Entry]) -> list[str]:
    """Return the steps whose recorded groups are not those of the ledger."""
    by_step: dict[int, set[int]] = defaultdict(set)
    for entry in surviving(entries):
        if entry.event == "learned":
            by_step[entry.step].add(entry.group)
    wrong: list[str] = []
    for path in sorted(directory.glob("step-*.parquet")):
        step = step_of(path)
        recorded = read_groups(path)
        if step in by_step and recorded != by_step[step]:
            odd = sorted(recorded ^ by_step[step])
            wrong.append(f"step {step}: groups {odd} are in one of ledger and {path.name} only")
    return wrong


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
        *(f"  {line}" for line in verdict.disagreeing),
    ]
    return "\n".join(lines)


def _some(groups: list[int]) -> str:
    shown = ", ".join(map(str, groups[:20]))
    return shown + (f" and {len(groups) - 20} more" if len(groups) > 20 else "")
