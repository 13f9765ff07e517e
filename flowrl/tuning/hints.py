"""While a run goes on: which setting would help, with the gain that the simulator predicts from the run's own costs.

The work is done in a process of its own at the lowest priority: it reads the run's directory, fits a profile to what
has been recorded so far, and turns every knob by one position. The sink in the driver only starts it and looks, at each
batch of events, whether it has ended. Invariants: the driver never waits for it; a hint is asked for after
`FIRST_STEPS` steps and `FIRST_S` seconds at the earliest, and again whenever there are twice as many steps; when it
fails there is no hint, and logs/hints.log says why; it ends with the run, and with the driver however that ends. The
sink is opened by launch.py.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from flowrl.errors import FlowrlError
from flowrl.graph.plan import plan_of
from flowrl.graph.program import load_program
from flowrl.runtime.rundir import PRIVATE, as_yaml
from flowrl.simulation.profiler import Profiler, places
from flowrl.telemetry.causes import Cause
from flowrl.telemetry.events import Step
from flowrl.telemetry.files import replace_file
from flowrl.telemetry.history import read_history, timelines
from flowrl.telemetry.view import RunView, shares
from flowrl.tuning.trials import Searcher, TuneRequest, reserved

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowrl.graph.program import Program
    from flowrl.telemetry.events import Event
    from flowrl.tuning.knobs import Knob, Option
    from flowrl.tuning.trials import Trial

FIRST_STEPS = 3
FIRST_S = 60.0  # from the first step on: a run that is over by then needs no advice
LOOKED_STEPS = 8  # simulated for each position; those that seem worth telling are then measured
WORTH_SAYING = 0.03  # a smaller gain is within what a simulation is off by
MOST_HINTS = 2
ANY = 1e9  # cores and GPUs: what there are not yet is told with its price
ORDINALS = ("second", "third", "fourth", "fifth", "sixth", "seventh")
# Not `python -m`: that finds flowrl only where it is installed or in the working directory, and may find another one.
BOOT = (
    "import os, sys; os.nice(19); sys.path[:] = sys.argv.pop().split(os.pathsep); from flowrl.tuning import hints; "
    "sys.exit(hints.main(sys.argv[1:]))"
)


class Hints:
    """The sink: asks for a hint now and then, and tells it."""

    def __init__(
        self, run_dir: Path, program: Program, *, tell: Callable[[str], None], now: Callable[[], float] = time.time
    ) -> None:
        self._run_dir = run_dir
        self._program = program
        self._tell = tell
        self._now = now
        self._child: subprocess.Popen[str] | None = None
        self._num_steps = 0
        self._next = FIRST_STEPS
        self._first_s = 0.0
        self._told: set[str] = set()

    @property
    def pid(self) -> int | None:
        """Return the process that is at work, or None."""
        return self._child and self._child.pid

    def consume(self, events: list[Event]) -> None:
        """Count steps; tell what a process that has ended found, and start one when it is time."""
        self._hear()
        steps = [event for event in events if isinstance(event, Step)]
        if not steps:
            return
        if not self._num_steps:
            self._first_s = self._now()
        self._num_steps += len(steps)
        is_time = self._num_steps >= self._next and self._now() - self._first_s >= FIRST_S
        if is_time and self._child is None and steps[-1].version < steps[-1].num_steps:
            self._next = 2 * self._num_steps
            self._child = _start(self._run_dir, self._program)

    def close(self) -> None:
        """End the process, if one is at work."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()

    def _hear(self) -> None:
        if self._child is None or self._child.poll() is None:
            return
        child, self._child = self._child, None
        said, _ = child.communicate()
        hint = said.strip()
        if child.returncode == 0 and hint and advice_in(hint) != self._told:
            self._told = advice_in(hint)
            self._tell(hint)


def advice_in(hint: str) -> set[str]:
    """Return the changes that a hint is about, without the gains, which are never twice the same."""
    return {part.partition(" is worth ")[0] for part in hint.partition(": ")[2].split("; ")}


def _start(run_dir: Path, program: Program) -> subprocess.Popen[str]:
    """Start the process; our end of its standard input, which is closed whenever and however we end, keeps it alive."""
    settings = run_dir / "logs" / "hints.yaml"  # what this attempt runs with
    replace_file(settings, as_yaml(program.settings).encode(), mode=PRIVATE)
    command = [sys.executable, "-c", BOOT, str(run_dir), str(program.path), str(settings), os.pathsep.join(sys.path)]
    with (run_dir / "logs" / "hints.log").open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # the fits would take every core
        )


def main(arguments: list[str]) -> int:
    """Print a hint at the lowest priority; see `answer`."""
    with suppress(OSError):  # where the sandbox forbids it, being nice has to do
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    return answer(arguments)


def answer(arguments: list[str]) -> int:
    """Print a hint for a run that is going on; 1 where none can be had."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C in the terminal is for us as well
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()
    try:
        run_dir, graph_file, settings = map(Path, arguments)
        print(hint(run_dir, graph_file, settings))
    except (FlowrlError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: a thread that waits in it would hold up the interpreter's end
        pass
    os._exit(1)


def hint(run_dir: Path, graph_file: Path, settings: Path) -> str:
    """Return what would help a run that is going on, the best first: `learner starved 38%: a second generator ...`.

    Raises:
        FlowrlError: the graph file does not fit the settings, or the costs are not known yet.
    """
    plan = plan_of(load_program(graph_file, config=settings).graph)
    profiler, view = Profiler(), RunView()
    newest = len(timelines(run_dir)) - 1  # earlier starts of the run may have had other settings
    for happened in read_history(run_dir):
        if happened.start == newest:
            profiler.consume([happened.event])
            view.fold([happened.event])
    profile = profiler.profile(places(msgspec.to_builtins(plan)))
    request = TuneRequest(graph=graph_file, profile=run_dir, config=settings, cores=ANY, gpus=ANY)
    worth = changes_worth(Searcher(request, profile))
    none = f"no single setting is worth {WORTH_SAYING:.0%} more"
    return f"{_holding_up(view, plan.until)}: {'; '.join(worth) or none}"


def changes_worth(searcher: Searcher) -> list[str]:
    """Return the single changes that are worth telling, with their gain and price, the best first."""
    least = (1 + WORTH_SAYING) * searcher.measure({}, steps=LOOKED_STEPS).samples_per_s
    looked: list[tuple[float, Knob, Option]] = []
    for knob in searcher.knobs():
        for option in adjacent(knob):
            with suppress(FlowrlError):  # the graph refuses it
                looked.append((searcher.measure(option.changes, steps=LOOKED_STEPS).samples_per_s, knob, option))
    looked.sort(key=lambda each: -each[0])
    now = searcher.measure({})
    told: list[tuple[float, str]] = []
    for rate, knob, option in looked[:MOST_HINTS]:
        trial = searcher.measure(option.changes) if rate >= least else now
        gain = trial.samples_per_s / now.samples_per_s - 1
        if gain >= WORTH_SAYING:
            price = _price(searcher, option) + _staler(trial, now)
            told.append((gain, f"{_in_words(knob, option)} is worth {gain:+.0%}{price} ({_as_options(option)})"))
    return [text for _, text in sorted(told, key=lambda pair: -pair[0])]


def adjacent(knob: Knob) -> list[Option]:
    """Return the positions next to the present one, every other where they have no order; none of the batch's."""
    if knob.is_batch:
        return []
    values = [next(iter(option.changes.values())) for option in knob.options]
    if not all(isinstance(value, int | float) for value in values):
        return knob.options[1:]
    ordered = sorted(knob.options, key=lambda option: float(next(iter(option.changes.values()))))
    place = ordered.index(knob.options[0])
    return [*ordered[max(0, place - 1) : place], *ordered[place + 1 : place + 2]]


def _holding_up(view: RunView, until: str) -> str:
    """Say what holds the run up, by its own measurements: the last node's waiting, or that it is never idle."""
    part = shares(view.steady_seconds(until))
    starved, updating = part.get(Cause.WAIT_INPUT, 0.0), part.get(Cause.UPDATE, 0.0)
    if max(starved, updating) < WORTH_SAYING:
        return f"{until} busy {part.get(Cause.COMPUTE, 0.0):.0%}"
    return f"{until} starved {starved:.0%}" if starved >= updating else f"{until} in weight updates {updating:.0%}"


def _in_words(knob: Knob, option: Option) -> str:
    """Return `a second generator`, `max_staleness 2 instead of 1`, or `critic: its own GPUs`."""
    node, _, name = knob.name.rpartition(".")
    if name == "share":
        return f"{node}: {option.label}"
    now, then = (next(iter(each.changes.values())) for each in (knob.options[0], option))
    if name == "replicas" and isinstance(now, int) and then == now + 1 <= len(ORDINALS) + 1:
        return f"a {ORDINALS[now - 1]} {node}"
    return f"{knob.name} {then} instead of {now}"


def _as_options(option: Option) -> str:
    return " ".join(f"--set {path}={value}" for path, value in option.changes.items())


def _price(searcher: Searcher, option: Option) -> str:
    """Return `, for 1 core more`, or nothing where no more is reserved."""
    before, after = reserved(searcher.program.graph), reserved(searcher.build(option.changes))
    more = [(now - was, name) for was, now, name in zip(before, after, ("core", "GPU"), strict=True) if now > was]
    parts = [f"{count:g} {name}" + ("s" if count > 1 else "") for count, name in more]
    return f", for {' and '.join(parts)} more" if parts else ""


def _staler(trial: Trial, now: Trial) -> str:
    """Return `, at staleness 1.8 instead of 0.9`, or nothing where it stays about as it is."""
    told = f"{trial.mean_staleness:.1f}", f"{now.mean_staleness:.1f}"
    return f", at staleness {told[0]} instead of {told[1]}" if told[0] != told[1] else ""
