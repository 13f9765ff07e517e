"""Ranks on two machines train as ranks on one do: the same losses and the same weights after some steps."""

from __future__ import annotations

import json
import pickle
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from flowrl.graph.stage import Ranks
from tests.contracts.test_training_engines import DEEPSPEED, Outcome, rank_main, two_steps
from tests.support.cluster import machines

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.support.cluster import Machine

pytestmark = [pytest.mark.slow, pytest.mark.long]

PORT = 29_500  # of the first machine, which has nothing else to do
TOLERANCE = 1e-6


def trained(on: Sequence[Machine], model: Path, directory: Path, zero_stage: int) -> Outcome:
    """Take two steps with a rank on each of the machines, which may be one twice."""
    directory.mkdir()
    started = []
    for rank, machine in enumerate(on):
        told = json.dumps([rank, on[0].address, str(model), str(directory), zero_stage])
        command = [sys.executable, "-m", "tests.cluster.test_ranks_across", told]
        log = directory / f"log-{rank}"
        started.append((machine.start(command, log=log, GLOO_SOCKET_IFNAME="eth0", DS_ACCELERATOR="cpu"), log))
    for process, log in started:
        assert process.wait(240) == 0, log.read_text()
    return pickle.loads((directory / "result").read_bytes())


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_machines_take_the_steps_of_one(model: Path, disk: Path, zero_stage: int) -> None:
    with machines(2) as (first, second):
        alone = trained([first, first], model, disk / "one", zero_stage)
        apart = trained([first, second], model, disk / "two", zero_stage)
    for mine, theirs in ((apart.scores, alone.scores), (apart.after, alone.after)):
        assert mine == [pytest.approx(row, abs=TOLERANCE) for row in theirs]
    assert apart.figures == [pytest.approx(step, abs=TOLERANCE) for step in alone.figures]
    assert apart.scores != apart.after, "they have learned"
    assert apart.saved.keys() == alone.saved.keys()
    for name, tensor in alone.saved.items():
        torch.testing.assert_close(apart.saved[name], tensor, atol=TOLERANCE, rtol=0)


def be_rank(rank: int, address: str, model: str, directory: str, zero_stage: int) -> None:
    ranks = Ranks(rank=rank, world_size=2, address=address, port=PORT)
    rank_main(ranks, two_steps, DEEPSPEED, model, directory, {"zero_stage": zero_stage})


if __name__ == "__main__":
    be_rank(*json.loads(sys.argv[1]))
