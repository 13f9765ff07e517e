"""flowrl from Python: what `flowrl.run`, `flowrl.check` and `flowrl.load_run` do, in scripts and notebooks.

    run = flowrl.run("graphs/group_async.py", {"steps": 2, "reward.function": "my_rewards.py:score"})
    run.evaluations[-1]["mean"]

Settings have the addresses of `--set`; a value may be a mapping of its parts, or a function or class from a file.
Errors are those of the command line (`FlowrlError`). Where an event loop runs already, as in a notebook, a run has a
thread of its own; an interrupt then stops it as Ctrl-C does. Called by users; imports little until it is called.

Tests: tests/graphs/test_python_api.py
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from flowrl.errors import ConfigError, DataError, FlowrlError
from flowrl.imports import path_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.runs.verify import Verdict

T = TypeVar("T")
Say = Callable[[str], None]
Settings = Mapping[str, Any]

__all__ = ["FlowrlError", "Run", "check", "load_run", "run"]


def run(
    graph: str | Path, settings: Settings | None = None, *, config: str | Path | None = None, name: str | None = None,
    runs_dir: str | Path = "runs", resume: str | Path | None = None, address: str | None = None, say: Say = print,
) -> Run:  # fmt: skip
    """Run a graph file to its end, as `flowrl run` does, and return what it left.

    Raises:
        UserError: something is wrong with the request; nothing was started or written.
        RunError: the run failed.
    """
    from flowrl.runtime.launch import RunRequest, launch
    from flowrl.tuning.companion import Advised

    request = RunRequest(
        graph=Path(graph), config=_path(config), overrides=overrides_of(settings or {}), name=name,
        runs_dir=Path(runs_dir), resume=_path(resume), address=address,
    )  # fmt: skip
    interrupts: list[Callable[[], None]] = []

    class Interruptible(Advised):
        def heed(self, interrupt: Callable[[], None]) -> None:
            interrupts.append(interrupt)

    return Run(
        _outside_loop(
            lambda: launch(request, say=say, companion=Interruptible()),
            interrupt=lambda: interrupts[-1]() if interrupts else None,
        )
    )


def check(
    graph: str | Path, settings: Settings | None = None, *, config: str | Path | None = None, say: Say = print
) -> str:
    """Check a graph file and all that its run needs, as `flowrl check` does, and return the plan as text.

    Raises:
        UserError: the first thing that is missing or wrong.
    """
    from flowrl.graph.program import load_program
    from flowrl.runtime.launch import check_program, describe
    from flowrl.tuning.companion import Advised

    overrides, placing = overrides_of(settings or {}), Advised().placing()
    program = load_program(Path(graph), config=_path(config), overrides=overrides, placing=placing)
    _outside_loop(lambda: check_program(program, say=say, address=None))
    return describe(program)


def load_run(directory: str | Path) -> Run:
    """Return a run by its directory; it may be running still.

    Raises:
        ConfigError: there is none.
    """
    from flowrl.runtime.rundir import existing_run

    return Run(existing_run(Path(directory).expanduser()))


class Run:
    """What a run has left on disk, each part read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return its settings, with all defaults."""
        from flowrl.runtime.rundir import read_settings

        return read_settings(self.path / "settings.yaml")

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Return the figures of each step, with its version; a table for pandas.DataFrame."""
        from flowrl.telemetry.metrics import read_steps

        return [{"version": version, **figures} for version, figures in read_steps(self._file("metrics.jsonl")).items()]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Return each evaluation: version, mean, half_width (of 95 %), scores by prompt, a few completions."""
        from flowrl.telemetry.metrics import read_evaluations, row_of

        return [row_of(each) or {} for each in read_evaluations(self._file("metrics.jsonl"))]

    @property
    def report(self) -> str:
        """Return the report that was written at its end."""
        return self._file("report.txt").read_text()

    @property
    def model(self) -> Path:
        """Return the directory of its newest model, in Hugging Face format."""
        from flowrl.data.models import prepare_model

        return prepare_model(str(self.path))

    def rollouts(self, where: str = "", *, columns: Sequence[str] = (), limit: int = 1_000) -> list[dict[str, Any]]:
        """Return recorded samples, those that an expression chooses ("reward < 0 and staleness > 0")."""
        from flowrl.runs.inspection import RecordedRollouts

        return RecordedRollouts(self.path).choose(where, limit=limit, columns=columns).rows

    def verify(self) -> Verdict:
        """Prove from its files that nothing was lost, learned twice or too stale."""
        from flowrl.runs.verify import verify_run

        return verify_run(self.path)

    def _file(self, name: str) -> Path:
        file = self.path / name
        if not file.is_file():
            raise DataError(str(file), "is not there (yet)", "wait until the run has written it")
        return file


def overrides_of(settings: Settings, at: str = "") -> list[str]:
    """Return settings as `--set` takes them.

    {"steps": 2, "learner": {"lr": 1e-6}} is ["steps=2", "learner.lr=1.0e-06"].

    Raises:
        ConfigError: a value cannot be written down, such as a function that stands in no file.
    """
    found: list[str] = []
    for name, value in settings.items():
        path = f"{at}.{name}" if at else str(name)
        plain = msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else value
        if isinstance(plain, Mapping) and plain:
            found += overrides_of(cast("Settings", plain), path)
        else:
            found.append(f"{path}={_written(plain, path)}")
    return found


def _written(value: Any, path: str) -> str:
    import yaml

    if isinstance(value, str | Path):
        return str(value)
    if callable(value):
        if getattr(value, "__module__", "__main__") == "__main__" or "<" in value.__qualname__:
            what = f"{value!r} stands in no file, so no other process can load it"
            raise ConfigError(path, what, "write it to a file, and give file.py:name")
        return path_of(value)
    try:
        text = yaml.safe_dump(msgspec.to_builtins(value), default_flow_style=True, width=1 << 30)
    except TypeError as error:
        raise ConfigError(
            path, f"a {type(value).__name__} cannot be a setting ({error})", "give a plain value"
        ) from error
    return text.partition("\n...")[0].strip()


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(given)


def _outside_loop(function: Callable[[], T], *, interrupt: Callable[[], None] = lambda: None) -> T:
    """Call a function that runs an event loop of its own: in a thread where this one has a loop already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function()
    outcome: list[T] = []
    failure: list[BaseException] = []
    done = threading.Event()

    def body() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    with contextlib.suppress(KeyboardInterrupt):  # nothing runs yet that could be stopped
        threading.Thread(target=body, name="flowrl", daemon=True).start()
    while not done.is_set():  # not `join`: once interrupted, it takes the thread for ended
        try:
            done.wait()
        except KeyboardInterrupt:
            interrupt()
    if failure:
        raise failure[0]
    return outcome[0]
