"""The learning figures of a run as charts, tables and tiles of the page: pure functions of its steps and evaluations.

Called by page.py.

Tests: tests/unit/runs/page/test_page.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from flowrl.runs.page.samples import evenly
from flowrl.telemetry.charts import Chart, line_chart, number
from flowrl.telemetry.intervals import Interval, mean_interval, paired_interval, prompt_means
from flowrl.telemetry.report import verdict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flowrl.runs.page.activity import Activity, Record
    from flowrl.telemetry.charts import Points
    from flowrl.telemetry.events import Evaluation, Step

MOST_TABLE_ROWS = 60
MOST_MORE = 24  # charts besides the curated ones
MOST_COMPLETIONS = 3
CHARACTERS = 600  # of a held-out prompt or completion

CURATED: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (  # title; (metric, name of its line)
    ("Reward", (("reward.mean", "mean of a step"),)),
    ("KL to the reference, nats", (("kl", "kl"),)),
    ("Response length, tokens", (("response_tokens.mean", "mean of a step"),)),
    ("Staleness, policy versions", (("staleness.mean", "mean"), ("staleness.max", "greatest"))),
    ("Loss", (("loss", "training"), ("heldout.loss", "held-out"))),
    ("Accuracy", (("accuracy", "training"), ("heldout.accuracy", "held-out"))),
    ("Effective sample size, share", (("ess", "ess"),)),
    ("Clipped tokens, share", (("clip_frac_low", "from below"), ("clip_frac_high", "from above"))),
)
SCORES = "score."  # what the metrics of a reward's parts begin with


class Heldout(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out scores before, after and between."""

    about: str
    rows: list[tuple[str, str, str]]  # version, mean, interval
    verdict: str
    change: Interval | None
    last: Interval
    chart: Chart | None
    completions: list[tuple[str, list[tuple[str, str, str]]]]  # prompt; version, score, text


def step_charts(steps: Mapping[int, Step]) -> tuple[list[Chart], list[Chart]]:
    """Return the charts everybody wants to see, and those of every other figure."""
    points: dict[str, Points] = {}
    for version in sorted(steps):
        for name, value in steps[version].metrics.items():
            points.setdefault(name, []).append((version, value))
    used = {metric for _, lines in CURATED for metric, _ in lines}
    curated = [line_chart(title, {name: points[m] for m, name in lines if m in points}) for title, lines in CURATED]
    parts = {name.removeprefix(SCORES): series for name, series in points.items() if name.startswith(SCORES)}
    if len(parts) > 1:
        curated.insert(1, line_chart("Parts of the reward", parts))
    used |= {SCORES + name for name in parts}
    rest = [line_chart(name, {name: points[name]}) for name in sorted(points) if name not in used]
    return [c for c in curated if c is not None], [c for c in rest if c is not None][:MOST_MORE]


def step_table(steps: Mapping[int, Step]) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows of a table of every figure."""
    names = list(dict.fromkeys(name for step in steps.values() for name in step.metrics))
    rows = [
        [str(version), *(number(steps[version].metrics[n]) if n in steps[version].metrics else "" for n in names)]
        for version in evenly(sorted(steps), MOST_TABLE_ROWS)
    ]
    return ["version", *names], rows


def staleness_bars(steps: Mapping[int, Step]) -> list[tuple[str, int, float]]:
    """Return (policy versions, learned groups, their percentage) of the history that survived."""
    counts: dict[int, int] = {}
    for step in steps.values():
        for age in step.staleness:
            counts[age] = counts.get(age, 0) + 1
    total = sum(counts.values())
    return [(str(age), count, 100 * count / total) for age, count in sorted(counts.items())]


def heldout(evaluations: Mapping[int, Evaluation]) -> Heldout | None:
    """Return the held-out scores, or None where nothing was evaluated."""
    scored = [evaluations[version] for version in sorted(evaluations) if prompt_means(evaluations[version].scores)]
    if not scored:
        return None
    first, last = scored[0], scored[-1]
    found = {each.version: mean_interval(prompt_means(each.scores)) for each in scored}
    change = paired_interval(first.scores, last.scores) if last is not first else None
    shown = [first, last] if last is not first else [first]
    rows = [(f"version {each.version}", number(found[each.version].mean), ends(found[each.version])) for each in shown]
    if change is not None:
        rows.append(("change", f"{change.mean:+.4g}", ends(change, "+")))
    for name, scores in last.sets.items():
        further = mean_interval(prompt_means(scores))
        rows.append((f"{name}, version {last.version}", number(further.mean), ends(further)))
        moved = paired_interval(first.sets.get(name, []), scores) if last is not first else None
        if moved is not None:
            rows.append((f"{name}, change", f"{moved.mean:+.4g}", ends(moved, "+")))
    for name, bounds in last.tasks.items():
        between = "" if bounds.low is None or bounds.high is None else f"{bounds.low:.4g} to {bounds.high:.4g}"
        rows.append((f"{name}, version {last.version}", number(bounds.value), between))
    says = verdict(change) if change is not None else ""
    if last is not first and change is None:
        says = "the two were not scored on the same prompts: no paired change"
    chart = None
    if len(scored) > 1:
        points: Points = [(version, interval.mean) for version, interval in found.items()]
        widths: dict[float, float] = {version: interval.half_width for version, interval in found.items()}
        name = "mean over prompts"
        chart = line_chart("Held-out score with 95 % intervals", {name: points}, half_widths={name: widths})
    return Heldout(
        about=f"{len(first.scores)} prompts, {len(first.scores[0])} samples each; 95 % t intervals over prompt means",
        rows=rows,
        verdict=says,
        change=change,
        last=found[last.version],
        chart=chart,
        completions=_completions(shown),
    )


def ends(interval: Interval, sign: str = "") -> str:
    """Return where an interval begins and ends."""
    if math.isinf(interval.half_width):
        return "one prompt: no interval"
    return f"{interval.low:{sign}.4g} to {interval.high:{sign}.4g}"


def _completions(shown: list[Evaluation]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    found: list[tuple[str, list[tuple[str, str, str]]]] = []
    for row in shown[0].completions[:MOST_COMPLETIONS]:
        prompt = row.get("prompt", "")
        said = [
            (f"version {each.version}", other.get("reward", "?"), cut(other.get("completion", "")))
            for each in shown
            for other in each.completions
            if other.get("prompt", "") == prompt
        ]
        found.append((cut(prompt), said))
    return found


def cut(text: str) -> str:
    """Return a text of at most `CHARACTERS`, its middle left out."""
    return text if len(text) <= CHARACTERS else text[: CHARACTERS // 2] + " ... " + text[-CHARACTERS // 2 :]


def pause_charts(activity: Activity) -> list[Chart]:
    """Return what each new version cost the generators, and how long it was on its way."""
    versions = sorted(activity.pauses)
    paused = line_chart(
        "Pause of a generator, s", {"longest of the generators": [(v, activity.pauses[v].pause_s) for v in versions]}
    )
    on_the_way: dict[str, Points] = {
        "published and acknowledged": sorted(activity.published_s.items()),
        "received, longest": [(v, activity.pauses[v].transfer_s) for v in versions],
    }
    sent = line_chart("A version on its way, s", on_the_way, note="version 0 waits for the generators to start")
    return [chart for chart in (paused, sent) if chart is not None]


def tiles(record: Record, scores: Heldout | None) -> list[tuple[str, str, str]]:
    """Return the few figures on top: what, how much, and a remark."""
    found: list[tuple[str, str, str]] = []
    if scores is not None and scores.change is not None:
        found.append(("held-out change", f"{scores.change.mean:+.3g}", ends(scores.change, "+")))
    elif scores is not None:
        found.append(("held-out score", f"{scores.last.mean:.3g}", ends(scores.last)))
    versions = sorted(record.steps)
    for label, metric in (("reward", "reward.mean"), ("loss", "loss")):
        series = [record.steps[v].metrics[metric] for v in versions if metric in record.steps[v].metrics]
        if series:
            found.append((f"{label} of the last step", f"{series[-1]:.3g}", f"first step {series[0]:.3g}"))
            break
    tokens, samples = record.view.steady_per_s("tokens"), record.view.steady_per_s("samples")
    if tokens is not None and samples is not None:
        found.append(("learned per second", f"{tokens:,.3g} tokens", f"{samples:,.3g} samples"))
    if record.view.staleness:
        total = sum(record.view.staleness.values())
        mean = sum(age * count for age, count in record.view.staleness.items()) / total
        found.append(("staleness, versions", f"{mean:.2f}", f"greatest {max(record.view.staleness)}"))
    return found
