"""The plain torch engine: losses, steps, state and publishing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from flowrl.algorithms.base import Loss, LossBatch, Objective
from flowrl.config import Select
from flowrl.engines.base import Ranks, Schedule, TokenGroup, TrainingConfig
from flowrl.engines.torch import SequenceScoringEngine, TorchEngine
from flowrl.errors import ConfigError, ModelError, StageError
from flowrl.messages import Buffer
from tests.support.tiny import CHAT_TEMPLATE
from tests.unit.engines.test_packing import random_groups

GROUPS = random_groups(seed=21, count=6)


class WeightedTokens(Objective):
    """Mean over tokens of -advantage * log-prob, with the pieces a real objective uses."""

    entropy: float = 0.0

    @property
    def needs_entropy(self) -> bool:
        return self.entropy > 0

    def loss(self, batch: LossBatch) -> Loss:
        ratio_BT = (batch.logprobs_BT - batch.columns.get("proximal", batch.logprobs_BT.detach())).exp()
        total = -(ratio_BT * batch.columns["advantages"] * batch.mask_BT).sum()
        if batch.entropy_BT is not None:
            total = total - self.entropy * (batch.entropy_BT * batch.mask_BT).sum()
        count = batch.mask_BT.sum()
        longest = batch.mask_BT.sum(1)
        return Loss(total, count, {"tokens_per_response": (longest.sum(), torch.tensor(float(len(longest))))})


class CountsLikelyTokens(WeightedTokens):
    """Wrong on purpose: its count depends on the log-probs."""

    def loss(self, batch: LossBatch) -> Loss:
        loss = super().loss(batch)
        return dataclasses.replace(loss, count=(batch.logprobs_BT.detach() > -1).sum())


class RaisesTwice(WeightedTokens):
    """A user's objective with a defect."""

    def loss(self, batch: LossBatch) -> Loss:
        raise ZeroDivisionError("objective defect")


def choose(kind: type, **options: Any) -> Select:
    return Select(use=f"{kind.__module__}:{kind.__name__}", options=options)


def opened(directory, **settings: Any) -> TorchEngine:
    config = TrainingConfig(
        model=str(directory),
        **{"dtype": "float32", "lr": 1e-3, "schedule": Schedule(kind="constant"), **settings},
    )
    engine = TorchEngine(config, where="learner", name="test")
    engine.open(Ranks())
    return engine


def gradients(engine: TorchEngine) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1, 30, 77])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_loss_and_gradient_do_not_depend_on_micro_batches(tiny_llama, budget, entropy):
    objective = choose(WeightedTokens, entropy=entropy)
    one, many = opened(tiny_llama), opened(tiny_llama, micro_batch_tokens=budget)
    metrics = one.accumulate(GROUPS, objective), many.accumulate(GROUPS, objective)
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)
    found = gradients(many)
    for name, expected in gradients(one).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)


def test_the_gradient_is_that_of_a_plain_loop_over_sequences(tiny_llama):
    engine = opened(tiny_llama, micro_batch_tokens=64)
    metrics = engine.accumulate(GROUPS, choose(WeightedTokens))
    found = gradients(engine)
    engine.model.zero_grad()
    total, count = torch.zeros(()), 0
    for item in GROUPS:
        for s, response in enumerate(item.responses):
            ids = torch.tensor([item.prompt_ids.tolist() + response.tolist()])
            logprobs = engine.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            taken = logprobs[range(len(ids[0]) - 1 - len(response), len(ids[0]) - 1), ids[0, -len(response) :]]
            advantages = torch.tensor(item.columns["advantages"][s].tolist())
            total = total - ((taken - taken.detach()).exp() * advantages).sum()
            count += len(response)
    (total / count).backward()
    assert metrics["loss"] == pytest.approx(float(total.detach()) / count, abs=1e-6)
    assert metrics["tokens_per_response"] == pytest.approx(count / sum(len(g.responses) for g in GROUPS))
    for name, expected in gradients(engine).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)


def test_a_second_accumulate_adds_to_the_first(tiny_llama):
    engine = opened(tiny_llama)
    engine.accumulate(GROUPS, choose(WeightedTokens))
    once = gradients(engine)
    engine.accumulate(GROUPS, choose(WeightedTokens))
    for name, twice in gradients(engine).items():
        torch.testing.assert_close(twice, 2 * once[name])


def test_masked_tokens_of_the_data_are_not_learned(tiny_llama):
    def masked(item, garbage):
        mask = [Buffer.floats([1.0] * (len(r) // 2) + [0.0] * (len(r) - len(r) // 2)) for r in item.responses]
        advantages = [
            Buffer.floats(np.where(m.numpy() > 0, a.numpy(), garbage))
            for a, m in zip(item.columns["advantages"], mask, strict=True)
        ]
        return msgspec.structs.replace(item, columns={"advantages": advantages, "mask": mask})

    losses = []
    for garbage in (0.0, 1e3):
        engine = opened(tiny_llama)
        losses.append(engine.accumulate([masked(g, garbage) for g in GROUPS], choose(WeightedTokens))["loss"])
    assert losses[0] == losses[1] != 0.0


def test_gradient_checkpointing_changes_nothing(tiny_llama):
    plain, saving = opened(tiny_llama), opened(tiny_llama, gradient_checkpointing=True)
    plain.accumulate(GROUPS, choose(WeightedTokens))
    saving.accumulate(GROUPS, choose(WeightedTokens))
    assert saving.model.is_gradient_checkpointing
    found = gradients(saving)
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)


def test_an_objective_whose_count_depends_on_log_probs_is_refused(tiny_llama):
    with pytest.raises(StageError, match="let `count` depend on the mask"):
        opened(tiny_llama).accumulate(GROUPS, choose(CountsLikelyTokens))


def test_an_error_of_the_objective_travels_as_it_is(tiny_llama):
    with pytest.raises(ZeroDivisionError, match="objective defect"):
        opened(tiny_llama).accumulate(GROUPS, choose(RaisesTwice))


def test_no_groups_score_to_nothing_and_teach_nothing(tiny_llama):
    engine = opened(tiny_llama)
    assert engine.score([]) == []
    with pytest.raises(StageError, match="no groups to learn from"):
        engine.accumulate([], choose(WeightedTokens))


def test_groups_whose_every_token_is_masked_are_refused(tiny_llama):
    zeros = [Buffer.floats([0.0] * len(response)) for response in GROUPS[0].responses]
    masked = msgspec.structs.replace(GROUPS[0], columns={**GROUPS[0].columns, "mask": zeros})
    with pytest.raises(StageError, match="counts nothing in 1 groups"):
        opened(tiny_llama).accumulate([masked], choose(WeightedTokens))


def test_ppo_and_its_critic_learn(tiny_llama, tiny_reward_model):
    def filled(item, names):
        rows = {name: item.columns["advantages"] for name in names}
        return msgspec.structs.replace(item, columns={**item.columns, **rows})

    policy, critic = opened(tiny_llama, micro_batch_tokens=50), opened(tiny_reward_model, head="value")
    groups = [filled(item, ["behaviour", "reference", "values", "returns"]) for item in GROUPS]
    ppo = Select(use="flowrl.algorithms.ppo:PPO", options={"entropy_coef": 0.1})
    assert {"loss", "policy_loss", "entropy", "kl_ref"} <= policy.accumulate(groups, ppo).keys()
    assert policy.apply()["grad_norm"] > 0
    value = Select(use="flowrl.algorithms.value:ValueLoss")
    first = critic.accumulate(groups, value)["loss"]
    for _ in range(3):
        critic.apply()
        last = critic.accumulate(groups, value)["loss"]
    assert last < first


def test_an_unknown_option_of_the_objective_is_a_config_error(tiny_llama):
    with pytest.raises(ConfigError, match="no setting 'entropie'"):
        opened(tiny_llama).accumulate(GROUPS, choose(WeightedTokens, entropie=1.0))


def test_a_step_lowers_the_loss_and_clears_the_gradient(tiny_llama):
    engine = opened(tiny_llama, lr=1e-2)
    before = engine.score(GROUPS)
    engine.accumulate(GROUPS, choose(WeightedTokens))
    figures = engine.apply()
    assert figures["lr"] == 1e-2
    assert figures["grad_norm"] > 0
    assert gradients(engine) == {}
    moved = sum(
        float(((after - old) * a.numpy()).sum())
        for rows, olds, item in zip(engine.score(GROUPS), before, GROUPS, strict=True)
        for after, old, a in zip(rows, olds, item.columns["advantages"], strict=True)
    )
    assert moved > 0


def test_small_steps_are_not_lost_in_bfloat16(tiny_llama):
    engine = opened(tiny_llama, dtype="bfloat16", lr=1e-3)
    for _ in range(4):
        engine.accumulate(GROUPS[:2], choose(WeightedTokens))
        engine.apply()
    norm = engine.model.model.norm.weight  # ones, whose neighbours in bfloat16 are 0.996 and 1.008
    assert (norm != 1).any()


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights_change(tiny_llama):
    engine = opened(tiny_llama)
    bad = [msgspec.structs.replace(GROUPS[0], columns={"advantages": [
        Buffer.floats([float("nan")] * len(r)) for r in GROUPS[0].responses]})]  # fmt: skip
    before = engine.model.lm_head.weight.clone()
    engine.accumulate(bad, choose(WeightedTokens))
    with pytest.raises(StageError, match="norm is nan in optimizer step 0"):
        engine.apply()
    assert torch.equal(before, engine.model.lm_head.weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_continued_from_state_is_bit_equal(tiny_llama, tmp_path, dtype):
    schedule = Schedule(kind="cosine", warmup_steps=1, total_steps=6)
    straight = opened(tiny_llama, dtype=dtype, schedule=schedule)

    def step(engine):
        return engine.accumulate(GROUPS, choose(WeightedTokens))["loss"], engine.apply()

    step(straight)
    step(straight)
    straight.save_state(tmp_path / "state")
    resumed = opened(tiny_llama, dtype=dtype, schedule=schedule)
    resumed.load_state(tmp_path / "state")
    for _ in range(2):
        assert step(straight) == step(resumed)
    for old, new in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_a_saved_model_loads_with_the_same_log_probs(tiny_llama, tmp_path):
    engine = opened(tiny_llama)
    engine.accumulate(GROUPS, choose(WeightedTokens))
    engine.apply()
    engine.save_model(tmp_path / "model", card="# a card")
    assert (tmp_path / "model" / "README.md").read_text() == "# a card"
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    for mine, theirs in zip(engine.score(GROUPS), opened(tmp_path / "model").score(GROUPS), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.tolist() == b.tolist()


def test_a_saved_model_takes_its_template_along_and_stops_where_that_ends_answers(tiny_llama, tmp_path):
    """SFT of a base model, whose own end is another token than the one that the template writes."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    (base / "chat_template.jinja").unlink()
    opened(base, chat_template=CHAT_TEMPLATE).save_model(tmp_path / "model", card="")
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    end, eos = 2, 0
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == [end, eos]


class RecordingSender:
    """A transport that keeps what it was given."""

    def __init__(self) -> None:
        self.published: dict[int, dict[str, torch.Tensor]] = {}
        self.closed = False

    def publish(self, version, tensors):
        self.published[version] = {name: tensor.clone() for name, tensor in tensors}
        return b"{}", sum(t.nbytes for t in self.published[version].values())

    def close(self) -> None:
        self.closed = True


class RecordingEngine(TorchEngine):
    """The engine with such a transport."""

    def open(self, ranks):
        super().open(ranks)
        self.sender = RecordingSender()
        self._publisher.open_sender = lambda: self.sender


@pytest.mark.parametrize(("dtype", "gap"), [("float32", 1e-3), ("bfloat16", 0.15)])
def test_published_weights_carry_a_canary_and_tied_weights_once(tiny_llama, dtype, gap):
    config = TrainingConfig(model=str(tiny_llama), dtype=dtype, temperature=0.5, schedule=Schedule(kind="constant"))
    engine = RecordingEngine(config, where="learner", name="test")
    engine.open(Ranks())
    tokens = Buffer.ints([5, 9, 40, 77])
    weights = engine.publish(3, tokens)
    names = engine.sender.published[3]
    assert weights.version == 3
    assert weights.size_bytes == sum(p.nbytes for p in engine.model.parameters())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert weights.canary is not None
    assert weights.canary.max_mean_gap == gap
    logits = engine.model(input_ids=torch.tensor([tokens.tolist()])).logits[0].float()
    expected = logits.log_softmax(-1)[range(3), tokens.tolist()[1:]]  # at temperature 1 whatever the policy's is
    assert weights.canary.logprobs.tolist() == pytest.approx(expected.tolist(), abs=1e-5 if gap < 0.1 else 0.1)
    engine.close()
    assert engine.sender.closed


def test_a_reward_model_scores_each_sequence_at_its_last_token(tiny_reward_model):
    from transformers import LlamaForSequenceClassification

    config = TrainingConfig(model=str(tiny_reward_model), head="value", dtype="float32")
    engine = SequenceScoringEngine(config, where="reward")
    engine.open()
    model = LlamaForSequenceClassification.from_pretrained(tiny_reward_model)
    for item, found in zip(GROUPS[:3], engine.score_groups(GROUPS[:3]), strict=True):
        rows = [item.prompt_ids.tolist() + response.tolist() for response in item.responses]
        expected = [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
        assert found == pytest.approx(expected, abs=1e-5)
    engine.close()


def test_a_reward_model_of_others_that_pads_with_the_end_is_read_where_it_was_trained(tiny_reward_model, tmp_path):
    """Of transformers' classifiers, the last token that is not padding: the one before the end."""
    from transformers import LlamaForSequenceClassification

    padded = shutil.copytree(tiny_reward_model, tmp_path / "padded")
    settings = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(settings | {"pad_token_id": 2}))
    engine = SequenceScoringEngine(TrainingConfig(model=str(padded), head="value", dtype="float32"), where="reward")
    engine.open()
    model = LlamaForSequenceClassification.from_pretrained(padded)
    answers = [[40, 41, 2], [40, 41, 2, 2], [40, 41]]
    group = TokenGroup(prompt_ids=Buffer.ints([5, 9]), responses=[Buffer.ints(answer) for answer in answers])
    ours = engine.score_sequences(group)
    theirs = [model(input_ids=torch.tensor([[5, 9, *answer]])).logits.item() for answer in answers]
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours == pytest.approx(ours[:1] * 3, abs=1e-5)
    engine.close()


def test_a_language_model_is_refused_as_a_reward_model(tiny_llama):
    engine = SequenceScoringEngine(TrainingConfig(model=str(tiny_llama), head="value"), where="reward")
    with pytest.raises(ModelError, match="not a \\*ForSequenceClassification"):
        engine.open()


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    schedule = Schedule(kind="cosine", warmup_steps=2, total_steps=10, final_ratio=0.1)
    ratios = [schedule.ratio(step) for step in range(12)]
    assert ratios[:3] == [0.5, 1.0, 1.0]
    assert ratios[6] == pytest.approx(0.55)
    assert ratios[10] == ratios[11] == pytest.approx(0.1)
    assert Schedule(kind="constant", warmup_steps=4).ratio(0) == 0.25


def test_the_learning_rate_falls_in_a_line_or_at_the_end_only():
    linear = Schedule(kind="linear", warmup_steps=2, total_steps=10, final_ratio=0.2)
    assert [linear.ratio(step) for step in (0, 2, 6, 10, 99)] == pytest.approx([0.5, 1.0, 0.6, 0.2, 0.2])
    wsd = Schedule(kind="wsd", warmup_steps=2, total_steps=10, final_ratio=0.1, decay_ratio=0.4)
    assert [wsd.ratio(step) for step in (0, 2, 6, 8, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])
    assert Schedule(kind="wsd", total_steps=10, decay_ratio=0.2).ratio(9) == pytest.approx(0.55)


def test_no_clipping_steps_by_the_whole_gradient(tiny_llama):
    """With an epsilon far above the gradient Adam's first step is lr * g / eps, so the gradient's size shows."""
    moved: list[float] = []
    for max_grad_norm in (0.0, 1.0):
        engine = opened(tiny_llama, lr=1.0, adam_eps=1e3, max_grad_norm=max_grad_norm)
        before = [parameter.detach().clone() for parameter in engine.model.parameters()]
        engine.accumulate(GROUPS, choose(WeightedTokens))
        norm = engine.apply()["grad_norm"]
        pairs = zip(engine.model.parameters(), before, strict=True)
        change = sum(float(((now.detach() - old) ** 2).sum()) for now, old in pairs)
        moved.append(change**0.5 / norm * 1e3)
    assert norm > 2.0
    assert moved[0] == pytest.approx(1.0, rel=1e-2)
    assert moved[1] == pytest.approx(1.0 / norm, rel=1e-2)


def test_a_cosine_without_length_is_a_config_error(tiny_llama):
    with pytest.raises(ConfigError, match="total_steps=0"):
        opened(tiny_llama, schedule=Schedule()).accumulate(GROUPS, choose(WeightedTokens))
