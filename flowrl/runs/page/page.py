"""The report of a run as one HTML file that needs nothing but itself: no network, no fonts, no libraries.

Invariants:
- whatever a run holds is escaped by the template engine;
- the page's own policy lets no script run but the one that is in this package, by its hash;
- what a run does not have is left out and said under "Not in this report";
- the size is bounded by the limits of charts.py, activity.py and samples.py, however long the run was.

What only the layers above know (the ledger, the tuner's advice, the tokenizer) comes in as a `Subject`. Called by
`flowrl report`.

Tests: tests/unit/runs/page/test_page.py
"""

from __future__ import annotations

import base64
import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.errors import printable
from flowrl.runs.page import figures
from flowrl.runs.page.activity import MOST_ROWS, Record, node_strips, queue_strips
from flowrl.runs.page.samples import MOST_TOKENS, RATIO_BOUNDS, has_ratios, shown_groups
from flowrl.telemetry.charts import duration_ticks
from flowrl.telemetry.events import Cause, Span
from flowrl.telemetry.files import new_file
from flowrl.telemetry.report import bottleneck
from flowrl.telemetry.view import format_duration, words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flowrl.runs.page.samples import Pieces, ShownGroup
HERE = Path(__file__).parent
STACKED = (
    Cause.COMPUTE, Cause.UPDATE, Cause.WAIT_INPUT, Cause.WAIT_ROOM, Cause.WAIT_DEVICES, Cause.RECOVERY, Cause.START,
)  # fmt: skip


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A run, and what is known of it besides its events."""

    run_dir: Path
    condition: str  # "finished" | "running" | ...: one word or a few
    is_sound: bool = True  # whether that is how it should be
    failure: str = ""  # the error that ended it
    resume: str = ""  # command that goes on from its newest checkpoint
    nodes: list[str] = []  # of its graph, in order
    edges: list[tuple[str, ...]] = []  # kind, from, to, bounds
    settings: list[tuple[str, str]] = []  # path and value
    totals: dict[str, int] = {}  # groups admitted, learned, filtered, failed, unfinished
    reasons: list[tuple[str, str, int]] = []  # of groups not learned: ending, reason, count
    verdict: list[str] = []  # what `flowrl verify` finds
    advice: list[str] = []  # of the simulator or the tuner
    has_generator: bool = True  # whether rollouts and weight updates are to be expected


def write_page(path: Path, subject: Subject, pieces: Pieces | None) -> None:
    """Write a run's page, whole or not at all; `pieces` gives the text of each token."""
    text = page(subject, pieces)
    with new_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def page(subject: Subject, pieces: Pieces | None) -> str:
    """Return a run's page."""
    record = Record(subject.run_dir, nodes=subject.nodes)
    groups = shown_groups(subject.run_dir, pieces)
    return rendered("page.html", subject=subject, **_contents(subject, record, groups, has_text=pieces is not None))


def rendered(template: str, **contents: Any) -> str:
    """Return a page of this package, with the style and the script that they share."""
    import jinja2

    style, script = (HERE / "page.css").read_text(), (HERE / "page.js").read_text()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **contents,
    )


def _shown(value: Any) -> Any:
    """Return what is printed of a value: of text that is no markup of ours, control characters are written out."""
    return printable(value) if type(value) is str else value


def _contents(subject: Subject, record: Record, groups: list[ShownGroup], *, has_text: bool) -> dict[str, Any]:
    activity = record.activity
    curated, rest = figures.step_charts(record.steps)
    heldout = figures.heldout(record.evaluations)
    return {
        "name": subject.run_dir.name,
        "tiles": figures.tiles(record, heldout),
        "about": _about(record),
        "missing": [*_missing(subject, record, groups, has_text=has_text)],
        "limits": [*_limits(record, groups)],
        "heldout": heldout,
        "charts": curated,
        "more_charts": rest,
        "staleness": figures.staleness_bars(record.steps),
        "steps": figures.step_table(record.steps),
        "strips": node_strips(activity, _ordered(subject.nodes, activity.nodes.names), STACKED),
        "queues": queue_strips(activity, record.queues),
        "causes": [(cause.value, words(cause)) for cause in STACKED],
        "time_ticks": duration_ticks(activity.end_s),
        "starts": [100 * at / activity.end_s for at in activity.starts_s[1:] if activity.end_s],
        "pauses": figures.pause_charts(activity),
        "bottleneck": bottleneck(record.view),
        "groups": groups,
        "has_ratios": has_ratios(groups),
        "ratio_bounds": RATIO_BOUNDS,
        "notices": list(record.notices),
        "num_notices": record.num_notices,
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _ordered(known: list[str], seen: list[str]) -> list[str]:
    return [*(name for name in known if name in seen), *(name for name in seen if name not in known)]


def _about(record: Record) -> str:
    step = record.last_step
    parts = [f"{step.version} of {step.num_steps} steps" if step else "no step"]
    parts.append(f"{format_duration(record.elapsed_s)} of run time")
    if record.num_starts > 1:
        parts.append(f"{record.num_starts} starts")
    if record.began_s:
        parts.append(f"begun {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(record.began_s))}")
    return ", ".join(parts)


def _missing(subject: Subject, record: Record, groups: list[ShownGroup], *, has_text: bool) -> Iterator[str]:
    """Say what the page ought to show and cannot, with the reason."""
    if not record.steps:
        yield "figures over time: no step has been learned"
    if not record.evaluations:
        yield "held-out scores: nothing was evaluated (data.num_heldout, evaluation)"
    elif len(record.evaluations) == 1:
        yield "a held-out change: only one version was evaluated"
    if not record.has_timeline:
        yield "time by cause, queues and weight updates: there is no timeline.json"
    elif not record.has_causes or not record.has_fill or not record.counts[Span]:
        yield "some of time by cause, queues and weight updates: the timeline does not reach so far"
    if not subject.has_generator:
        yield "rollouts, staleness and weight updates: this graph learns from given examples and samples nothing"
    elif not groups:
        yield "rollouts: none were recorded (no step was learned, or learner.save_rollouts=false)"
    elif not has_text:
        yield "the text of tokens: no tokenizer of the model is at hand, so they are shown by number"
    if not subject.totals:
        yield "the ledger's totals: there is none that can be read"
    if not subject.advice:
        yield "advice: there is no profile.json (a run writes it at its end, after two steps)"


def _limits(record: Record, groups: list[ShownGroup]) -> Iterator[str]:
    """Say where the page shows less than there is."""
    yield "queue fill and causes of time are as reported about once a second, so what is shorter does not show"
    for what, names in (("nodes", record.activity.nodes.names), ("queues", record.queues)):
        if len(names) > MOST_ROWS:
            yield f"{what}: the first {MOST_ROWS} of {len(names)}"
    if record.num_notices > len(record.notices):
        yield f"notices: the newest {len(record.notices)} of {record.num_notices}"
    if len(record.steps) > figures.MOST_TABLE_ROWS:
        yield f"the table of steps has {figures.MOST_TABLE_ROWS} of {len(record.steps)}, evenly spread"
    if any(sample.num_left_out for group in groups for sample in group.samples):
        yield f"rollouts: the first {MOST_TOKENS} tokens of each"
