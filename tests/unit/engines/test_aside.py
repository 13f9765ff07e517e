import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowrl.engines.aside import Aside, tensors_of
from flowrl.engines.base import TrainingConfig
from flowrl.engines.deepspeed import BUFFERS, DeepSpeedEngine


def test_bytes_go_and_come_back_and_views_stay_views(tmp_path):
    flat = torch.arange(40_000, dtype=torch.float32)
    view, small, copy = flat[10:20], torch.ones(8), flat.clone()
    aside = Aside(str(tmp_path))
    assert aside.put([flat, view, small]) == 160_000, "a storage once; what is small stays"
    assert flat.untyped_storage().nbytes() == 0
    assert small.sum() == 8
    aside.back()
    assert torch.equal(flat, copy)
    flat[10] = -1.0
    assert view[0] == -1.0
    assert not [*tmp_path.iterdir()], "a file without a name"


def test_scratch_is_emptied_and_not_kept(tmp_path):
    kept, scratch = torch.arange(10_000), torch.ones(50_000)
    aside = Aside(str(tmp_path))
    assert aside.put([kept], [scratch]) == 280_000
    assert scratch.untyped_storage().nbytes() == 0
    aside.back()
    assert torch.equal(kept, torch.arange(10_000))
    assert scratch.shape == (50_000,)
    assert scratch.untyped_storage().nbytes() == 200_000


def test_where_the_disk_takes_nothing_everything_stays(tmp_path, monkeypatch):
    flat = torch.arange(40_000)
    with pytest.raises(OSError, match="No such file"):
        Aside(str(tmp_path / "gone")).put([flat])
    assert flat[-1] == 39_999


def test_what_cannot_be_emptied_stays(tmp_path):
    mapped = torch.frombuffer(bytearray(1 << 16), dtype=torch.uint8)
    assert Aside(str(tmp_path)).put([mapped]) == 0
    assert mapped.untyped_storage().nbytes() == 1 << 16


def test_an_optimizer_tells_what_it_steps_on_with_gradients_and_moments():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(4)
    optimizer.step()
    told = [*tensors_of(optimizer)]
    moments = [optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq")]
    assert all(any(each is tensor for each in told) for tensor in (weight, weight.grad, *moments))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("device", "num_given"), [("cpu", 4), ("cuda", 0)])
def test_deepspeed_puts_aside_what_lies_on_its_device_and_not_what_is_offloaded(
    device, num_given, zero_stage, monkeypatch
):
    engine = DeepSpeedEngine(TrainingConfig(model="", zero_stage=zero_stage), where="learner", name="test")
    engine.device, engine._is_training = torch.device(device), True
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(4)
    optimizer.step()
    fake: Any = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer) if zero_stage else optimizer)
    engine._engine = fake
    given: list[Any] = []
    monkeypatch.setattr(Aside, "put", lambda self, tensors, scratch: given.extend(tensors))
    engine.reader = torch.nn.Module()  # type: ignore[assignment]
    engine._put_aside()
    assert len({id(each) for each in given if each.numel() > 1}) == num_given, "weights, gradients, both moments"


@pytest.mark.slow
def test_every_buffer_of_deepspeeds_optimizers_is_handed_in():
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    text = "".join(inspect.getsource(each) for each in (bf16_optimizer, stage3, stage_1_and_2))
    assert [name for name in BUFFERS if f"self.{name}" not in text] == []
    assert not hasattr(bf16_optimizer.BF16_Optimizer, "offload_states"), "not every one can move its own"
