"""Launch a run: check everything, prepare its directory, start a runtime, show it, report how it ended.

Order matters: everything the user could have got wrong is found before a directory is written or a process starts. What
the caller knows of the run beforehand (`RunCompanion.foretell`) is said before it begins. A cluster's nodes are asked
for their GPUs while the program is loaded, and once more, with the run's directory, when it starts.

Invariants:
- nothing here knows of a simulator; the caller hands over the lines to say and the sinks to add;
- each of `STOPS` once asks for a controlled stop (what is under way is learned and saved, and the report says how to go
  on), which may take `stop_grace_s`;
- a second Ctrl-C or SIGTERM aborts.

Before a run begins they end the command, and nothing is left. Called by the command line and by runs/retrain.py.

Tests: tests/contracts/test_stops.py, tests/unit/tuning/test_plans_of_clusters.py
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.config import written
from flowrl.engines.checkpoint import best_version, complete_checkpoints, read_rated, set_checkpoints_aside
from flowrl.errors import ConfigError, FlowrlError, files_named, number_of
from flowrl.graph.program import Program, load_program
from flowrl.graph.show import edge_table, node_table, staleness_line
from flowrl.runtime.devices import together, visible_machine
from flowrl.runtime.lease import check_turns
from flowrl.runtime.ledger import Cut
from flowrl.runtime.placement import check_computes, check_resources, place, places, quiet_libraries
from flowrl.runtime.resuming import changed_code, check_same_data, check_same_graph, check_same_run, record_attempt
from flowrl.runtime.rundir import claim, create_run_dir, existing_run, recorded_settings, write_plan
from flowrl.runtime.scaling import check_most, follow_scale, most_of_auto
from flowrl.runtime.supervisor import Options, Scaling, Start, newest_start
from flowrl.stops import ALWAYS, ECHO_S, heard, put_back
from flowrl.telemetry.report import Ending, report, write_ending, write_report
from flowrl.telemetry.sinks import Sinks, open_sinks
from flowrl.telemetry.trackers import check_trackers

if TYPE_CHECKING:
    from flowrl.graph.graph import RunSettings
    from flowrl.graph.program import Placing
    from flowrl.runtime.devices import Machine
    from flowrl.runtime.readiness import Survey
    from flowrl.runtime.rundir import Claim
    from flowrl.runtime.supervisor import Outcome
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
    from_start: bool = False  # with `resume`: from the beginning


class RunCompanion:
    """What the caller adds to a run: lines said before it starts, and sinks beside those that every run has."""

    def placing(self, machines: Sequence[Machine] = ()) -> Placing:
        """Return what places what the settings leave open, on equal machines or on this one: the rules of placement."""
        return partial(place, machine=together(machines or [visible_machine()]))

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
    quiet_libraries()
    if unread := program.unread():
        say(f"{', '.join(unread)}: no effect, for no node of this graph reads {'it' if len(unread) == 1 else 'them'}")
    for line in program.settings.idle_settings():
        say(line)
    for directory, command in program.settings.needs.items():
        if not Path(directory).expanduser().exists():
            raise ConfigError(directory, "is not there, and the run reads from it", f"make it first: {command}")
    check_trackers(program.settings)
    check_most(program.graph, program.settings.cluster.most)
    if address is None and program.settings.runtime == "ray":
        check_resources(program.graph)
    if program.settings.runtime == "local":
        from flowrl.runtime.local import check_local

        check_local(program.graph)
    check_turns(program.graph)
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
    with files_named(), contextlib.ExitStack() as held:
        with _unbegun(say) as made:
            if request.resume is not None:
                run_dir = existing_run(request.resume).resolve()
                check_same_graph(run_dir, request.graph)
                config = request.config or recorded_settings(run_dir)
                claimed = held.enter_context(contextlib.closing(claim(run_dir, say)))
                resume = _resumed(request, run_dir, say)
                program = _load(request, config, companion, say)
                changes = check_same_run(run_dir, program)
                _check(program, request, say)
                check_same_data(run_dir, program)
                version = resume.cut.version if resume.cut else 0
                for line in record_attempt(run_dir, changes, version=version, code=changed_code(run_dir, program)):
                    say(line)
            else:
                program, resume = _load(request, request.config, companion, say), None
                _check(program, request, say)
                name = request.name or f"{request.graph.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
                run_dir = create_run_dir(request.runs_dir / name).resolve()
                claimed = held.enter_context(contextlib.closing(claim(run_dir, say)))
                made.append(run_dir)
            number = write_plan(run_dir, program)
            for line in companion.foretell(program, run_dir.parent):
                say(line)
        again = ["flowrl", "run", str(request.graph), "--resume", os.path.relpath(run_dir)]
        if request.address is not None:
            again += ["--address", request.address]
        drive(program, run_dir, claimed=claimed, start_number=number, resume=resume, address=request.address,
              again=shlex.join(again), say=say, companion=companion)  # fmt: skip
    return run_dir


@contextlib.contextmanager
def _unbegun(say: Say) -> Generator[list[Path]]:
    """Say of a signal in this block that nothing has begun, and remove the directory that is put into the list."""
    made: list[Path] = []
    try:
        yield made
    except KeyboardInterrupt:
        for run_dir in made:
            shutil.rmtree(run_dir, ignore_errors=True)
        say("nothing has begun, and the same command may be given again")
        raise


def _load(request: RunRequest, config: Path | None, companion: RunCompanion, say: Say) -> Program:
    if request.address is not None:
        return load_for_cluster(
            request.graph, config, request.overrides, address=request.address, companion=companion, say=say
        )
    return load_program(request.graph, config=config, overrides=request.overrides, placing=companion.placing())


def load_for_cluster(
    graph: Path, config: Path | None, overrides: Sequence[str], *, address: str, companion: RunCompanion, say: Say
) -> Program:
    """Load a program for a cluster, whose nodes are asked for their GPUs; see `placed_on`.

    Raises:
        UserError: the program is wrong, the cluster does not answer, or a node of it cannot run flowrl.
    """
    from flowrl.runtime.readiness import look_for_gpus

    program = load_program(graph, config=config, overrides=overrides)
    is_open = program.settings.placement == "auto" and program.settings.runtime == "ray"
    found = look_for_gpus(program, address) if is_open else None
    return placed_on(program, found, config=config, overrides=overrides, companion=companion, say=say)


def placed_on(
    program: Program,
    found: Survey | None,
    *,
    config: Path | None,
    overrides: Sequence[str],
    companion: RunCompanion,
    say: Say,
) -> Program:
    """Load a program once more with what is left to auto placed on a cluster's GPUs, where it has some; `found` says.

    They are those of the nodes that are alike. Where something is placed there, the run is kept off GPUs of other kinds
    (`cluster.nodes`), for nobody else says which GPU a process gets. `NODE.replicas=auto` is as many as there is room
    for, also on nodes that join later: `cluster.most`.
    """
    kind = cast("type[RunSettings]", type(program.settings))
    nodes = program.settings.cluster.nodes
    if found is not None:
        from flowrl.runtime.readiness import equal_machines

        (machines, left_out), before = equal_machines(found), _num_gpus(program)
        if machines:
            placing = companion.placing([*machines.values()])
            program = load_program(program.path, config=config, overrides=overrides, placing=placing)
        if left_out and _num_gpus(program) > before:
            others = "; ".join(f"{address} {why}" for address, why in left_out.items())
            alike = f"the {number_of(len(machines), 'node')} of {next(iter(machines.values()))}"
            say(f"placed on {alike}; left out, as cluster.nodes now says: {others}")
            nodes = [node.address for node in found.nodes if node.address not in left_out]
    most = program.settings.cluster.most | most_of_auto(program, written(kind, config=config, overrides=overrides))
    cluster = msgspec.structs.replace(program.settings.cluster, nodes=nodes, most=most)
    settings = msgspec.structs.replace(program.settings, cluster=cluster)
    return msgspec.structs.replace(program, settings=settings)


def _num_gpus(program: Program) -> int:
    return sum(place.gpus for place in places(program.graph))


def _check(program: Program, request: RunRequest, say: Say) -> None:
    say(f"checking {request.graph}")
    if request.address is None:
        check_computes(program.graph)
    check_program(program, say=say, address=request.address)


def _resumed(request: RunRequest, run_dir: Path, say: Say) -> Start:
    """Return where a run goes on, or its beginning where the user asks for that."""
    if request.from_start:
        set_checkpoints_aside(run_dir / "checkpoints")
        say(f"beginning {request.resume} again; what it recorded is moved aside until the first checkpoint")
        return Start(cut=Cut())
    start = newest_start(run_dir, lambda level, where, text: say(f"{where}: {text}"))
    if start.checkpoint is None:
        raise ConfigError(str(request.resume), "has no checkpoint to go on from", "begin again with --from-start")
    say(f"resuming {request.resume} at version {start.cut.version if start.cut else 0}")
    return start


def drive(
    program: Program,
    run_dir: Path,
    *,
    resume: Start | None,
    address: str | None,
    again: str,
    say: Say,
    claimed: Claim | None = None,
    start_number: int = -1,
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
            options: dict[str, Any] = {"claim": claimed, "start_number": start_number, "resume": resume}
            with files_named():
                outcome = _run_on_loop(program, address, run_dir, options, sinks, companion)
        except (FlowrlError, KeyboardInterrupt) as error:
            _report(again, run_dir, None, sinks.view, failure=str(error) or "aborted", say=sinks.say)
            raise
    _report(again, run_dir, outcome, sinks.view, failure="", say=say)
    return outcome


def _report(again: str, run_dir: Path, outcome: Outcome | None, view: RunView, *, failure: str, say: Say) -> None:
    """Write the report beside the run and, unless it failed, print it."""
    checkpoints = complete_checkpoints(run_dir / "checkpoints")
    is_done = view.last_step is not None and view.last_step.version >= view.last_step.num_steps
    resume = again if checkpoints or not again else f"{again} --from-start"
    ending = Ending(
        name=run_dir.name,
        totals=outcome.totals if outcome else {},
        checkpoint=str(checkpoints[-1]) if checkpoints else "",
        best=_best(run_dir / "checkpoints"),
        resume="" if is_done else resume,
        was_stopped=outcome is not None and outcome.was_stopped,
        failure=failure,
    )
    text, known = report(view, ending), f"what is known of the run is in {run_dir / 'report.txt'}"
    try:
        write_report(run_dir / "report.txt", text)
        write_ending(run_dir, ending)
    except OSError as error:  # whoever reads the terminal is told all the same
        known = f"its report is not written ({error})"
        if not failure:
            say(known)
    if failure:
        say(known)
        if ending.resume:
            say(f"{'continue it' if checkpoints else 'begin again'} with: {ending.resume}")
    else:
        say("\n" + text.rstrip())


def _best(directory: Path) -> str:
    """Return which version scored best, where evaluations say that; "" where they do not."""
    if read_rated(directory) is None or (best := best_version(directory)) is None:
        return ""
    where = str(best.checkpoint) if best.checkpoint else "the model that the run began with"
    return f"version {best.version}, {best.by} {best.score:.4g}: {where}"


def _run_on_loop(
    program: Program, address: str | None, run_dir: Path, options: dict[str, Any], sinks: Sinks, companion: RunCompanion
) -> Outcome:
    import uvloop

    async def body() -> Outcome:
        stopping = asyncio.Event()
        with _stops(stopping, sinks, program.settings.stop_grace_s, companion):
            scaling = Scaling()
            following = asyncio.create_task(follow_scale(run_dir, scaling))
            try:
                told = {**options, "stopping": stopping, "scaling": scaling}
                return await _start(program, address, run_dir, told, sinks)
            finally:
                following.cancel()

    try:
        return uvloop.run(body())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _start(
    program: Program, address: str | None, run_dir: Path, options: dict[str, Any], sinks: Sinks
) -> Outcome:
    settings: RunSettings = program.settings
    told: dict[str, Any] = {
        "run_dir": run_dir,
        "consume": sinks.consume,
        "stall_timeout_s": settings.stall_timeout_s,
        "heartbeat_timeout_s": settings.heartbeat_timeout_s,
        "max_restarts": settings.max_restarts,
        "placing": settings.cluster,
        **options,
    }
    if settings.runtime == "local":
        from flowrl.runtime.local import LocalOptions, run_local

        quiet_libraries(has_engines=True)
        return await run_local(program.graph, LocalOptions(**told))
    from flowrl.runtime.cluster import Cluster
    from flowrl.runtime.ray import run_ray
    from flowrl.runtime.readiness import bring_code, check_survey, survey

    cluster = Cluster(program.graph, address)
    try:
        await cluster.start()
        if address is not None:
            found = await survey(cluster, program, run_dir)
            check_survey(found, program.graph, sinks.say)
            told["moved"] = bring_code(found, run_dir, sinks.say)
        return await run_ray(program.graph, Options(**told), cluster)
    finally:
        await cluster.close()


@contextlib.contextmanager
def _stops(stopping: asyncio.Event, sinks: Sinks, grace_s: float, companion: RunCompanion) -> Generator[None]:
    """Let the first signal ask for a controlled stop; a second one, or the end of its grace time, cancels the run.

    The stop is asked for before it is said: whoever would hear of it may be gone.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    deadline: asyncio.TimerHandle | None = None
    asked_s = 0.0

    def abort(reason: str) -> None:
        if task is not None:
            task.cancel()
        sinks.warn("run", reason)
        sinks.consume([])

    def stop(number: signal.Signals) -> None:
        nonlocal deadline, asked_s
        if stopping.is_set():
            # A closed terminal or a notice of a batch system asks for nothing more than was asked for.
            if number in ALWAYS and loop.time() - asked_s >= ECHO_S:
                abort(f"{number.name} after a stop was asked for: the run is ended as it is")
            return
        stopping.set()
        asked_s = loop.time()
        deadline = loop.call_later(grace_s, abort, f"not stopped {grace_s:.0f} s after {number.name}: ended as it is")
        sinks.note(
            "run",
            f"stopping ({number.name}): no more prompts are admitted, what is under way is learned and saved; "
            "Ctrl-C again aborts",
        )
        sinks.consume([])

    companion.heed(lambda: loop.call_soon_threadsafe(stop, signal.SIGINT) and None)
    before = {number: signal.getsignal(number) for number in heard()}
    for number in before:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        if deadline is not None:
            deadline.cancel()
        for number in before:
            loop.remove_signal_handler(number)
        put_back(before)
