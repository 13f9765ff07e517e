"""A recorded run is trained again bit for bit, what differs is named, and a run cut short goes on to the same end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from flowrl.engines.torch import TorchEngine
from flowrl.errors import ConfigError, DataError
from flowrl.graph.graph import RunSettings
from flowrl.graph.program import Program, load_program
from flowrl.runs.retrain import RetrainRequest, first_difference, retrain
from flowrl.runtime.launch import drive
from flowrl.runtime.local import LocalOptions, run_local
from flowrl.runtime.rundir import create_run_dir, write_plan
from flowrl.runtime.supervisor import newest_start
from flowrl.stages.reward import Reward
from flowrl.telemetry.events import Event, Step
from tests.contracts.test_synchronous import GROUPS, STEPS, graph
from tests.support.command import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.graph.stage import Context
    from flowrl.messages import Rollouts
    from flowrl.stages.reward import Score

pytestmark = pytest.mark.slow

FAULTY = "model.layers.1.mlp.up_proj.weight"
CUT = 3  # the version at which the run cut short ends


class FaultyEngine(TorchEngine):
    """Loses the last bit of one weight in its second step, as a broken memory might."""

    def _step(self, lr: float) -> float:
        norm = super()._step(lr)
        if self._num_steps == 1:
            weight = self.model.get_parameter(FAULTY).data.view(-1)
            weight[7] = weight[7].nextafter(weight[7] + 1)
        return norm


class HaltingReward(Reward):
    """Scores what the first steps learn from and holds the rest for ever, so that a run cannot pass version `CUT`."""

    async def _score(self, context: Context, function: Score) -> None:
        async def score(group: Rollouts) -> list[float]:
            if group.group_id >= CUT * GROUPS:
                await asyncio.Event().wait()
            return await function(group)

        await super()._score(context, score)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """Return the directory of a run that recorded its steps and kept its newest two checkpoints."""
    directory = create_run_dir(tmp_path_factory.mktemp("runs") / "run").resolve()
    program = Program(path=directory, settings=RunSettings(runtime="local"), graph=graph(tiny, records=True))
    write_plan(directory, program)
    drive(program, directory, resume=None, address=None, again="", say=lambda line: None)
    return directory


@pytest.mark.parametrize(("first", "name"), [(0, "whole"), (STEPS - 1, "from-a-checkpoint")])
def test_training_again_is_equal_bit_for_bit(run_dir: Path, first: int, name: str) -> None:
    said: list[str] = []
    assert retrain(RetrainRequest(run=run_dir, first=first, name=name, compares=True), say=said.append) == 0
    assert said[-1].startswith(f"steps {first} to {STEPS - 1}: ")
    assert not any("no checkpoint" in line for line in said)


def test_a_run_cut_short_and_resumed_equals_one_that_was_not(run_dir: Path, tiny: Path, tmp_path: Path) -> None:
    directory = create_run_dir(tmp_path / "cut").resolve()
    program = Program(path=directory, settings=RunSettings(runtime="local"), graph=graph(tiny, records=True))

    async def cut_short() -> None:
        has_learned = asyncio.Event()

        def consume(events: list[Event]) -> None:
            if any(isinstance(event, Step) and event.version == CUT for event in events):
                has_learned.set()

        halting = graph(tiny, records=True, reward_type=HaltingReward)
        running = asyncio.create_task(run_local(halting, LocalOptions(run_dir=directory, consume=consume)))
        await has_learned.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(cut_short())
    start = newest_start(directory, lambda *said: None)
    drive(program, directory, resume=start, address=None, again="", say=lambda line: None)
    first = start.cut.version if start.cut else 0
    assert 0 < first <= CUT
    assert first_difference(run_dir, directory, range(first, STEPS)) is None
    model = f"checkpoints/step-{STEPS:06d}/model/model.safetensors"
    assert (run_dir / model).read_bytes() == (directory / model).read_bytes()


def test_training_again_names_the_first_step_and_tensor_that_differ(run_dir: Path) -> None:
    plan = run_dir / "graph.json"
    whole = plan.read_text()
    at = whole.index('"learner": {')
    engine = f"{__name__}:FaultyEngine"
    plan.write_text(whole[:at] + whole[at:].replace("flowrl.engines.torch:TorchEngine", engine, 1))
    said: list[str] = []
    try:
        assert retrain(RetrainRequest(run=run_dir, name="faulty", compares=True), say=said.append) == 1
    finally:
        plan.write_text(whole)
    assert said[-1].startswith(f"first difference: step 1, tensor {FAULTY} of version 2: ")


def test_steps_that_were_not_recorded_are_refused(run_dir: Path) -> None:
    with pytest.raises(DataError, match=f"no record of step {STEPS} "):
        retrain(RetrainRequest(run=run_dir, last=STEPS + 2), say=lambda line: None)


def test_a_run_on_given_examples_is_refused(tmp_path: Path, tiny: Path) -> None:
    program = load_program(ROOT / "graphs" / "sft.py", overrides=[f"model={tiny}"])
    write_plan(tmp_path, program)
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step-000000.parquet").touch()
    with pytest.raises(ConfigError, match="not recorded"):
        retrain(RetrainRequest(run=tmp_path), say=lambda line: None)
