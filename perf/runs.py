"""Run a graph to its end as its users do, with settings given as a tree, for a benchmark that measures it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]


def run_graph(graph: Path, tree: dict[str, Any], *, label: str, overrides: Sequence[str], runs_dir: Path) -> Path:
    """Run a graph and return its run's directory, without the gigabytes of its checkpoints.

    What it printed lies beside that.

    Raises:
        RunError: the run failed.
    """
    import yaml

    runs_dir.mkdir(parents=True, exist_ok=True)
    name = f"{label}-{time.time_ns() // 1_000_000}"
    config = runs_dir / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "flowrl.cli", "run", str(graph), "--config", str(config), "--name", name,
               "--runs-dir", str(runs_dir)]  # fmt: skip
    for override in overrides:
        command += ["--set", override]
    with (runs_dir / f"{name}.out").open("w") as out:
        code = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise RunError(label, f"its run ended with {code}", f"see {out.name}")
    shutil.rmtree(runs_dir / name / "checkpoints", ignore_errors=True)
    return runs_dir / name
