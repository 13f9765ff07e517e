"""What prediction and advice add to a run: lines before it starts, a profile and hints while it goes on.

Invariant: a run with or without this companion is the same run. Handed to runtime/launch.py by the command line.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from flowrl.runtime.launch import RunCompanion
from flowrl.simulation.profiler import ProfileFile
from flowrl.simulation.run import can_simulate
from flowrl.telemetry.events import HINT
from flowrl.tuning.forecast import forecast
from flowrl.tuning.hints import Hints

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from flowrl.graph.program import Program
    from flowrl.telemetry.sinks import Sinks


class Advised(RunCompanion):
    """Predicts a run from the runs beside it, measures its costs, and says which setting would make it quicker."""

    def foretell(self, program: Program, runs_dir: Path) -> Iterable[str]:
        """Return the prediction; see `forecast`."""
        return forecast(program, runs_dir)

    def add_sinks(self, program: Program, run_dir: Path, sinks: Sinks) -> None:
        """Add the profile, and hints where the graph can be simulated and its settings want them."""
        sinks.add("profile", lambda: ProfileFile(run_dir))
        if program.settings.hints and can_simulate(program.graph):
            sinks.add("hints", lambda: Hints(run_dir, program, tell=functools.partial(sinks.note, HINT)))
