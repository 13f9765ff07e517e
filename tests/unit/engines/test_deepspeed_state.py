"""What is asked of a DeepSpeed state before DeepSpeed is."""

from __future__ import annotations

import msgspec
import pytest
import torch

from flowrl.engines.base import Ranks
from flowrl.engines.deepspeed import StateNote, own_steps, read_state
from flowrl.engines.ranks import RankLink
from flowrl.errors import StageError


def test_a_state_of_another_zero_stage_is_refused_with_both_numbers(tmp_path):
    note = StateNote(num_steps=3, num_ranks=2, zero_stage=2)
    (tmp_path / "state.json").write_bytes(msgspec.json.encode(note))
    link = RankLink(Ranks(), where="learner", backend="gloo")
    with pytest.raises(StageError, match=r"saved at zero_stage=2, and zero_stage is 3 now; resume with zero_stage=2"):
        read_state(None, tmp_path, zero_stage=3, link=link, where="learner", leave_out_frozen=False)


@pytest.mark.parametrize("written", [None, b"{", b'{"num_steps": 3}'])
def test_no_state_or_half_of_one_is_refused(tmp_path, written):
    if written is not None:
        (tmp_path / "state.json").write_bytes(written)
    link = RankLink(Ranks(), where="learner", backend="gloo")
    with pytest.raises(StageError, match=r"no state of this engine in .*; check --resume"):
        read_state(None, tmp_path, zero_stage=3, link=link, where="learner", leave_out_frozen=False)


def test_every_part_counts_its_own_steps_where_its_moments_are():
    shared, weights = torch.tensor(3.0), [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW(weights)
    for weight, device in zip(weights[:2], ("cpu", "meta"), strict=True):
        optimizer.state[weight] = {"step": shared, "exp_avg": torch.zeros(2, device=device)}
    own_steps(optimizer)
    here, there = (optimizer.state[weight]["step"] for weight in weights[:2])
    here += 1
    assert (here, shared) == (4.0, 3.0)
    assert (there.device.type, there.dtype) == ("meta", torch.float32)
