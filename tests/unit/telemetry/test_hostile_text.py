"""Nothing that a model, a server or user code says moves a cursor, sets the clipboard or passes for a line of ours."""

from __future__ import annotations

import io
import random
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from flowrl.errors import FlowrlError, one_line, printable, say, shortened
from flowrl.telemetry.events import Evaluation, Notice, Step
from flowrl.telemetry.report import Ending, report
from flowrl.telemetry.terminal import LiveView, PlainLines
from flowrl.telemetry.view import RunView

if TYPE_CHECKING:
    from flowrl.telemetry.events import Event

HOSTILE = "\x1b]52;c;cm0gLXJm\x07\x1b[2J\x1b[1;1H\nflowrl: all is well\r\x9b31m\u202egnp\u2028\x00\x08"
FORGED = "\nflowrl: all is well"


def events(text: str) -> list[Event]:
    notices = [Notice(level=level, where=text, text=text, time_s=1.0) for level in ("info", "warning", "error")]
    hint = Notice(level="info", where="hint", text=text, time_s=1.0)
    rows = [{"prompt": text, "completion": text, "reward": "1"}]
    told = Evaluation(version=0, time_s=1.0, scores=[[1.0], [0.0]], completions=rows)
    return [*notices, hint, told, Step(version=1, num_steps=2, time_s=2.0, metrics={"loss": 1.0})]


def check_harmless(shown: str) -> None:
    """Insist that a terminal would show every character as one, and no line that we did not begin."""
    wrong = {c for c in shown if not c.isprintable() and c not in "\n\t"}
    assert not wrong, f"{wrong} in {shown!r}"
    assert FORGED not in shown


@pytest.mark.parametrize("text", [HOSTILE, "\ud800", "\x7f\x85\x0b\x0c"], ids=["escapes", "half a pair", "controls"])
def test_no_output_lets_it_through(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    view = RunView()
    view.fold(events(text))
    lines: list[str] = []
    PlainLines(view, say=lines.append).consume(events(text))
    check_harmless("\n".join(lines))
    check_harmless(report(view, Ending(name="run", failure=text)))
    check_harmless(str(FlowrlError(text, text, text)))
    check_harmless(shortened(text, 100))
    say(one_line(text))
    say(text.replace("\n", " "), aside=True)
    out = capsys.readouterr()
    check_harmless(out.out)
    check_harmless(out.err)


def test_the_live_view_lets_it_through_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=False, width=200, height=50)
    view = RunView()
    live = LiveView(view, title="run", console=console)
    try:
        view.fold(events(HOSTILE))
        live.consume(events(HOSTILE))
        live.say(one_line(HOSTILE))
    finally:
        live.close()
    check_harmless(screen.getvalue())


def test_any_text_is_made_harmless_and_keeps_its_letters() -> None:
    """A seeded fuzzer over all of Unicode."""
    seed = 52
    draw = random.Random(seed)
    for turn in range(300):
        text = "".join(chr(draw.randrange(0x11_0000)) for _ in range(20)) + "letters"
        assert one_line(text).isprintable(), f"seed {seed}, turn {turn}: {text!r}"
        assert printable(text).endswith("letters")
