"""LoRA on every training engine, ZeRO stage and number of ranks: the same steps, adapters alone in what is saved."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl.engines.base import Lora, Ranks
from flowrl.errors import ConfigError
from tests.contracts.test_training_engines import (
    DEEPSPEED,
    GROUPS,
    TORCH,
    Outcome,
    assert_same,
    engine_of,
    two_steps,
)
from tests.support.ranks import start_ranks
from tests.support.tiny import tiny_model
from tests.unit.engines.test_trainer import WeightedTokens, choose

pytestmark = pytest.mark.slow

LORA = Lora(rank=4, alpha=8)
STAGES = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def opened(path: str, model: Path, *, ranks: Ranks | None = None, **settings: Any):
    engine = engine_of(path, model, **{"lora": LORA, **settings})
    engine.open(ranks or Ranks())
    return engine


def steps_of(path: str, model: Path, directory: Path, **settings: Any) -> Outcome:
    engine = opened(path, model, **settings)
    try:
        return two_steps(engine, directory)
    finally:
        engine.close()


@pytest.fixture(scope="module", params=["policy", "value"])
def head(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def measure(model, head, tmp_path_factory) -> Outcome:
    """Return what plain torch does on one rank."""
    return steps_of(TORCH, model, tmp_path_factory.mktemp("measure"), head=head)


@pytest.mark.parametrize(
    ("head", "zero_stage"), [*(("policy", stage) for stage in STAGES), ("value", 3)], indirect=["head"]
)
def test_deepspeed_takes_the_adapter_steps_of_plain_torch(model, head, measure, tmp_path, zero_stage):
    found = steps_of(DEEPSPEED, model, tmp_path, head=head, zero_stage=zero_stage)
    assert_same(found, measure)


def resumption(engine, directory: Path) -> list[Any]:
    """Return steps 3 and 4 twice: straight on, and again from the state after step 2."""
    objective = choose(WeightedTokens)
    for _ in range(2):
        engine.accumulate(GROUPS, objective)
        engine.apply()
    engine.save_state(directory / "state")
    runs = []
    for _ in range(2):
        runs.append([(engine.accumulate(GROUPS, objective), engine.apply()) for _ in range(2)])
        engine.load_state(directory / "state")
    return runs


def adapter_bytes(model: Path) -> int:
    engine = opened(TORCH, model)
    size = sum(each.numel() * each.element_size() for _, each in engine._adapter.parameters())
    engine.close()
    return size


@pytest.mark.parametrize(("path", "zero_stage"), [(TORCH, 0), (DEEPSPEED, 1), (DEEPSPEED, 2)])
def test_a_new_engine_continues_from_adapters_alone(model, tmp_path, path, zero_stage):
    engine = opened(path, model, zero_stage=zero_stage)
    straight, again = resumption(engine, tmp_path)
    engine.close()
    assert straight == again
    second = opened(path, model, zero_stage=zero_stage)
    second.load_state(tmp_path / "state")
    assert [(second.accumulate(GROUPS, choose(WeightedTokens)), second.apply()) for _ in range(2)] == straight
    second.close()
    written = sum(file.stat().st_size for file in (tmp_path / "state").rglob("*") if file.suffix != ".py")
    # The float32 values, both moments and a copy in the model's dtype, with the headers of a few files.
    assert written < 4 * adapter_bytes(model) + (1 << 16)


def rank_main(ranks: Ranks, path: str, zero_stage: int, model: str, directory: str) -> None:
    """Be one rank in a process of its own."""
    engine = opened(path, Path(model), zero_stage=zero_stage, ranks=ranks)
    engine.reader.max_logits = 320 * 9  # nine tokens at once, so that ranks need the head a different number of times
    if ranks.rank == 0:
        found = two_steps(engine, Path(directory)), resumption(engine, Path(directory))
        (Path(directory) / "found").write_bytes(pickle.dumps(found))
    else:
        engine.follow()
    engine.close()


@pytest.mark.long
@pytest.mark.parametrize("head", ["policy"], indirect=True)
@pytest.mark.parametrize(("path", "zero_stage"), [(DEEPSPEED, 3)])
def test_two_ranks_take_the_adapter_steps_of_one_and_resume_bit_for_bit(model, measure, tmp_path, path, zero_stage):
    start_ranks(rank_main, (path, zero_stage, str(model), str(tmp_path)))
    steps, (straight, again) = pickle.loads((tmp_path / "found").read_bytes())
    assert_same(steps, measure)
    assert straight == again


def test_adapters_in_bfloat16_keep_float32_values_as_plain_torch_does(model, tmp_path):
    ours = steps_of(DEEPSPEED, model, tmp_path / "deepspeed", dtype="bfloat16", zero_stage=2)
    theirs = steps_of(TORCH, model, tmp_path / "torch", dtype="bfloat16")
    for mine, other in zip(ours.figures, theirs.figures, strict=True):
        assert mine == pytest.approx(other, abs=2e-2, rel=2e-2)
    name = "model.layers.0.mlp.down_proj.weight"
    assert ours.saved[name].dtype == torch.bfloat16
    torch.testing.assert_close(ours.saved[name], theirs.saved[name], atol=2e-3, rtol=1e-2)


def test_quantized_weights_are_not_sharded(model):
    engine = engine_of(DEEPSPEED, model, lora=Lora(rank=4, bits=4), zero_stage=3)
    with pytest.raises(ConfigError, match="cannot be sharded by zero_stage=3; take zero_stage 2"):
        engine.open(Ranks())
    engine.close()
