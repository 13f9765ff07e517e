"""Run the flowrl command as a user does, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.graph.program import load_program

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parents[2]
GRAPH = ROOT / "graphs" / "ppo_async.py"


@dataclass(frozen=True)
class Result:
    code: int
    lines: list[str]  # standard output and error as they came

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def flowrl(
    *arguments: str | Path, cwd: Path, timeout_s: float = 300.0, on_line: Callable[[str], bool] | None = None,
    environment: dict[str, str] | None = None,
) -> Result:  # fmt: skip
    """Run `flowrl ARGUMENTS` to its end; sends Ctrl-C once for every line that `on_line` says yes to."""
    command = [sys.executable, "-m", "flowrl.cli", *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(environment or {})}
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=cwd, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if on_line is not None and on_line(line):
                    process.send_signal(signal.SIGINT)
            return Result(code=process.wait(timeout=timeout_s), lines=lines)
        finally:
            if process.poll() is None:
                process.kill()


def descendants_of(marker: str) -> list[str]:
    """Return the command lines of living processes that mention `marker`, this one excepted."""
    found: list[str] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if marker in command:
                found.append(command)
    return found


def tiny_settings(model: Path, graph: Path = GRAPH, **more: object) -> Sequence[str]:
    """Return --set options that make a shipped graph a run of seconds on the tiny model."""
    settings: dict[str, object] = {
        "model": model,
        "steps": 3,
        "groups_per_step": 4,
        "generator.group_size": 2,
        "sampling.max_tokens": 8,
        "data.num_train": 64,
        "data.num_heldout": 4,
        "evaluation.samples": 2,
        "generator.dtype": "float32",
        "learner.dtype": "float32",
        "critic.dtype": "float32",
        "reference.dtype": "float32",
        "generator.kv_cache_bytes": 64 << 20,
        "agent.group_size": 2,
        "agent.dtype": "float32",
        "agent.kv_cache_bytes": 64 << 20,
        **more,
    }
    known = load_program(graph).settings.__struct_fields__
    return [
        part
        for name, value in settings.items()
        if name.partition(".")[0] in known
        for part in ("--set", f"{name}={value}")
    ]
