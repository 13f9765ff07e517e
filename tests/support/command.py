"""Run the flowrl command (flowrl.cli:main) as a user does: the console script, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.graph.program import load_program

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parents[2]
GRAPH = ROOT / "graphs" / "ppo_async.py"
SCRIPT = Path(sys.executable).with_name("flowrl")  # the console script, as a user starts it


@dataclass(frozen=True)
class Result:
    code: int
    lines: list[str]  # standard output and error as they came

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def flowrl(
    *arguments: str | Path, cwd: Path, on_line: Callable[[str], signal.Signals | None] = lambda line: None
) -> Result:
    """Run `flowrl ARGUMENTS` to its end; sends it the signal that `on_line` answers a line with, if any."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    lines: list[str] = []
    with subprocess.Popen(
        [SCRIPT, *map(str, arguments)], cwd=cwd, env=variables, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if (number := on_line(line)) is not None:
                    process.send_signal(number)
            return Result(code=process.wait(), lines=lines)
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
        "heartbeat_timeout_s": 1800.0,  # on a busy machine a process may be slow to answer, and is not dead for it
        **more,
    }
    known = load_program(graph).settings.__struct_fields__
    return [
        part
        for name, value in settings.items()
        if name.partition(".")[0] in known
        for part in ("--set", f"{name}={value}")
    ]


def plain_data(directory: Path) -> dict[str, object]:
    """Write prompts and return settings that ask them: no process loads reasoning-gym, which takes each a second."""
    rows = [{"prompt": f"What is {k} + {k}?", "answer": str(2 * k)} for k in range(68)]
    source = directory / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data.source": source, "reward.function": "flowrl.rewards.verify:exact_answer"}
