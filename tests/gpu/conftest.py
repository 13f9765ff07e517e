"""What a device shows of flowrl: each test takes under a minute on one GPU and leaves its figures for one table.

Without a CUDA device the tests are skipped; with `--anywhere` they run on the CPU as far as that goes, on a smaller
model, through the same code. `bash scripts/gpu_check.sh [--anywhere]` runs them.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch

from flowrl.config import widen
from flowrl.engines.base import Ranks, TrainingConfig
from flowrl.engines.deepspeed import DeepSpeedEngine
from flowrl.graph.program import load_program
from flowrl.runtime.devices import visible_machine
from flowrl.runtime.placement import place
from perf.machine import machine
from perf.markdown import markdown_table
from perf.memory import write_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZES = {"cuda": (1536, 20, 4096), "cpu": (384, 6, 1024)}  # hidden, layers, intermediate: 528e6 and 17e6 parameters
BUDGET = {"cuda": 8192, "cpu": 640}  # tokens of a micro-batch
GRAPH = Path(__file__).parents[2] / "graphs" / "group_async.py"
SETTINGS = [
    "generator.dtype=bfloat16",
    "learner.dtype=bfloat16",
    "learner.zero_stage=2",
    "learner.schedule.kind=constant",
]
FIGURES = pytest.StashKey[list[tuple[str, str]]]()

if torch.cuda.is_available():
    os.environ.pop("TORCHDYNAMO_DISABLE", None)  # vLLM compiles there, as in a run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--anywhere", action="store_true", help="run on the CPU where there is no CUDA device")


def runs(config: pytest.Config) -> bool:
    """Return whether there is what the tests are to run on."""
    return torch.cuda.is_available() or bool(config.getoption("--anywhere", default=False))


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Leave the tests out where there is nothing for them."""
    return None if runs(config) else True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not runs(config):
        terminalreporter.write_line("tests/gpu: skipped, there is no CUDA device (--anywhere: on the CPU)")
    figures = config.stash.get(FIGURES, [])
    if figures:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        terminalreporter.write_line(f"\n{name}; {machine()}\n\n{markdown_table(('figure', 'measured'), figures)}")


@pytest.fixture(scope="session")
def device() -> str:
    """Return the kind of device that engines find."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def model(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), *SIZES[device])


@pytest.fixture(scope="session")
def nodes(model: Path) -> dict[str, Any]:
    """Return the settings of a graph's nodes as `flowrl run` places them on this machine."""
    place_here = partial(place, machine=visible_machine())
    program = load_program(GRAPH, overrides=[f"model={model}", *SETTINGS], placing=place_here)
    return {name: node.config for name, node in program.graph.nodes.items()}


@pytest.fixture(scope="session")
def learner(model: Path, device: str, nodes: dict[str, Any]) -> Iterator[DeepSpeedEngine]:
    given = msgspec.structs.replace(nodes["learner"], micro_batch_tokens=BUDGET[device], lr=1e-4)
    engine = DeepSpeedEngine(widen(TrainingConfig, given, model=str(model)), where="learner", name="gpu-check")
    engine.open(Ranks())
    yield engine
    engine.close()


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return what puts a figure into the table."""
    return lambda name, text: request.config.stash.setdefault(FIGURES, []).append((name, text))
