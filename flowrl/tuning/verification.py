"""Runs the best settings of a tuning for real, for a few steps, and holds what was predicted against them.

Each is a run of its own process, with its own directory under `runs_dir`, so that whatever a run leaves in a process is
gone before the next. Invariants: settings are run in the order of the tuning, one after the other, with nothing beside
them; what a run learned is deleted when it has ended, since each would keep gigabytes that nobody asked for. Used by
`flowrl tune --verify`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import msgspec

from flowrl.errors import RunError
from flowrl.graph.program import load_program
from flowrl.simulation.accuracy import Accuracy, accuracy, describe
from flowrl.simulation.costs import load_profile
from flowrl.tuning.knobs import Setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from flowrl.tuning.trials import Trial, TuneRequest
    from flowrl.tuning.tune import Tuning

SHOWN_LINES = 15  # of a failed run's output


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """A setting that was run."""

    setting: Setting
    run_dir: str
    found: Accuracy


def chosen(tuning: Tuning, num: int) -> list[Trial]:
    """Return the settings to run: the recommended one, the present one, then the front from the fastest down."""
    wanted = [tuning.recommended, tuning.present, *reversed(tuning.front)]
    return list({frozenset(trial.setting.items()): trial for trial in wanted}.values())[:num]


def verify(
    request: TuneRequest, settings: Iterable[Setting], *, steps: int, runs_dir: Path, say: Callable[[str], None]
) -> Iterator[Verified]:
    """Run settings for so many steps each, one after the other, and yield how near each prediction came.

    Raises:
        RunError: a run failed; the end of its output is in the message.
    """
    profile = load_profile(request.profile)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for place, setting in enumerate(settings):
        words = in_words(setting)
        say(f"running {words} for {steps} steps")
        run_dir = runs_dir / f"tune-{stamp}-{place}"
        _run(request, setting, steps, run_dir)
        graph = load_program(request.graph, config=run_dir / "settings.yaml").graph
        found = accuracy(run_dir, graph, profile)
        say(describe(found, words))
        yield Verified(setting=setting, run_dir=str(run_dir), found=found)


def in_words(setting: Setting) -> str:
    """Return a setting as it would be given, without `--set`."""
    return " ".join(f"{path}={value}" for path, value in setting.items()) or "as it is"


def _run(request: TuneRequest, setting: Setting, steps: int, run_dir: Path) -> None:
    changes = [f"{path}={value}" for path, value in setting.items()]
    command = [sys.executable, "-m", "flowrl.cli", "run", str(request.graph), "--name", run_dir.name,
               "--runs-dir", str(run_dir.parent)]  # fmt: skip
    if request.config is not None:
        command += ["--config", str(request.config)]
    for override in [*request.overrides, *changes, f"steps={steps}", "hints=false"]:
        command += ["--set", override]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        said = "\n".join((ended.stdout + ended.stderr).splitlines()[-SHOWN_LINES:])
        raise RunError(str(run_dir), f"the run ended with {ended.returncode}", said)
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
