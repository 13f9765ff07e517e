"""Drive a small flow on fake engines as `flowrl run` drives a graph: `python -m tests.support.driven RUN_DIR RUNTIME`.

Settings of RunSettings may follow as NAME=VALUE, `resume` goes on from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import msgspec

from flowrl.errors import FlowrlError, let_go_of_output, say
from flowrl.graph.graph import RunSettings
from flowrl.graph.program import Program
from flowrl.runtime.launch import drive
from flowrl.runtime.rundir import claim, write_plan
from flowrl.runtime.supervisor import newest_start
from flowrl.stages.learner import Learner
from tests.support.flows import FlowSettings, flow

SETTINGS = FlowSettings(
    seed=0, steps=1_000_000, groups_per_step=4, window=1, max_staleness=2, generators=1, scorers=1, depth=8,
    token_s=0.005, sigma=0.5, update_s=0.02, score_s=0.02, train_s=0.02, filter_every=7, initial=12, save_every=5,
    is_finite=False,
)  # fmt: skip


def main(directory: str, runtime: str, *told: str) -> int:
    run_dir = Path(directory)
    given = dict(each.split("=") for each in told if each != "resume")
    settings = msgspec.convert({"runtime": runtime, "hints": False, **given}, RunSettings, strict=False)
    program = Program(path=Path(__file__), settings=settings, graph=flow(SETTINGS, Learner))
    try:
        with contextlib.closing(claim(run_dir, say)) as claimed:
            resume = newest_start(run_dir, lambda *said: say(" ".join(said))) if "resume" in told else None
            drive(program, run_dir, claimed=claimed, start_number=write_plan(run_dir, program), resume=resume,
                  address=None, again="", say=say)  # fmt: skip
    except FlowrlError as error:
        say(f"driven: {error}", aside=True)
        return error.exit_code
    except KeyboardInterrupt:
        say("driven: aborted", aside=True)
        return 130
    finally:
        let_go_of_output()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
