"""Work on a model's files in a process of its own, because the libraries that do it talk and stay.

What they print (progress bars, warnings about accelerators) is kept from the run's first lines, and torch's memory goes
with the process. Called where a model is converted or merged.

Tests: tests/unit/data/test_model_process.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec

from flowrl.errors import FlowrlError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Not `python -m`: that finds flowrl only where it is installed or in the working directory, and may find another one.
BOOT = "import os, sys; sys.path[:] = sys.argv[1].split(os.pathsep); from flowrl.data.model_process import main; main()"
REFUSED = 3  # exit code: the last line of output is an error of ours


def run_in_process(function: Callable[..., None], *arguments: Path, where: str) -> None:
    """Call a module's function with paths in a process of its own; blocks.

    Raises:
        ModelError: it raised, or its process died.
    """
    path = f"{function.__module__}:{function.__qualname__}"
    command = [sys.executable, "-c", BOOT, os.pathsep.join(sys.path), path, *map(str, arguments)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode == REFUSED:
        raise ModelError(*msgspec.json.decode(done.stdout.splitlines()[-1], type=tuple[str, str, str]))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ModelError(where, f"cannot be prepared (exit code {done.returncode}: {last})", "see `flowrl doctor`")


def main() -> None:
    """Be that process."""
    from pathlib import Path

    from flowrl.imports import load_object

    path, *arguments = sys.argv[2:]
    try:
        load_object(path, "model process")(*map(Path, arguments))
    except FlowrlError as error:
        print(f"\n{msgspec.json.encode((error.where, error.what, error.remedy)).decode()}", flush=True)
        sys.exit(REFUSED)
