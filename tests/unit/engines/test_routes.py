"""Tokens go to the experts that they are told to, with the router's own gates, whatever the step is cut into."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.models.qwen3_moe import modeling_qwen3_moe

from flowrl.engines.base import GenerationConfig, Ranks, Schedule, TokenGroup, TrainingConfig
from flowrl.engines.torch import TorchEngine
from flowrl.engines.vllm_settings import check
from flowrl.errors import ConfigError, StageError
from flowrl.messages import Buffer, Rollouts, Routes, Sample, VersionSpan, decode, encode
from flowrl.stages.agent import Transcript
from flowrl.stages.tokens import token_group
from tests.support.families import write_family
from tests.unit.engines.test_packing import group, random_groups
from tests.unit.engines.test_trainer import WeightedTokens, choose, gradients

LAYERS, TOP_K, NUM_EXPERTS = 2, 2, 4
LEARN = choose(WeightedTokens)


@pytest.fixture(scope="session")
def tiny_qwen3_moe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny-qwen3-moe")
    write_family("Qwen3MoeForCausalLM", directory, norm_topk_prob=True)
    return directory


def opened(directory, **settings) -> TorchEngine:
    told = {"dtype": "float32", "routing": "replay", "schedule": Schedule(kind="constant"), "lr": 1e-3, **settings}
    engine = TorchEngine(TrainingConfig(model=str(directory), **told), where="learner", name="test")
    engine.open(Ranks())
    return engine


def routed(groups, *, seed: int = 0) -> list[TokenGroup]:
    """Return groups whose tokens go to any two experts of each layer; a group's samples agree on the prompt's."""
    random = np.random.default_rng(seed)

    def draw(num_tokens: int) -> np.ndarray:
        return random.permuted(np.tile(np.arange(NUM_EXPERTS), (num_tokens, LAYERS, 1)), axis=-1)[..., :TOP_K]

    found = []
    for item in groups:
        prompt = draw(len(item.prompt_ids))
        rows = [Routes.of(np.concatenate([prompt, draw(len(response) - 1)])) for response in item.responses]
        found.append(msgspec.structs.replace(item, routes=rows))
    return found


@pytest.fixture(scope="module")
def groups():
    return routed(random_groups(seed=41, count=4))


class ToldBlock(torch.nn.Module):
    """Qwen3-MoE's layer from its definition, token by token, with the experts that it is told."""

    def __init__(self, block: Any, told_TK: list[list[int]]) -> None:
        super().__init__()
        self.gate: Any = block.gate
        self.experts: Any = block.experts
        self.told_TK = told_TK

    def forward(self, states):
        rows = []
        for state, told in zip(states[0], self.told_TK, strict=True):
            probs = (self.gate.weight @ state).softmax(-1)
            whole = sum(probs[expert] for expert in told)
            row = torch.zeros_like(state)
            for expert in told:
                gate, up = (self.experts.gate_up_proj[expert] @ state).chunk(2)
                row = row + probs[expert] / whole * (self.experts.down_proj[expert] @ (functional.silu(gate) * up))
            rows.append(row)
        return torch.stack(rows)[None]


@pytest.mark.slow
def test_tokens_go_where_they_are_told_and_gates_and_gradients_are_the_learners_own(tiny_qwen3_moe, groups):
    engine = opened(tiny_qwen3_moe)
    item = msgspec.structs.replace(
        groups[0],
        responses=groups[0].responses[:1],
        routes=groups[0].routes[:1],
        columns={name: rows[:1] for name, rows in groups[0].columns.items()},
    )
    engine.accumulate([item], LEARN)
    found = gradients(engine)
    slow: Any = modeling_qwen3_moe.Qwen3MoeForCausalLM.from_pretrained(tiny_qwen3_moe)
    told = item.routes[0].numpy().tolist()
    for index, layer in enumerate(slow.model.layers):
        layer.mlp = ToldBlock(layer.mlp, [token[index] for token in told])
    prompt, response = item.prompt_ids.tolist(), item.responses[0].tolist()
    logits = slow(input_ids=torch.tensor([[*prompt, *response[:-1]]])).logits[0, len(prompt) - 1 :]
    logprobs = logits.log_softmax(-1)[range(len(response)), response]
    np.testing.assert_allclose(engine.score([item])[0][0], logprobs.detach().numpy(), atol=1e-5)
    advantages = torch.tensor(item.columns["advantages"][0].tolist())
    (-(logprobs * advantages).sum() / len(response)).backward()
    router = "model.layers.0.mlp.gate.weight"
    torch.testing.assert_close(found[router], slow.model.layers[0].mlp.gate.weight.grad, atol=1e-6, rtol=1e-4)
    assert found[router].abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "settings"), [(1, {"gradient_checkpointing": True, "attention": "varlen"}), (60, {"attention": "sdpa"})]
)
def test_neither_micro_batches_nor_layers_computed_again_change_what_is_replayed(
    tiny_qwen3_moe, groups, budget, settings
):
    plain, other = opened(tiny_qwen3_moe), opened(tiny_qwen3_moe, micro_batch_tokens=budget, **settings)
    assert other.accumulate(groups, LEARN) == pytest.approx(plain.accumulate(groups, LEARN), abs=1e-5)
    found = gradients(other)
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(found[name], gradient, atol=3e-6, rtol=1e-4)


@pytest.mark.slow
def test_its_own_routes_change_nothing(tiny_qwen3_moe):
    groups = random_groups(seed=41, count=2)
    own, replaying = opened(tiny_qwen3_moe, routing="own"), opened(tiny_qwen3_moe)
    with_routes = [msgspec.structs.replace(item, routes=taken(replaying, item)) for item in groups]
    expected, found = own.accumulate(groups, LEARN), replaying.accumulate(with_routes, LEARN)
    assert found.pop("routes_changed") == 0
    assert found == pytest.approx(expected, abs=1e-6)


def taken(engine: TorchEngine, item: TokenGroup) -> list[Routes]:
    """Return where an engine's own router sends each response's tokens."""
    found, replay = [], engine.reader.replay
    assert replay is not None
    for response in item.responses:
        engine.score([TokenGroup(prompt_ids=item.prompt_ids, responses=[response])])
        found.append(Routes.of(torch.stack([replay.taken[i] for i in range(LAYERS)], 1).numpy()))
    return found


@pytest.mark.slow
def test_a_learner_in_another_dtype_is_nearer_to_the_generator_when_it_replays(tmp_path):
    write_family("MixtralForCausalLM", tmp_path, num_local_experts=32, num_experts_per_tok=4)
    groups = [group(20, 60, seed=seed) for seed in (1, 2, 3)]
    generator, learner = opened(tmp_path, dtype="bfloat16"), opened(tmp_path)
    with_routes = [msgspec.structs.replace(item, routes=taken(generator, item)) for item in groups]

    def gap(found, expected) -> float:
        one, other = (np.concatenate([row for rows in each for row in rows]) for each in (found, expected))
        return float(((one - other) ** 2).mean())

    sampled = generator.score(groups)
    assert gap(learner.score(with_routes), sampled) < 0.5 * gap(learner.score(groups), sampled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("LlamaForCausalLM", {}, "LlamaForCausalLM has no experts to choose from"),
        ("PhimoeForCausalLM", {"num_experts_per_tok": 2}, "its layers choose 0 to 0 times"),
        ("DeepseekV2ForCausalLM", {"topk_method": "group_limited_greedy"}, "its gates are 0"),
    ],
)
def test_a_router_that_cannot_be_told_is_refused(tmp_path, family, settings, why):
    write_family(family, tmp_path, **settings)
    with pytest.raises(ConfigError, match=f"learner.routing.*{why}.*own"):
        opened(tmp_path)


@pytest.mark.slow
def test_samples_without_their_routes_or_with_another_models_are_refused(tiny_qwen3_moe, groups):
    engine = opened(tiny_qwen3_moe)
    with pytest.raises(StageError, match=r"group 0 brings routes for 0 of \d samples; set routing=own"):
        engine.accumulate(random_groups(seed=41, count=1), LEARN)
    item = groups[0]
    for wrong in (np.full((3, LAYERS, TOP_K), 1), np.full((*item.routes[0].numpy().shape,), NUM_EXPERTS)):
        with pytest.raises(StageError, match=r"sample 0 of group 0 has routes \(.*this model's are \("):
            engine.accumulate([msgspec.structs.replace(item, routes=[Routes.of(wrong), *item.routes[1:]])], LEARN)


def test_routes_travel_with_a_sample_and_those_of_the_last_turn_with_an_episode():
    few, many = np.arange(12).reshape(3, 2, 2), 300 + np.arange(12).reshape(3, 2, 2)
    assert [len(Routes.of(each).data) for each in (few, many)] == [12, 24]
    turns = [sample(routes=Routes.of(each)) for each in (few, many)]
    transcript = Transcript()
    for turn in turns:
        transcript.add_turn(turn, 0.0)
    played = transcript.played([1], finish="stop", text="").sample
    assert played.routes is not None
    np.testing.assert_array_equal(played.routes.numpy(), many)
    rollouts = Rollouts(
        group_id=0, token_ids=Buffer.ints([1, 2]), columns={}, num_samples=2, seed=0, samples=turns, generator="g",
    )  # fmt: skip
    found = token_group(decode(encode(rollouts)))
    np.testing.assert_array_equal([each.numpy() for each in found.routes], [few, many])


def sample(**more) -> Sample:
    return Sample(
        token_ids=Buffer.ints([5, 6]), logprobs=Buffer.floats([-1.0, -1.0]), versions=[VersionSpan(0, 0, 2)],
        finish="stop", text="", **more,
    )  # fmt: skip


def test_a_vllm_that_does_not_give_routes_is_refused_before_a_run(tiny_qwen3_moe, monkeypatch):
    monkeypatch.setattr("flowrl.engines.vllm_settings._is_for_cpus", lambda: True)
    config = GenerationConfig(model=str(tiny_qwen3_moe), dtype="float32", routing="replay")
    with pytest.raises(ConfigError, match=r"learner.routing: is replay, and vLLM's build for CPUs does not give"):
        check(config, "generator")
