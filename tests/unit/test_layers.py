"""What is heavy stays where it belongs, also at run time: import-linter sees imports inside functions as well, this
sees what has been loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "ray", "vllm", "deepspeed", "transformers", "datasets", "pyarrow", "pandas", "wandb", "numpy", "rich"}
LIGHT_MODULES = "flowrl, flowrl.cli, flowrl.config, flowrl.messages, flowrl.engines.base"


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after running `statement`."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


@pytest.mark.slow
def test_importing_flowrl_loads_nothing_heavy():
    assert not loaded_by(f"import {LIGHT_MODULES}") & HEAVY


@pytest.mark.slow
@pytest.mark.parametrize("graph", sorted((ROOT / "graphs").glob("*.py")), ids=lambda path: path.stem)
def test_building_a_graph_loads_no_engine(graph: Path):
    statement = (
        "from pathlib import Path\nfrom flowrl.graph.program import load_program\n"
        f"load_program(Path({str(graph)!r}), config=None, overrides=[])"
    )
    assert not loaded_by(statement) & {"torch", "ray", "vllm", "deepspeed", "transformers", "datasets", "pyarrow"}
