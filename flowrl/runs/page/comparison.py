"""Several runs side by side as one HTML file that needs nothing but itself: `flowrl compare RUN RUN ...`.

Curves, held-out scores with their intervals, the settings that differ, and what each run answered to the same prompts.

Invariants:
- as of the report (page.py);
- a difference of held-out scores is taken prompt by prompt only where both runs were asked the same prompts, and is
  left out elsewhere;
- nothing in a run's directory is changed.

Tests: tests/unit/runs/page/test_comparison.py
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.config import redacted
from flowrl.errors import ConfigError, DataError, number_of, shortened
from flowrl.runs.page import figures
from flowrl.runs.page.activity import Record
from flowrl.runs.page.page import rendered
from flowrl.runs.review import flattened
from flowrl.runtime.rundir import existing_run, read_plan, read_settings
from flowrl.telemetry.charts import Chart, line_chart, number
from flowrl.telemetry.files import new_file
from flowrl.telemetry.intervals import mean_interval, paired_interval, prompt_means
from flowrl.telemetry.report import verdict
from flowrl.telemetry.view import format_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from flowrl.telemetry.charts import Points
    from flowrl.telemetry.events import Evaluation

MOST_RUNS = 6  # lines that can be told apart
MOST_SAMPLES = 6  # prompts whose answers are shown
ASKED_BY = ("data", "seed", "evaluation")  # settings that say which prompts are held out, and how they are scored
UNSAID = "-"


class Compared(msgspec.Struct, frozen=True):
    """One of the runs."""

    name: str
    record: Record
    settings: dict[str, str]  # by path

    @property
    def scored(self) -> list[Evaluation]:
        """Return its evaluations, oldest first."""
        found = self.record.evaluations
        return [found[version] for version in sorted(found) if prompt_means(found[version].scores)]


class Differences(msgspec.Struct, frozen=True):
    """Held-out scores of the runs."""

    chart: Chart | None
    rows: list[tuple[str, str, str]]  # which two, the difference of their last evaluations, its interval
    says: list[str]


def compare(runs: Sequence[Path], out: Path, say: Callable[[str], None]) -> None:
    """Write the page and say a short table.

    Raises:
        ConfigError: there are too few or too many runs, one is none, or `out` cannot be written.
    """
    if not 2 <= len(runs) <= MOST_RUNS:
        raise ConfigError("flowrl compare", f"{number_of(len(runs), 'run')} given", f"name 2 to {MOST_RUNS}")
    directories = [existing_run(run).resolve() for run in runs]
    if len(set(directories)) < len(directories):
        raise ConfigError("flowrl compare", "a run is named twice", "name different ones")
    names = [each.name for each in directories]
    if len(set(names)) < len(names):
        names = [f"{each.parent.name}/{each.name}" for each in directories]
    compared = [_read(name, directory) for name, directory in zip(names, directories, strict=True)]
    rows = table(compared)
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    try:
        with new_file(out) as aside:
            aside.write_text(page(compared), encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(out), f"cannot be written ({error.strerror})", "choose another --out") from error
    say(f"written: {out} ({out.stat().st_size / 1024:,.0f} KiB)")


def _read(name: str, directory: Path) -> Compared:
    settings = dict(flattened(redacted(read_settings(directory / "settings.yaml"))))
    record = Record(directory, nodes=list(read_plan(directory).nodes))
    if not record.steps and not record.evaluations:
        raise DataError(str(directory), "has neither learned nor evaluated anything yet", "name a run that has")
    return Compared(name, record, settings)


def page(runs: list[Compared]) -> str:
    """Return the page of a comparison."""
    charts, more = step_charts(runs)
    return rendered(
        "comparison.html",
        names=[run.name for run in runs],
        table=table(runs),
        heldout=heldout(runs),
        charts=charts,
        more_charts=more,
        settings=differing(runs),
        samples=samples(runs),
        missing=[*_missing(runs)],
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )


def table(runs: list[Compared]) -> list[list[str]]:
    """Return the head and a row for each run."""
    rows = [["run", "steps", "time", "last reward", "held-out, last [95 % interval]", "change since the first"]]
    for run in runs:
        steps, scored = run.record.steps, run.scored
        reward = steps[max(steps)].metrics.get("reward.mean") if steps else None
        last = mean_interval(prompt_means(scored[-1].scores)) if scored else None
        change = paired_interval(scored[0].scores, scored[-1].scores) if len(scored) > 1 else None
        rows.append(
            [
                shortened(run.name, 60),
                str(max(steps, default=0)),
                format_duration(run.record.elapsed_s),
                UNSAID if reward is None else number(reward),
                UNSAID if last is None else f"{number(last.mean)} [{figures.ends(last)}]",
                UNSAID if change is None else f"{change.mean:+.4g} [{figures.ends(change, '+')}]",
            ]
        )
    return rows


def step_charts(runs: list[Compared]) -> tuple[list[Chart], list[Chart]]:
    """Return the charts everybody wants to see with a line for each run, and those of every other figure."""
    points: dict[str, dict[str, Points]] = {}
    for run in runs:
        for version in sorted(run.record.steps):
            for metric, value in run.record.steps[version].metrics.items():
                points.setdefault(metric, {}).setdefault(run.name, []).append((version, value))
    wanted = {metric: title for title, lines in figures.CURATED for metric, _ in lines[:1]}
    curated = [_chart(title, points[metric], runs) for metric, title in wanted.items() if metric in points]
    rest = [_chart(metric, points[metric], runs) for metric in sorted(points) if metric not in wanted]
    return [c for c in curated if c is not None], [c for c in rest if c is not None][: figures.MOST_MORE]


def _chart(title: str, points: dict[str, Points], runs: list[Compared], **more: Any) -> Chart | None:
    """Return a chart in which every run keeps its colour, whether it has the figure or not."""
    chart = line_chart(title, points, **more)
    if chart is None:
        return None
    known = {line.name: line for line in chart.lines}
    empty = msgspec.structs.replace(
        chart.lines[0], path="", last=UNSAID, values=[None] * len(chart.places), whiskers=""
    )
    lines = [known.get(run.name, msgspec.structs.replace(empty, name=run.name)) for run in runs]
    return msgspec.structs.replace(chart, lines=lines)


def heldout(runs: list[Compared]) -> Differences | None:
    """Return the held-out scores and how the last ones differ from the first run's; None where none was evaluated."""
    scored = {run.name: run.scored for run in runs if run.scored}
    if not scored:
        return None
    found = {
        name: {each.version: mean_interval(prompt_means(each.scores)) for each in evaluations}
        for name, evaluations in scored.items()
    }
    points: dict[str, Points] = {
        name: [(version, interval.mean) for version, interval in each.items()] for name, each in found.items()
    }
    widths = {name: {version: i.half_width for version, i in each.items()} for name, each in found.items()}
    chart = _chart("Held-out score with 95 % intervals", points, runs, half_widths=widths)
    rows: list[tuple[str, str, str]] = []
    says: list[str] = []
    first, *others = [run for run in runs if run.scored]
    for other in others:
        which = f"{other.name} - {first.name}"
        apart = _same_prompts(first, other)
        change = paired_interval(first.scored[-1].scores, other.scored[-1].scores)
        if apart or change is None:
            says.append(
                f"{which}: not the same prompts ({apart or 'another number'}), so there is no paired difference."
            )
            continue
        rows.append((which, f"{change.mean:+.4g}", figures.ends(change, "+")))
        says.append(f"{which}, paired by prompt: {verdict(change)}.")
    return Differences(chart, rows, says)


def _same_prompts(one: Compared, other: Compared) -> str:
    """Return the first setting by which two runs were asked or scored otherwise; "" where there is none."""
    paths = sorted({*one.settings, *other.settings})
    asked = [path for path in paths if path.split(".")[0] in ASKED_BY or path in ("reward.function",)]
    differ = [path for path in asked if one.settings.get(path) != other.settings.get(path)]
    return next((path for path in differ if not path.startswith(("data.num_train", "evaluation.beside"))), "")


def differing(runs: list[Compared]) -> list[tuple[str, list[str]]]:
    """Return the settings that are not the same in all runs, each run's by its place."""
    paths = dict.fromkeys(path for run in runs for path in run.settings)
    found = [(path, [run.settings.get(path, UNSAID) for run in runs]) for path in paths]
    return [(path, values) for path, values in found if len(set(values)) > 1]


def samples(runs: list[Compared]) -> list[tuple[str, list[tuple[int, str, int, str, str]]]]:
    """Return what the runs answered last to prompts that two or more of them were asked."""
    found: dict[str, list[tuple[int, str, int, str, str]]] = {}
    for place, run in enumerate(runs):
        for row in run.scored[-1].completions if run.scored else []:
            said = (place, run.name, run.scored[-1].version, row.get("reward", "?"), row.get("completion", ""))
            found.setdefault(row.get("prompt", ""), []).append((*said[:4], figures.cut(said[4])))
    shared = [(figures.cut(prompt), said) for prompt, said in found.items() if len(said) > 1]
    return shared[:MOST_SAMPLES]


def _missing(runs: list[Compared]) -> Iterator[str]:
    if unscored := [run.name for run in runs if not run.scored]:
        yield f"held-out scores of {', '.join(unscored)}: nothing was evaluated"
    if not samples(runs):
        yield "samples side by side: no two runs answered the same held-out prompt"
    if not any(run.record.steps for run in runs):
        yield "curves: no step has been learned"
