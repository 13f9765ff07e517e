"""The run on the terminal: a live view of it, or plain lines where standard output is no terminal.

`LiveView` is redrawn in place. On top the step, the learner's figures, elapsed time and the estimate of the end; then a
row for each replica with what it does now, the shares of its time so far, groups done and their rate, requests in
flight and policy version; then how full each queue is, and the newest hint. Other notices scroll by above it. `frame`
draws a view, a pure function. A frame is drawn on the event loop when events arrive, and only the clock line by rich's
refreshing thread, so the view is never read while it changes.

`PlainLines` has one line for each step, notice and evaluation. While replicas are starting it says so every
`WAIT_LINE_S` seconds, and where nothing else was to say for `QUIET_LINE_S` what every node is at. A graph that trains
nothing has no steps, and a large model's are long. Fed by `Sinks` after the view.

Tests: tests/unit/telemetry/test_live.py
"""

from __future__ import annotations

import contextlib
from collections import Counter
from statistics import fmean
from typing import TYPE_CHECKING

from flowrl.errors import one_line, printable
from flowrl.telemetry import clock
from flowrl.telemetry.events import HINT, Cause, Evaluation, Notice, Step
from flowrl.telemetry.intervals import mean_interval, prompt_means
from flowrl.telemetry.view import format_duration, shares, words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console, RenderableType
    from rich.text import Text

    from flowrl.telemetry.events import Event
    from flowrl.telemetry.view import ReplicaView, RunView


WAIT_LINE_S = 10.0  # rare enough not to fill a log, often enough to show that the run is alive
QUIET_LINE_S = 60.0


class PlainLines:
    """Says what happens, a line at a time."""

    def __init__(self, view: RunView, *, say: Callable[[str], None]) -> None:
        self._view = view
        self._write = say
        self._said_s: float | None = None  # the last line, by the view's clock

    def consume(self, events: list[Event]) -> None:
        """Say a line for each step, evaluation and notice."""
        for event in events:
            match event:
                case Step():
                    self._say(step_line(event, self._view))
                case Evaluation():
                    self._say(evaluation_line(event))
                case Notice():
                    self._say(notice_line(event))
                case _:
                    pass
        self._say_state()

    def close(self) -> None:
        """Nothing to release."""

    def _say(self, line: str) -> None:
        self._said_s = self._view.now_s
        self._write(line)

    def _say_state(self) -> None:
        now_s = self._view.now_s
        starting = self._view.starting(now_s)
        if self._said_s is None and not starting:
            self._said_s = now_s
        elif self._said_s is None or now_s - self._said_s >= (WAIT_LINE_S if starting else QUIET_LINE_S):
            self._say(one_line(starting or state_line(self._view)))


def state_line(view: RunView) -> str:
    """Return `generator: 88 done, 128 running; writer: 0 done, waiting for input`, in groups and samples."""
    parts: list[str] = []
    for node in view.nodes:
        replicas = [replica for replica in view.replicas if replica.node == node]
        running = sum(replica.running for replica in replicas)
        causes = Counter(replica.cause for replica in replicas)
        doing = f"{running} running" if running else words(causes.most_common(1)[0][0])
        parts.append(f"{node}: {sum(replica.done for replica in replicas)} done, {doing}")
    return "; ".join(parts)


def step_line(step: Step, view: RunView) -> str:
    """Return `step 12/40 reward 0.31 kl 0.012 staleness 0.8 tok/s 310 eta 3m10s`, without what is not known."""
    parts = [f"step {step.version}/{step.num_steps}"]
    for name, metric, form in (
        ("reward", "reward.mean", ".3f"),
        ("kl", "kl", ".4f"),
        ("loss", "loss", ".4f"),
        ("staleness", "staleness.mean", ".1f"),
    ):
        if metric in step.metrics:
            parts.append(f"{name} {step.metrics[metric]:{form}}")
    tokens_per_s = view.recent_per_s("tokens")
    if tokens_per_s is not None:
        parts.append(f"tok/s {tokens_per_s:,.0f}")
    if view.remaining_s and view.last_step is not None and step.version == view.last_step.version:
        parts.append(f"eta {format_duration(view.remaining_s)}")
    return " ".join(parts)


def evaluation_line(evaluation: Evaluation) -> str:
    """Return `held-out score 0.312 +- 0.041 (64 prompts) at version 0`, and further sets and benchmarks by name."""
    means = prompt_means(evaluation.scores)
    if not means and not evaluation.sets and not evaluation.tasks:
        return f"held-out score: no prompts at version {evaluation.version}"
    told = {"held-out score": means, **{name: prompt_means(scores) for name, scores in evaluation.sets.items()}}
    parts = [f"{one_line(name)} {_mean_of(each)}" for name, each in told.items() if each]
    parts += [f"{one_line(name)} {bounds.said()} ({bounds.num} items)" for name, bounds in evaluation.tasks.items()]
    return f"{', '.join(parts)} at version {evaluation.version}"


def _mean_of(means: list[float]) -> str:
    interval = mean_interval(means)
    spread = f" +- {interval.half_width:.3f}" if interval.num > 1 else ""
    return f"{interval.mean:.3f}{spread} ({interval.num} prompts)"


def notice_line(notice: Notice) -> str:
    """Return `warning: learner.0: text`; an ordinary notice goes without its level."""
    level = "" if notice.level == "info" else f"{notice.level}: "
    return one_line(f"{level}{notice.where}: {notice.text}")


MAX_ROWS = 16  # replicas shown one by one; beyond, the replicas of a node share a row
HINT_LINES = 4  # that the longest hint takes in 80 columns
FULL = 0.9  # a queue at this part of its depth is drawn as full
STYLES: dict[str, str] = {
    Cause.COMPUTE: "green",
    Cause.UPDATE: "cyan",
    Cause.WAIT_ROOM: "magenta",
    Cause.WAIT_INPUT: "yellow",
    Cause.WAIT_DEVICES: "magenta",
    Cause.START: "blue",
    Cause.RECOVERY: "red",
}


class LiveView:
    """Shows the view in the terminal until it is closed."""

    def __init__(
        self, view: RunView, *, title: str, console: Console | None = None, now: Callable[[], float] = clock.now,
        since_s: float | None = None,
    ) -> None:  # fmt: skip
        """Begin to show the view; the run is said to have begun at `since_s`, by default now."""
        from rich.console import Console
        from rich.live import Live

        self._view = view
        self._title = title
        self._now = now
        self._opened_s = now() if since_s is None else since_s
        self.console = console or Console()
        self._body = frame(view, now_s=now(), max_rows=self.max_rows())
        self._live = Live(console=self.console, get_renderable=self._screen, refresh_per_second=2)
        self._live.start()

    def consume(self, events: list[Event]) -> None:
        """Print notices and evaluations above the frame and draw the frame anew."""
        for event in events:
            if isinstance(event, Notice) and event.where != HINT:
                style = {"error": "red", "warning": "yellow"}.get(event.level)
                self.console.print(notice_line(event), style=style, markup=False, highlight=False)
            elif isinstance(event, Evaluation):
                self.console.print(evaluation_line(event), markup=False, highlight=False)
        self._body = frame(self._view, now_s=self._now(), max_rows=self.max_rows())

    def say(self, line: str) -> None:
        """Print a line above the frame."""
        with contextlib.suppress(OSError):  # the terminal is gone
            self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)  # it may be a command

    def close(self) -> None:
        """Leave the last frame on the screen."""
        self._live.stop()

    def _screen(self) -> RenderableType:
        from rich.console import Group

        return Group(clock_line(self._title, self._now() - self._opened_s), self._body)

    def max_rows(self) -> int:
        """Return how many rows of replicas the terminal has room for."""
        hint = 1 + HINT_LINES if self._view.hint else 0
        return max(4, min(MAX_ROWS, self.console.height - len(self._view.edges) - 9 - hint))


def clock_line(title: str, elapsed_s: float) -> Text:
    """Draw the line above the frame: the run and how long it has been going."""
    from rich.text import Text

    return Text(
        f"{one_line(title)}  {format_duration(elapsed_s)} elapsed", style="bold", overflow="ellipsis", no_wrap=True
    )


def frame(view: RunView, *, now_s: float, max_rows: int = MAX_ROWS) -> RenderableType:
    """Draw a view: figures, replicas, queues."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_figures(view, now_s)]
    if starting := view.starting(now_s):
        parts.append(Text(one_line(starting), style="blue"))
    if view.replicas:
        parts += ["", _replica_table(view.replicas, max_rows)]
    if view.edges:
        parts += ["", _edge_table(view)]
    if view.hint:
        parts += ["", Text(f"hint: {one_line(view.hint)}", style="cyan")]
    return Group(*parts)


def _figures(view: RunView, now_s: float) -> Text:
    """Draw the step's figures; those that a run does not have are left out."""
    from rich.text import Text

    step = view.last_step
    if step is None:
        return Text("no step learned yet", style="dim")
    line = Text(f"step {step.version}/{step.num_steps}", style="bold")
    for name, metric, form in (("reward", "reward.mean", ".3f"), ("KL", "kl", ".4f"), ("loss", "loss", ".4f")):
        if metric in step.metrics:
            line.append(f"   {name} {step.metrics[metric]:{form}}", style="not bold")
    if "staleness.mean" in step.metrics:
        greatest = max(view.staleness, default=0)
        line.append(f"   staleness {step.metrics['staleness.mean']:.1f} (max {greatest})", style="not bold")
    tokens_per_s = view.recent_per_s("tokens")
    if tokens_per_s is not None:
        line.append(f"   {tokens_per_s:,.0f} tokens/s", style="not bold")
    if view.remaining_s:
        left_s = max(0.0, view.remaining_s - (now_s - step.time_s))
        line.append(f"   about {format_duration(left_s)} to go", style="not bold")
    if view.evaluations:
        line.append(f"\n{evaluation_line(view.evaluations[max(view.evaluations)])}", style="not bold")
    if view.num_warnings:
        line.append(f"   warnings: {view.num_warnings}", style="yellow")
    return line


def _replica_table(replicas: Sequence[ReplicaView], max_rows: int) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="dim")  # 80 columns are enough
    table.add_column("replica", no_wrap=True)
    table.add_column("now", no_wrap=True)
    for heading in ("work", "slots", "input", "room", "upd", "start", "done", "/s", "reqs", "ver"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [[replica] for replica in replicas]
    if len(replicas) > max_rows:
        nodes = dict.fromkeys(replica.node for replica in replicas)
        rows = [[replica for replica in replicas if replica.node == node] for node in nodes]
    for row in rows:
        table.add_row(*_cells(row))
    if any(len(row) > 1 for row in rows):
        table.caption = Text(f"{len(replicas)} replicas, a row for each node", style="dim")
        table.caption_justify = "left"
    return table


def _cells(row: Sequence[ReplicaView]) -> list[Text]:
    """Return the cells of one replica, or of a node's replicas taken together."""
    from rich.text import Text

    first = row[0]
    causes = [replica.cause for replica in row]
    common = max(set(causes), key=causes.count)
    now = words(common) if len(row) == 1 else f"{causes.count(common)} {words(common)}"
    seconds: dict[str, float] = {}
    for replica in row:
        for cause, spent in replica.seconds.items():
            seconds[cause] = seconds.get(cause, 0.0) + spent
    part = shares(seconds)
    shown = [part.get(cause, 0.0) for cause in (Cause.WAIT_INPUT, Cause.WAIT_ROOM, Cause.UPDATE)]
    shown.append(part.get(Cause.START, 0.0) + part.get(Cause.RECOVERY, 0.0))
    occupied = [replica.occupancy for replica in row if replica.occupancy is not None]
    running = sum(replica.running for replica in row)
    version = min(replica.version for replica in row)
    return [
        Text(one_line(first.name if len(row) == 1 else f"{first.node} x{len(row)}")),
        Text(one_line(now), style=STYLES.get(common, "")),
        _percent(part.get(Cause.COMPUTE, 0.0)),
        _percent(fmean(occupied)) if occupied else Text("-"),
        *(_percent(share) for share in shown),
        Text(str(sum(replica.done for replica in row))),
        Text(f"{sum(replica.rate_per_s for replica in row):.1f}"),
        Text(str(running) if running else "-"),
        Text(str(version) if version >= 0 else "-"),
    ]


def _percent(share: float) -> Text:
    from rich.text import Text

    return Text(f"{share:.0%}", style="" if share >= 0.005 else "dim")


def _edge_table(view: RunView) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("queue", no_wrap=True)
    table.add_column("", width=20)
    table.add_column("held", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for edge in view.edges.values():
        is_full = edge.items >= FULL * edge.depth
        style = "red" if is_full else "green"
        bar = ProgressBar(
            total=max(1, edge.depth), completed=edge.items, width=20, complete_style=style, finished_style=style
        )
        name = Text(one_line(edge.edge))  # a plain string would be read as markup
        table.add_row(name, bar, Text(f"{edge.items}/{edge.depth}"), Text(f"{edge.size_bytes / 2**20:.1f} MiB"))
    return table
