"""Generation engines keep their contract: one as a user might write it, and one that does not is told why."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from flowrl.engines.base import GenerationConfig, Lora, TrainingConfig
from flowrl.engines.contract import broken_laws
from flowrl.engines.torch import TorchEngine
from flowrl.engines.vllm import VllmEngine
from flowrl.errors import StageError
from flowrl.graph.stage import Ranks
from flowrl.messages import Buffer
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.slow
HERE = "tests.support.plain_engine"
VLLM = "flowrl.engines.vllm:VllmEngine"
unclosed = pytest.mark.filterwarnings("ignore:Destroying context with unclosed socket:ResourceWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@unclosed
@pytest.mark.parametrize("engine", [f"{HERE}:PlainEngine", VLLM])
def test_an_engine_keeps_its_contract(engine, model):
    assert asyncio.run(broken_laws(engine, model)) == []


@unclosed
def test_an_engine_that_is_sent_adapters_alone_keeps_its_contract(model):
    assert asyncio.run(broken_laws(VLLM, model, adapter=Lora(rank=4, alpha=8, use_rslora=True))) == []


@unclosed
def test_an_adapter_of_which_vllm_would_leave_out_a_layer_is_refused(model):
    async def served(engine: VllmEngine) -> None:
        await engine.open()
        try:
            await engine.update_weights(learner.publish(0, Buffer.ints([5, 6, 7])))
        finally:
            await engine.close()

    few = Lora(rank=4, targets=["q_proj"])
    lora = msgspec.structs.replace(few, targets=["q_proj", "o_proj"], publish="adapter")
    learner = TorchEngine(TrainingConfig(model=str(model), dtype="float32", lora=lora), where="learner", name="odd")
    learner.open(Ranks())
    config = GenerationConfig(model=str(model), dtype="float32", kv_cache_bytes=32 << 20, adapter=few)
    with pytest.raises(
        StageError, match=r"leave out 2 layers of the adapter, such as .*o_proj; set learner\.lora\.publ"
    ):
        asyncio.run(served(VllmEngine(config, where="generator")))
    learner.close()


def test_a_careless_engine_is_told_which_laws_it_breaks(model):
    seeds, canary = asyncio.run(broken_laws(f"{HERE}:CarelessEngine", model))
    assert seeds == "sample i is drawn with seed + i, the same alone and among others"
    assert canary == "weights that the canary contradicts are not served"
