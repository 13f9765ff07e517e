"""Runs to be judged, and `flowrl feedback` as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from typing import TYPE_CHECKING, Self

import msgspec

from flowrl.data.judgments import PRIVATE, QUESTIONS, Question, ask
from flowrl.graph.program import load_program
from flowrl.runtime.rundir import create_run_dir, write_plan
from tests.support.command import ROOT, SCRIPT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.data.judgments import Way


def asking_run(
    run_dir: Path, pairs: Sequence[tuple[str, str]], *, way: Way = "pairs", overrides: Sequence[str] = ()
) -> list[Question]:
    """Write the directory of a run that asks about pairs of answers; returns what it asks."""
    create_run_dir(run_dir)
    write_plan(run_dir, load_program(ROOT / "graphs" / "humans_dpo.py", overrides=[*overrides]))
    questions = [
        ask(number, f"question {number}", pair, way=way, version=number, places=[0, 1])
        for number, pair in enumerate(pairs)
    ]
    tell(run_dir, *questions)
    return questions


def tell(run_dir: Path, *lines: msgspec.Struct) -> None:
    """Write lines as the humans stage does."""
    with open(os.open(run_dir / QUESTIONS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE), "ab") as file:
        file.writelines(msgspec.json.encode(line) + b"\n" for line in lines)


class Served:
    """`flowrl feedback` on a run; `address` has the token, `kill` is SIGKILL."""

    def __init__(self, run_dir: Path, *options: str, port: int = 0) -> None:
        self.run_dir, self.options, self.port = run_dir, options, port
        self.start()

    def start(self) -> None:
        """Start it, again on the port that it had."""
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [SCRIPT, "feedback", self.run_dir, "--port", str(self.port), *self.options],
            env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if found := re.search(r"http://\S+:(\d+)/#\S+", line):
                self.address, self.port = found.group(), int(found.group(1))
                return
        raise AssertionError(said)

    def kill(self) -> None:
        """Kill it, as the machine would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
