"""Hand-made events for the telemetry's tests."""

from __future__ import annotations

import random

from flowrl.telemetry.events import Cause, EdgeStatus, Evaluation, Event, Notice, Span, Status, Step

EDGE = "generator.rollouts -> reward.rollouts"


def status(
    node: str = "generator",
    replica: int = 0,
    *,
    at: float,
    cause: Cause = Cause.COMPUTE,
    done: int = 0,
    running: int = 0,
    version: int = -1,
    filled_s: float | None = None,
    **seconds: float,
) -> Status:
    """A status; seconds by cause as keywords, the rest of the causes 0."""
    spent = {name.value: seconds.get(name.value, 0.0) for name in Cause}
    return Status(node=node, replica=replica, time_s=at, cause=cause.value, seconds=spent, done=done,
                  running=running, version=version, filled_s=filled_s)  # fmt: skip


def step(version: int, *, at: float, of: int = 40, staleness: tuple[int, ...] = (), **metrics: float) -> Step:
    """A step; in metric names two underscores stand for a dot."""
    named = {name.replace("__", "."): value for name, value in metrics.items()}
    return Step(version=version, num_steps=of, time_s=at, metrics=named, staleness=list(staleness))


def span(node: str, name: str, start: float, end: float, *groups: int, replica: int = 0) -> Span:
    return Span(node=node, replica=replica, name=name, start_s=start, end_s=end, groups=list(groups))


def evaluation(version: int, scores: list[list[float]], *, at: float = 0.0) -> Evaluation:
    rows = [{"prompt": "What is 2 + 2?", "completion": f"said by\nversion {version}", "reward": "1"}]
    return Evaluation(version=version, time_s=at, scores=scores, completions=rows)


def edge(items: int, *, at: float, depth: int = 10) -> EdgeStatus:
    return EdgeStatus(edge=EDGE, time_s=at, items=items, depth=depth, size_bytes=items * 2**20)


def notice(text: str, *, level: str = "warning", at: float = 0.0) -> Notice:
    return Notice(level=level, where="reward.0", text=text, time_s=at)


def random_run(seed: int, *, num_steps: int = 6, groups_per_step: int = 4) -> list[Event]:
    """A whole run in order of the spans' ends: two generators with overlapping requests, a scorer, a learner."""
    draw = random.Random(seed)
    dated: list[tuple[float, Event]] = []
    learned_s = 0.0
    for version in range(num_steps):
        groups = list(range(version * groups_per_step, (version + 1) * groups_per_step))
        scored_s: list[float] = []
        for group in groups:
            replica, start_s = draw.randrange(2), version + draw.random()
            end_s = start_s + draw.expovariate(1 / 2)
            dated.append((end_s, span("generator", "generate", start_s, end_s, group, replica=replica)))
            dated.append((end_s + 0.2, span("reward", "score", end_s + 0.1, end_s + 0.2, group)))
            scored_s.append(end_s + 0.2)
        start_s = max([learned_s, *scored_s])
        learned_s = start_s + 0.5
        dated.append((learned_s, span("learner", f"step {version}", start_s, learned_s, *groups)))
        dated.append((learned_s + 0.3, span("learner", f"publish v{version + 1}", learned_s, learned_s + 0.3)))
        dated.append((learned_s, step(version + 1, at=learned_s, of=num_steps, staleness=(0, 0, 1, 1), tokens=100)))
    end_s = max(at for at, _ in dated)
    for at in range(int(end_s) + 2):
        for replica in range(2):
            busy = status(
                "generator", replica, at=float(at), running=at % 3, computing=0.75 * at, waiting_for_input=0.25 * at,
                filled_s=0.4 * at,
            )  # fmt: skip
            dated.append((float(at), busy))
        dated.append((float(at), edge(draw.randrange(10), at=float(at))))
    return [event for _, event in sorted(dated, key=lambda pair: pair[0])]
