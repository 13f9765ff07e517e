"""The run in plain lines, where standard output is not a terminal: one line a step, and every notice and evaluation.

While replicas are starting it says so every `WAIT_LINE_S` seconds, and where nothing else was to say for `QUIET_LINE_S`
what every node is at: a graph that trains nothing has no steps, and a large model's are long. Fed by `Sinks` after the
view.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from flowrl.errors import one_line
from flowrl.telemetry.events import Evaluation, Notice, Step
from flowrl.telemetry.intervals import mean_interval, prompt_means
from flowrl.telemetry.view import format_duration, words

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowrl.telemetry.events import Event
    from flowrl.telemetry.view import RunView

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
    """Return `held-out score 0.312 +- 0.041 (64 prompts) at version 0`."""
    means = prompt_means(evaluation.scores)
    if not means:
        return f"held-out score: no prompts at version {evaluation.version}"
    interval = mean_interval(means)
    spread = f" +- {interval.half_width:.3f}" if interval.num > 1 else ""
    return f"held-out score {interval.mean:.3f}{spread} ({interval.num} prompts) at version {evaluation.version}"


def notice_line(notice: Notice) -> str:
    """Return `warning: learner.0: text`; an ordinary notice goes without its level."""
    level = "" if notice.level == "info" else f"{notice.level}: "
    return one_line(f"{level}{notice.where}: {notice.text}")
