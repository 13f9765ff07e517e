"""What prediction and advice add to a run: lines before it starts, a profile and hints while it goes on.

A hint is worked out in a process of its own at the lowest priority, which reads the run's directory (`advisor.hint`).
The sink in the driver only starts it and looks, at each batch of events, whether it has ended.

Invariants:
- a run with or without this companion is the same run;
- the driver never waits;
- a hint is asked for after `FIRST_STEPS` steps and `FIRST_S` seconds at the earliest, and again whenever there are
  twice as many steps;
- when it fails there is no hint, and logs/hints.log says why;
- the process ends with the run, and with the driver however that ends.

Handed to runtime/launch.py by the command line.

Tests: tests/unit/tuning/test_hints.py
"""

from __future__ import annotations

import functools
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

from flowrl.errors import FlowrlError
from flowrl.runtime.launch import RunCompanion
from flowrl.runtime.rundir import PRIVATE, as_yaml
from flowrl.telemetry.events import HINT, Step
from flowrl.telemetry.files import replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from flowrl.graph.program import Placing, Program
    from flowrl.runtime.devices import Machine
    from flowrl.telemetry.events import Event
    from flowrl.telemetry.sinks import Sinks
    from flowrl.tuning.planner import Planner

NEVER = 2  # the process's exit code where the graph cannot be simulated
FIRST_STEPS = 3
FIRST_S = 60.0  # from the first step on: a run that is over by then needs no advice
# Not `python -m`: that finds flowrl only where it is installed or in the working directory, and may find another one.
BOOT = (
    "import os, sys; os.nice(19); sys.path[:] = sys.argv.pop().split(os.pathsep); from flowrl.tuning import companion; "
    "sys.exit(companion.main(sys.argv[1:]))"
)


class Advised(RunCompanion):
    """Plans and predicts a run, measures its costs, and says which setting would make it quicker."""

    _planner: Planner | None = None

    def placing(self, machines: Sequence[Machine] = ()) -> Placing:
        """Return the planner, of equal machines or of this one."""
        from flowrl.tuning.machines import site_of, this_site
        from flowrl.tuning.planner import Planner

        self._planner = Planner(site_of(machines) if machines else this_site(), {}, is_for_run=True)
        return self._planner

    def foretell(self, program: Program, runs_dir: Path) -> Iterable[str]:
        """Return the plan; then the prediction, where runs were made before (`advisor.forecast`), else an estimate."""
        from flowrl.tuning.duration import rough_duration

        planned = self._planner.lines(whole=False) if self._planner is not None else []
        if any(runs_dir.glob("*/profile.json")):
            from flowrl.tuning.advisor import forecast

            if lines := forecast(program, runs_dir):
                return [*planned, *lines]
        return [*planned, rough_duration(program)]

    def add_sinks(self, program: Program, run_dir: Path, sinks: Sinks) -> None:
        """Add the profile, and hints where the settings want them."""
        from flowrl.simulation.profiler import ProfileFile

        sinks.add("profile", lambda: ProfileFile(run_dir))
        if program.settings.hints:
            sinks.add("hints", lambda: Hints(run_dir, program, tell=functools.partial(sinks.note, HINT)))


class Hints:
    """The sink: asks for a hint now and then, and tells it."""

    def __init__(
        self, run_dir: Path, program: Program, *, tell: Callable[[str], None], now: Callable[[], float] = time.monotonic
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
        if child.returncode == NEVER:
            self._next = sys.maxsize
        if child.returncode == 0 and hint and changes_in(hint) != self._told:
            self._told = changes_in(hint)
            self._tell(hint)


def changes_in(hint: str) -> set[str]:
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
    """Print a hint for a run that is going on; 1 where none can be had, `NEVER` where none can be had later either."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C in the terminal is for us as well
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        from flowrl.graph.program import load_program
        from flowrl.simulation.stand_ins import lacking
        from flowrl.tuning.advisor import hint

        gc.freeze()
        run_dir, graph_file, settings = map(Path, arguments)
        if what := lacking(load_program(graph_file, config=settings).graph):
            print(f"the graph {what}", file=sys.stderr)
            return NEVER
        print(hint(run_dir, graph_file, settings))
    except (FlowrlError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: a thread that waits in it would hold up the interpreter's end
        pass
    os._exit(1)
