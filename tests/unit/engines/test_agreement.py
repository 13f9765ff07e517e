"""What is read off a model is what the model says, or is refused; so are tokens and positions that it has none of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from flowrl.engines import attention
from flowrl.engines.agreement import check_fit, settle
from flowrl.engines.base import AttentionKind, TokenGroup, TrainingConfig
from flowrl.engines.models import TokenReader, load_model, reach_of_positions
from flowrl.engines.torch import TorchEngine
from flowrl.errors import ModelError, StageError
from flowrl.graph.stage import Ranks
from flowrl.messages import Buffer

CPU = torch.device("cpu")


def read(directory, *, kind: AttentionKind = "sdpa", **settings: Any) -> tuple[Any, TrainingConfig]:
    config = TrainingConfig(model=str(directory), dtype="float32", **settings)
    model = load_model(config, where="learner", dtype=torch.float32, device=CPU)
    return TokenReader(model, head=config.head, temperature=1.0, attention=kind), config


def group(prompt, response) -> TokenGroup:
    return TokenGroup(prompt_ids=Buffer.ints(prompt), responses=[Buffer.ints(response)])


def test_a_head_that_differs_gives_way_to_the_models_own_forward(tiny_llama):
    reader, config = read(tiny_llama)
    head = reader.language_head
    reader.language_head = lambda states: 2.0 * head(states)
    settle(reader, reader, config, where="learner")
    assert reader.language_head is None
    assert reader.layouts == ("shared", "padded", "alone")


def test_a_layout_that_differs_is_not_taken(tiny_llama, monkeypatch):
    reader, config = read(tiny_llama)
    run = reader._run

    def shifted(part, batch, **options):
        states, routers = run(part, batch, **options)
        return states * (1 + (batch.layout == "shared")), routers

    monkeypatch.setattr(reader, "_run", shifted)
    reader.model.lm_head.weight.data[5] += 1.0  # or the last norm would undo it
    settle(reader, reader, config, where="learner")
    assert reader.layouts == ("padded", "alone")
    assert reader.layout(30) == "padded"


@pytest.mark.parametrize("is_right", [True, False])
def test_a_kernel_whose_gradients_are_not_those_of_a_mask_is_not_taken(tiny_llama, monkeypatch, is_right):
    """A forward alone would not show it."""
    kernel = attention._flash_backward

    def backward(*tensors, **options):
        return [(1.0 if is_right else 0.9) * each for each in kernel(*tensors, **options)]

    monkeypatch.setattr(attention, "_flash_backward", backward)
    reader, config = read(tiny_llama, kind="varlen")
    settle(reader, reader, config, where="learner")
    assert ("unmasked" in reader.layouts) == is_right
    assert bool(reader.attention_in_words()) != is_right


@pytest.mark.parametrize("head", ["policy", "value"])
def test_what_is_drawn_at_random_is_refused(tiny_llama, head):
    reader, config = read(tiny_llama, head=head)
    reader.model.model.layers[0].register_forward_hook(
        lambda module, inputs, output: nn.functional.dropout(output, 0.1)
    )
    with pytest.raises(ModelError, match="another answer each time"):
        settle(reader, reader, config, where="learner")


@pytest.mark.parametrize("head", ["policy", "value"])
def test_another_default_dtype_meanwhile_changes_nothing(tiny_llama, head):
    """A vLLM that loads in the same process sets it for all of its threads."""
    reader, config = read(tiny_llama, head=head, kind="varlen")
    torch.set_default_dtype(torch.bfloat16)
    try:
        settle(reader, reader, config, where="learner")
    finally:
        torch.set_default_dtype(torch.float32)
    assert "unmasked" in reader.layouts


def test_a_model_in_training_mode_that_differs_from_itself_is_refused(tiny_llama):
    reader, config = read(tiny_llama)
    layer = reader.model.model.layers[0].train()
    layer.register_forward_hook(lambda module, inputs, output: output * (1 + 3 * module.training))
    with pytest.raises(ModelError, match="differs from its own forward by"):
        settle(reader, reader, config, where="learner")


@pytest.mark.parametrize("head", ["policy", "value"])
def test_a_model_that_looks_ahead_is_refused(tiny_llama, head):
    """It agrees with itself, and no token of it could be sampled so."""
    reader, config = read(tiny_llama, head=head)
    reader.model.model.layers[0].register_forward_hook(
        lambda module, inputs, output: output + output.flip(1).cumsum(1).flip(1)
    )
    with pytest.raises(ModelError, match=r"what follows a token changes what Llama.* says of it by "):
        settle(reader, reader, config, where="learner")


def test_numbers_that_are_not_finite_are_refused(tiny_llama):
    reader, config = read(tiny_llama)
    reader.model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ModelError, match="gives numbers that are not finite for 3 short sequences"):
        settle(reader, reader, config, where="learner")


@pytest.mark.parametrize("error", [AssertionError(), ZeroDivisionError("of a model's own code")])
def test_whatever_a_model_raises_is_a_line(tiny_llama, error):
    reader, config = read(tiny_llama)

    def broken(module, inputs):
        raise error

    reader.model.model.layers[0].register_forward_pre_hook(broken)
    with pytest.raises(ModelError, match=f"cannot be run on 3 short sequences \\({type(error).__name__}: "):
        settle(reader, reader, config, where="learner")


def test_a_head_or_a_layout_that_cannot_be_run_gives_way(tiny_llama, monkeypatch):
    reader, config = read(tiny_llama)
    run = reader._run

    def without_masks(part, batch, **options):
        assert batch.layout != "shared", "a mask of four dimensions"
        return run(part, batch, **options)

    def head(states):
        raise TypeError("it asks for more than states")

    reader.language_head = head
    monkeypatch.setattr(reader, "_run", without_masks)
    settle(reader, reader, config, where="learner")
    assert (reader.language_head, reader.layouts) == (None, ("padded", "alone"))


def test_a_config_without_a_limit_of_positions_does_not_shorten_what_is_looked_at(tiny_llama):
    """XLNet's says -1; sequences of one token show nothing."""
    reader, _ = read(tiny_llama)
    reader.model.config.max_position_embeddings = -1
    assert TokenReader(reader.model, head="policy", temperature=1.0).reach == 8 * 4096


class Stretching(nn.Module):
    """Positions that turn otherwise once there are more than 37 of them."""

    def forward(self, x, position_ids):
        angles = position_ids[..., None] * (1.0 if int(position_ids.max()) < 37 else 0.5)
        return angles.cos(), angles.sin()


def test_the_reach_of_positions_is_found_without_knowing_their_kind():
    assert reach_of_positions(Stretching(), CPU, torch.float32, 4096) == 37


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        ([5, 320], [7], r"group 1 has token 320, the model embeddings for 320 \(0 to 319\)"),
        ([5] * 300, [7] * 213, "group 1 has a sequence of 513 tokens, the model positions for 512"),
    ],
)
def test_tokens_and_positions_that_the_model_has_none_of_are_refused(tiny_llama, prompt, response, message):
    engine = TorchEngine(TrainingConfig(model=str(tiny_llama), dtype="float32"), where="learner", name="t")
    engine.open(Ranks())
    with pytest.raises(StageError, match=message):
        engine.score([group([5], [7]), group(prompt, response)])
    assert len(engine.score([group([5], [7])])) == 1
    engine.close()


def test_a_body_whose_embeddings_transformers_does_not_find_is_held_against_its_config(tiny_llama, monkeypatch):
    """Such as BART's decoder in its wrapper, under a head of ours."""
    reader, _ = read(tiny_llama)

    def unknown():
        raise NotImplementedError

    monkeypatch.setattr(reader.model, "get_input_embeddings", unknown)
    check_fit([group([5], [319])], reader, "critic")
    with pytest.raises(StageError, match="has token 320, the model embeddings for 320"):
        check_fit([group([5], [320])], reader, "critic")
