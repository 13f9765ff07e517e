"""What the terminal shows, drawn and in plain lines."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console

from flowrl.telemetry.events import HINT, Cause, Notice
from flowrl.telemetry.terminal import LiveView, PlainLines, frame
from flowrl.telemetry.view import RunView
from tests.unit.telemetry.streams import EDGE, edge, evaluation, notice, status, step

if TYPE_CHECKING:
    from flowrl.telemetry.events import Event

RUN: list[Event] = [
    status(at=0.0, cause=Cause.START),
    step(1, at=10.0, tokens=500),
    evaluation(0, [[0.0, 1.0], [1.0, 1.0]]),
    status(at=20.0, start=5.0, computing=10.0, waiting_for_input=5.0, done=30, running=12, version=3, filled_s=6.0),
    status("learner", at=20.0, cause=Cause.WAIT_INPUT, waiting_for_input=20.0, version=3),
    edge(9, at=20.0),
    notice("group 7 failed [quarantined]"),
    step(3, at=30.0, staleness=(0, 1), reward__mean=0.312, kl=0.0121, staleness__mean=0.5, tokens=6200),
]


def hinted(text: str) -> Notice:
    return Notice(level="info", where=HINT, text=text, time_s=1.0)


def drawn(view: RunView, *, now_s: float, width: int = 80, max_rows: int = 16) -> list[str]:
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(frame(view, now_s=now_s, max_rows=max_rows))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_frame_shows_figures_replicas_and_queues_in_80_columns() -> None:
    view = RunView(expected=("generator", "learner"))
    view.fold(RUN)
    lines = drawn(view, now_s=40.0)
    text = "\n".join(lines)
    assert lines[0] == "step 3/40   reward 0.312   KL 0.0121   staleness 0.5 (max 1)   310 tokens/s"
    assert "about 6m00s to go" in text  # 37 steps of 10 s, 10 s after the last
    assert "held-out score 0.750" in text
    assert "warnings: 1" in text
    generator = next(line for line in lines if line.startswith("generator.0"))
    assert " ".join(generator.split()) == "generator.0 computing 50% 40% 25% 0% 0% 25% 30 1.5 12 3"
    learner = next(line for line in lines if line.startswith("learner.0"))
    assert learner.split()[1:7] == ["waiting", "for", "input", "0%", "-", "100%"]
    queue = next(line for line in lines if line.startswith(EDGE))
    assert queue.endswith("9/10  9.0 MiB")
    assert "…" not in text


def test_fill_bar_grows_with_the_fill() -> None:
    def bar(items: int) -> int:
        view = RunView()
        view.fold([edge(items, at=0.0)])
        console = Console(record=True, width=80, file=io.StringIO(), no_color=True, force_terminal=True)
        console.print(frame(view, now_s=0.0))
        return console.export_text().count("━")

    assert [bar(0), bar(5), bar(10)] == [0, 10, 20]


def test_many_replicas_share_a_row_for_each_node() -> None:
    view = RunView()
    view.fold([status(replica=i, at=1.0, computing=1.0, done=2, running=1) for i in range(20)])
    lines = drawn(view, now_s=1.0)
    assert [line.split()[:5] for line in lines if line.startswith("generator")] == [
        ["generator", "x20", "20", "computing", "100%"]
    ]
    assert "20 replicas, a row for each node" in lines


def test_before_the_first_step_the_frame_says_what_is_awaited() -> None:
    view = RunView(expected=("generator", "learner"))
    view.fold([status(at=12.0, cause=Cause.START, start=12.0)])
    lines = drawn(view, now_s=12.0)
    assert lines[:2] == ["no step learned yet", "generator.0 starting 12 s; not heard from yet: learner"]


def test_live_view_prints_notices_and_leaves_the_last_frame() -> None:
    view, out = RunView(), io.StringIO()
    live = LiveView(
        view, title="ppo-1", console=Console(file=out, force_terminal=True, width=100, height=40), now=lambda: 7.0
    )
    try:
        view.fold(RUN)
        live.consume(RUN)
        live.say("stopping: [the] learner finishes its step")
    finally:
        live.close()
    text = out.getvalue()
    assert "warning: reward.0: group 7 failed [quarantined]" in text
    assert "stopping: [the] learner finishes its step" in text
    assert "ppo-1  0 s elapsed" in text
    assert "step 3/40" in text[text.rindex("ppo-1") :]


def test_the_newest_hint_stands_in_the_frame_and_does_not_scroll_by() -> None:
    view, out = RunView(), io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=40)
    live = LiveView(view, title="ppo-1", console=console, now=lambda: 7.0)
    try:
        for text in ("learner starved 40%: wait", "learner starved 38%: a second generator is worth +31%"):
            events: list[Event] = [hinted(text)]
            view.fold(events)
            live.consume(events)
        assert drawn(view, now_s=7.0)[-1] == "hint: learner starved 38%: a second generator is worth +31%"
        assert "hint: " not in out.getvalue().partition("ppo-1")[0]
    finally:
        live.close()
    assert "wait" not in out.getvalue()[out.getvalue().rindex("ppo-1") :]
    assert view.num_warnings == 0


def test_replicas_make_room_for_a_hint() -> None:
    view = RunView()
    view.fold([status(replica=i, at=1.0, computing=1.0) for i in range(12)])
    live = LiveView(view, title="ppo-1", console=Console(file=io.StringIO(), width=80, height=22))
    try:
        view.fold([edge(1, at=1.0)])
        assert live.max_rows() == 12
        view.fold([hinted("a second generator is worth +31%")])
        assert live.max_rows() == 7
    finally:
        live.close()


def test_plain_lines_say_a_hint() -> None:
    view = RunView()
    said: list[str] = []
    PlainLines(view, say=said.append).consume([hinted("learner starved 38%: a second generator is worth +31%")])
    assert said == ["hint: learner starved 38%: a second generator is worth +31%"]


def test_plain_lines_say_steps_evaluations_and_notices() -> None:
    view = RunView()
    said: list[str] = []
    lines = PlainLines(view, say=said.append)
    for event in RUN[1:]:
        view.fold([event])
        lines.consume([event])
    assert said == [
        "step 1/40",
        "held-out score 0.750 +- 3.177 (2 prompts) at version 0",
        "warning: reward.0: group 7 failed [quarantined]",
        "step 3/40 reward 0.312 kl 0.0121 staleness 0.5 tok/s 310 eta 6m10s",
    ]


def test_plain_lines_say_now_and_then_who_is_starting() -> None:
    view = RunView()
    said: list[str] = []
    lines = PlainLines(view, say=said.append)
    for at in range(25):
        events: list[Event] = [status(at=float(at), cause=Cause.START, start=float(at))]
        view.fold(events)
        lines.consume(events)
    assert said == [f"generator.0 starting {at} s" for at in (0, 10, 20)]


def test_plain_lines_say_what_every_node_is_at_where_nothing_else_is_said_for_a_minute() -> None:
    view = RunView()
    said: list[str] = []
    lines = PlainLines(view, say=said.append)
    for at in range(150):
        events: list[Event] = [
            status(at=float(at), computing=float(at), done=at // 2, running=16),
            status(node="writer", at=float(at), cause=Cause.WAIT_INPUT, waiting_for_input=float(at)),
        ]
        view.fold(events)
        lines.consume(events)
    assert said == [
        "generator: 30 done, 16 running; writer: 0 done, waiting for input",
        "generator: 60 done, 16 running; writer: 0 done, waiting for input",
    ]
