"""Launch a run: check everything, prepare its directory, start a runtime, show it, report how it ended.

Order matters: everything the user could have got wrong is found before a directory is written or a process starts, and
what the caller knows of the run beforehand (`RunCompanion.foretell`) is said before it begins.
Invariant: nothing here knows of a simulator; the caller hands over the lines to say and the sinks to add.
Ctrl-C once asks for a controlled stop (what is under way is learned and saved, and the report says how to go on); twice
aborts. Called by the command line and by runs/retrain.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.engines.checkpoint import complete_checkpoints
from flowrl.errors import ConfigError, FlowrlError
from flowrl.graph.program import Program, load_program
from flowrl.graph.show import edge_table, node_table, staleness_line
from flowrl.runtime.placement import check_resources
from flowrl.runtime.resuming import check_same_data, check_same_run, record_attempt
from flowrl.runtime.rundir import claim, create_run_dir, existing_run, write_plan
from flowrl.runtime.supervisor import Options, newest_start
from flowrl.telemetry.report import Ending, report, write_ending, write_report
from flowrl.telemetry.sinks import Sinks, open_sinks
from flowrl.telemetry.trackers import check_trackers

if TYPE_CHECKING:
    from flowrl.graph.settings import RunSettings
    from flowrl.runtime.supervisor import Outcome, Start
    from flowrl.telemetry.view import RunView

Say = Callable[[str], None]


class RunRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for."""

    graph: Path
    config: Path | None = None
    overrides: list[str] = []
    name: str | None = None
    runs_dir: Path = Path("runs")
    resume: Path | None = None
    address: str | None = None


class RunCompanion:
    """What the caller adds to a run: lines said before it starts, and sinks beside those that every run has."""

    def foretell(self, program: Program, runs_dir: Path) -> Iterable[str]:
        """Yield what can be said of a run before it starts; `runs_dir` holds the runs made before."""
        return ()

    def add_sinks(self, program: Program, run_dir: Path, sinks: Sinks) -> None:
        """Add sinks to a run that is about to start."""

    def heed(self, interrupt: Callable[[], None]) -> None:
        """Keep what interrupts the run as Ctrl-C does, from any thread: only a main thread hears signals itself."""


def describe(program: Program) -> str:
    """Return the plan of a run as text: nodes, edges, the staleness bound."""
    graph = program.graph
    return "\n".join([node_table(graph), "", edge_table(graph), "", staleness_line(graph)])


def check_program(program: Program, *, say: Say, address: str | None) -> None:
    """Check what a run needs besides a sound graph: devices, models, data, functions.

    Raises:
        UserError: the first thing that is missing or wrong.
    """
    check_trackers(program.settings.wandb, tensorboard=program.settings.tensorboard)
    if address is None and program.settings.runtime == "ray":
        check_resources(program.graph)
    for name, stage in program.graph.nodes.items():
        if "." in name or not name.isidentifier():
            raise ConfigError(name, "is not a node name", "use letters, digits and underscores")
        stage.check(say)


def launch(request: RunRequest, *, say: Say, companion: RunCompanion) -> Path:
    """Run a graph from request to report; returns the run's directory.

    Raises:
        UserError: something is wrong with the request; nothing was started or written.
        RunError: the run failed.
    """
    resume: Start | None = None
    version, changes = 0, {}
    config = request.config
    if request.resume is not None:
        config = config or existing_run(request.resume) / "settings.yaml"
        claim(request.resume, say)
        resume = newest_start(request.resume.resolve(), lambda level, where, text: say(f"{where}: {text}"))
        version = resume.cut.version if resume.cut else 0
        say(f"resuming {request.resume} at version {version}")
    program = load_program(request.graph, config=config, overrides=request.overrides)
    if request.resume is not None:
        changes = check_same_run(request.resume, program)
    say(f"checking {request.graph}")
    check_program(program, say=say, address=request.address)
    if request.resume is None:
        name = request.name or f"{request.graph.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        run_dir = create_run_dir(request.runs_dir / name).resolve()
        claim(run_dir, say)
        write_plan(run_dir, program)
    else:
        run_dir = request.resume.resolve()
        check_same_data(run_dir, program)
        for line in record_attempt(run_dir, program, changes, version=version):
            say(line)
    for line in companion.foretell(program, run_dir.parent):
        say(line)
    again = f"flowrl run {request.graph} --resume {os.path.relpath(run_dir)}"
    drive(program, run_dir, resume=resume, address=request.address, again=again, say=say, companion=companion)
    return run_dir


def drive(
    program: Program,
    run_dir: Path,
    *,
    resume: Start | None,
    address: str | None,
    again: str,
    say: Say,
    companion: RunCompanion = RunCompanion(),  # noqa: B008  # it keeps nothing
) -> Outcome:
    """Run a checked graph in its directory to its end, show it and report; `again` is the command that goes on.

    Raises:
        FlowrlError: the run failed.
    """
    say(f"run directory {run_dir}")
    with open_sinks(run_dir, program.settings, title=run_dir.name, nodes=list(program.graph.nodes)) as sinks:
        companion.add_sinks(program, run_dir, sinks)
        try:
            outcome = _run_on_loop(program, address, run_dir, resume, sinks, companion)
        except (FlowrlError, KeyboardInterrupt) as error:
            _report(again, run_dir, None, sinks.view, failure=str(error) or "aborted", say=sinks.say)
            raise
    _report(again, run_dir, outcome, sinks.view, failure="", say=say)
    return outcome


def _report(again: str, run_dir: Path, outcome: Outcome | None, view: RunView, *, failure: str, say: Say) -> None:
    """Write the report beside the run and, unless it failed, print it."""
    checkpoints = complete_checkpoints(run_dir / "checkpoints")
    is_done = view.last_step is not None and view.last_step.version >= view.last_step.num_steps
    ending = Ending(
        name=run_dir.name,
        totals=outcome.totals if outcome else {},
        checkpoint=str(checkpoints[-1]) if checkpoints else "",
        resume=again if checkpoints and not is_done else "",
        was_stopped=outcome is not None and outcome.was_stopped,
        failure=failure,
    )
    text = report(view, ending)
    write_report(run_dir / "report.txt", text)
    write_ending(run_dir, ending)
    if failure:
        say(f"what is known of the run is in {run_dir / 'report.txt'}")
        if ending.resume:
            say(f"continue it with: {ending.resume}")
    else:
        say("\n" + text.rstrip())


def _run_on_loop(
    program: Program, address: str | None, run_dir: Path, resume: Start | None, sinks: Sinks, companion: RunCompanion
) -> Outcome:
    import uvloop

    async def body() -> Outcome:
        stopping = asyncio.Event()
        with _interrupts(stopping, sinks.say, companion):
            return await _start(program, address, run_dir, resume, sinks, stopping)

    try:
        return uvloop.run(body())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _start(
    program: Program, address: str | None, run_dir: Path, resume: Start | None, sinks: Sinks, stopping: asyncio.Event
) -> Outcome:
    settings: RunSettings = program.settings
    told: dict[str, Any] = {
        "run_dir": run_dir,
        "consume": sinks.consume,
        "stopping": stopping,
        "resume": resume,
        "stall_timeout_s": settings.stall_timeout_s,
        "heartbeat_timeout_s": settings.heartbeat_timeout_s,
        "max_restarts": settings.max_restarts,
    }
    if settings.runtime == "local":
        from flowrl.runtime.local import LocalOptions, run_local

        return await run_local(program.graph, LocalOptions(**told))
    from flowrl.runtime.ray import run_ray, running_ray

    with running_ray(program.graph, address):
        return await run_ray(program.graph, Options(**told))


@contextlib.contextmanager
def _interrupts(stopping: asyncio.Event, say: Say, companion: RunCompanion) -> Generator[None]:
    """Let the first Ctrl-C ask for a controlled stop and the second cancel the run."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def interrupt() -> None:
        if stopping.is_set() and task is not None:
            task.cancel()
        else:
            say("stopping: no more prompts are admitted, what is under way is learned and saved; Ctrl-C again aborts")
            stopping.set()

    companion.heed(lambda: loop.call_soon_threadsafe(interrupt) and None)
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    for number in numbers:
        loop.add_signal_handler(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
