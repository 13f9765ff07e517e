"""The families of models that people align, each as a tiny one with its quirks: read, trained, carried, given a head.

What each gave stands in docs/models.md, a row for each family here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers

from flowrl.engines.base import Lora, Schedule, TrainingConfig
from flowrl.engines.publishing import as_saved, carried_buffers
from flowrl.engines.torch import TorchEngine
from flowrl.graph.stage import Ranks
from tests.support.families import FAMILIES, gap_to_own, write_family
from tests.unit.engines.test_packing import random_groups
from tests.unit.engines.test_trainer import WeightedTokens, choose

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # GPTBigCode's import
]

GROUPS = [group for group in random_groups(seed=33, count=4) if len(group.prompt_ids) > 1]
# One of each way in which a family is unlike the others: fused or transposed projections, experts as parameters, a head
# that is scaled or capped, latent attention, states in place of attention, and the plain one.
KINDS = {
    "DeepseekV3ForCausalLM", "FalconForCausalLM", "Gemma3nForCausalLM", "GPT2LMHeadModel", "GptOssForCausalLM",
    "GraniteMoeHybridForCausalLM", "LlamaForCausalLM", "Lfm2ForCausalLM", "Mamba2ForCausalLM", "MixtralForCausalLM",
    "MptForCausalLM", "OPTForCausalLM", "Phi3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM",
    "RecurrentGemmaForCausalLM", "xLSTMForCausalLM", "Zamba2ForCausalLM",
}  # fmt: skip
# Those that most people align, and those with randomness, scales or names of their own in what they compute.
COMMON = {
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Glm4MoeForCausalLM", "MistralForCausalLM", "Olmo2ForCausalLM",
    "PhiForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM", "Cohere2ForCausalLM",
    "HyperCLOVAXForCausalLM", "Llama4ForCausalLM", "PhimoeForCausalLM", "SeedOssForCausalLM",
}  # fmt: skip


def each(always: set[str]) -> list[Any]:
    return [pytest.param(family, marks=[] if family in always else pytest.mark.long) for family in FAMILIES]


CONFIG = TrainingConfig(model="", dtype="float32", lr=1e-3, schedule=Schedule(kind="constant"))


def opened(directory: Path, **settings: Any) -> TorchEngine:
    engine = TorchEngine(msgspec.structs.replace(CONFIG, model=str(directory), **settings), where="learner", name="t")
    engine.open(Ranks())
    return engine


def learned(engine: TorchEngine) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss over the groups and every gradient of it."""
    loss = engine.accumulate(GROUPS, choose(WeightedTokens))["loss"]
    return loss, {name: each.grad.clone() for name, each in engine.model.named_parameters() if each.grad is not None}


def one_by_one(groups):
    return [msgspec.structs.replace(item, responses=[each], columns={}) for item in groups for each in item.responses]


@pytest.mark.parametrize("family", each(KINDS | COMMON))
def test_a_family_is_read_trained_and_carried_as_it_is(tmp_path, family):
    from safetensors.torch import load_file

    own = write_family(family, tmp_path)
    engine = opened(tmp_path)
    packed = engine.score(GROUPS)
    assert gap_to_own(own, GROUPS, packed) <= 5e-5
    by_itself = [alone for (alone,) in engine.score(one_by_one(GROUPS))]
    for alone, beside in zip(by_itself, (row for rows in packed for row in rows), strict=True):
        assert alone == pytest.approx(beside, abs=5e-5)
    for again, before in zip(engine.score(GROUPS), packed, strict=True):
        assert all(map(np.array_equal, again, before))
    kept = load_file(tmp_path / "model.safetensors")
    named = [(name, parameter.detach()) for name, parameter in engine.model.named_parameters()]
    sent = dict(as_saved(engine.model, iter([*named, *carried_buffers(engine.model)])))
    assert sent.keys() == kept.keys()
    taken = list[str]()
    next(as_saved(engine.model, (taken.append(name) or (name, tensor) for name, tensor in named)))
    assert len(taken) <= 2, "a layer at a time is held twice, not the model"
    assert all(torch.equal(sent[name], tensor) for name, tensor in kept.items())
    loss, gradients = learned(engine)
    if family in KINDS and "unmasked" in engine.reader.layouts:
        engine.reader.layouts = ("padded", "alone")
        engine._clear_gradients()
        again, expected = learned(engine)
        assert again == pytest.approx(loss, abs=1e-5)
        assert all(torch.allclose(gradients[name], one, atol=1e-5, rtol=1e-5) for name, one in expected.items())
    engine.apply()
    assert np.abs(engine.score(GROUPS)[0][0] - packed[0][0]).max() > 1e-4
    engine.close()


@pytest.mark.parametrize("family", each(KINDS))
def test_a_family_carries_a_head_of_scores(tmp_path, family):
    write_family(family, tmp_path)
    engine = opened(tmp_path, head="reward")
    torch.nn.init.normal_(engine.model.get_parameter("score.weight"))
    before, name = engine.score(GROUPS), type(engine.model).__name__
    engine.save_model(tmp_path / "saved", card="")
    engine.close()
    engine = opened(tmp_path / "saved", head="reward")
    for rows, expected in zip(engine.score(GROUPS), before, strict=True):
        assert all(row == pytest.approx(kept, abs=1e-5, rel=1e-5) for row, kept in zip(rows, expected, strict=True))
    engine.close()
    if theirs := getattr(transformers, name, None):
        ids = torch.tensor([GROUPS[0].prompt_ids.tolist() + GROUPS[0].responses[0].tolist()])
        with torch.no_grad():
            score = theirs.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()(input_ids=ids).logits
        assert float(score) == pytest.approx(before[0][0][-1], abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("family", each(KINDS))
def test_a_family_carries_adapters_that_merge_into_what_it_saves(tmp_path, family):
    write_family(family, tmp_path)
    engine = opened(tmp_path, lora=Lora(rank=2))
    before = engine.score(GROUPS)
    engine.accumulate(GROUPS, choose(WeightedTokens))
    engine.apply()
    after = engine.score(GROUPS)
    assert np.abs(after[0][0] - before[0][0]).max() > 1e-6
    engine.save_model(tmp_path / "saved", card="")
    engine.close()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert gap_to_own(merged, GROUPS, after) <= 2e-4


def test_each_family_has_its_row_in_the_book():
    book = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for family in FAMILIES:
        assert f"| {family.replace('LMHeadModel', '').removesuffix('ForCausalLM')} |" in book, family
