"""The load-balancing loss of experts, against a slow loop, and whatever the step is cut into."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from flowrl.config import Select
from flowrl.engines.base import Ranks, Schedule, TrainingConfig
from flowrl.engines.router import Routing
from flowrl.engines.torch import TorchEngine
from flowrl.errors import ConfigError
from tests.support.tiny import tiny_tokenizer
from tests.unit.engines.test_packing import random_groups
from tests.unit.engines.test_trainer import WeightedTokens, choose, gradients

GROUPS = random_groups(seed=41, count=5)
TOP_K, NUM_EXPERTS, WEIGHT = 2, 4, 0.5


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory):
    torch.manual_seed(5)
    directory = tmp_path_factory.mktemp("tiny-mixtral")
    settings = MixtralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, initializer_range=0.2,
        pad_token_id=0,
    )  # fmt: skip
    MixtralForCausalLM(settings).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def opened(directory, **settings) -> TorchEngine:
    config = TrainingConfig(
        model=str(directory), dtype="float32", lr=1e-3, schedule=Schedule(kind="constant"), **settings
    )
    engine = TorchEngine(config, where="learner", name="test")
    engine.open(Ranks())
    return engine


def slow_loss(engine: TorchEngine) -> torch.Tensor:
    """Run every sequence alone, gather each layer's tokens in lists, and form the loss from its definition."""
    tokens: list[list[torch.Tensor]] = [[], []]
    for item in GROUPS:
        for response in item.responses:
            ids = torch.tensor([item.prompt_ids.tolist() + response.tolist()[:-1]])  # the last is never fed
            output = engine.model.base_model(input_ids=ids, output_router_logits=True)
            for layer, logits in zip(tokens, output.router_logits, strict=True):
                layer += logits.softmax(-1).unbind(0)
    losses = []
    for layer in tokens:
        loss = torch.zeros(())
        for expert in range(NUM_EXPERTS):
            sent = sum(expert in probs.topk(TOP_K).indices.tolist() for probs in layer) / len(layer)
            loss = loss + sent * torch.stack([probs[expert] for probs in layer]).mean()
        losses.append(NUM_EXPERTS * loss)
    return torch.stack(losses).mean()


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1, 50, 5000])
def test_the_loss_and_its_gradient_are_those_of_the_definition_over_the_whole_step(tiny_mixtral, budget):
    plain = opened(tiny_mixtral, micro_batch_tokens=budget)
    balanced = opened(tiny_mixtral, micro_batch_tokens=budget, router_aux_loss=WEIGHT)
    before = plain.accumulate(GROUPS, choose(WeightedTokens))
    found = balanced.accumulate(GROUPS, choose(WeightedTokens))
    expected = slow_loss(plain)
    (WEIGHT * expected).backward()  # on top of the objective's own gradient
    assert found.pop("router_loss") == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found == pytest.approx(before, abs=1e-6)
    added = gradients(balanced)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(added[name], gradient, atol=2e-6, rtol=1e-4)


def test_the_router_loss_counts_once_beside_a_pretraining_loss(tiny_mixtral):
    pretraining = Select(use="flowrl.algorithms.pretraining:Pretraining", options={"coef": 0.3})
    balanced, plain = opened(tiny_mixtral, router_aux_loss=WEIGHT), opened(tiny_mixtral)
    for engine in (balanced, plain):
        engine.accumulate(GROUPS, choose(WeightedTokens))
    once = {name: gradient - gradients(plain)[name] for name, gradient in gradients(balanced).items()}
    for engine in (balanced, plain):
        assert "router_loss" not in engine.accumulate(GROUPS, pretraining)
    found = gradients(balanced)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(found[name] - gradient, once[name], atol=2e-6, rtol=1e-4)


def test_models_whose_layers_cannot_share_prompts_count_the_same_tokens(tiny_mixtral, monkeypatch):
    losses = []
    for layout in ("shared", "padded"):
        engine = opened(tiny_mixtral, router_aux_loss=WEIGHT)
        monkeypatch.setattr(engine, "_layout", lambda longest, layout=layout: layout)
        losses.append(engine.accumulate(GROUPS, choose(WeightedTokens))["router_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_one_layer_and_one_pass_give_the_loss_of_transformers():
    torch.manual_seed(1)
    logits, copies = torch.randn(30, NUM_EXPERTS), torch.ones(30)
    copies[20:] = 0.0  # padding
    counts = Routing().measure([logits], copies, TOP_K)
    found = Routing(counts / 20, 20.0).measure([logits], copies, TOP_K) / 20
    expected = load_balancing_loss_func((logits,), NUM_EXPERTS, TOP_K, copies[None])
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_experts_used_evenly_cost_k_and_one_favourite_costs_more():
    even = torch.eye(NUM_EXPERTS).repeat(3, 1) * 1e-3
    favourite = torch.tensor([[8.0, 0.0, 0.0, 0.0]]).repeat(12, 1)
    losses = []
    for logits in (even, favourite):
        shares = Routing().measure([logits], torch.ones(12), 1) / 12
        losses.append(float(Routing(shares).measure([logits], torch.ones(12), 1)) / 12)
    assert losses[0] == pytest.approx(1.0, abs=1e-3)
    assert losses[1] == pytest.approx(4 * favourite.softmax(-1)[0, 0].item())


def test_a_model_without_experts_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no experts that this loss balances; leave it 0"):
        opened(tiny_llama, router_aux_loss=0.01)
