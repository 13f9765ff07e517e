"""SFT, the process reward model and distillation against slow loops, by hand, and in expectation."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import pytest
import torch

from flowrl.algorithms.base import AdvantageBatch, LossBatch, Objective
from flowrl.algorithms.corrections import Correction
from flowrl.algorithms.distillation import Distillation
from flowrl.algorithms.on_policy_distillation import OnPolicyDistillation
from flowrl.algorithms.pretraining import Pretraining
from flowrl.algorithms.process import Process
from flowrl.algorithms.sft import SFT
from flowrl.config import Select
from flowrl.errors import ConfigError
from tests.support import slow_preference as slow
from tests.support.pair_batches import pair_batch
from tests.support.slow_algorithms import gradient, sampled
from tests.unit.algorithms.cases import advantage_batch, gradient_of, mask_rows, rows_of, same

SEEDS = range(3)
Direction = Literal["forward", "reverse"]
Who = Literal["teacher", "student"]


def assert_equals_slow(objective: Objective, batch: LossBatch, slow_loss: Any) -> None:
    found = objective.loss(batch)
    logprobs = rows_of(batch.logprobs_BT)
    total, count = slow_loss(logprobs)
    assert float(found.count) == count
    assert same(found.total / found.count, total / count)
    expected = gradient(lambda moved: slow_loss(moved)[0] / count, logprobs)
    assert same(gradient_of(found.total / found.count, batch), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_sft_and_its_gradient_equal_the_slow_ones(seed: int):
    batch = pair_batch(seed)
    masks = mask_rows(batch.mask_BT)
    assert_equals_slow(SFT(), batch, lambda lp: slow.sft(lp, masks))


def test_sft_is_a_mean_over_tokens_not_over_responses():
    mask_BT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    loss = SFT().loss(LossBatch(torch.tensor([[-1.0, -1.0, -1.0], [-5.0, -9.0, -9.0]]), mask_BT, {}))
    assert float(loss.total / loss.count) == 2.0
    assert same(loss.metrics["token_probability"][0], 3 * math.exp(-1.0) + math.exp(-5.0))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threshold", [None, 0.0, 0.4])
def test_the_process_loss_and_its_gradient_equal_the_slow_ones(threshold: float | None, seed: int):
    batch = pair_batch(seed)
    labels, masks = rows_of(batch.columns["step_label"]), mask_rows(batch.mask_BT)
    objective = Process() if threshold is None else Process(labels="hard", threshold=threshold)
    assert_equals_slow(objective, batch, lambda values: slow.process(values, labels, masks, threshold=threshold))


def test_process_by_hand_counts_step_ends_only():
    nan = float("nan")
    batch = LossBatch(
        torch.tensor([[5.0, 2.0, 5.0, -1.0]]), torch.ones(1, 4), {"step_label": torch.tensor([[nan, 1.0, nan, 0.75]])}
    )
    loss = Process().loss(batch)
    assert float(loss.count) == 2.0
    assert same(
        loss.total, math.log1p(math.exp(-2.0)) + 0.75 * math.log1p(math.exp(1.0)) + 0.25 * math.log1p(math.exp(-1))
    )
    assert float(loss.metrics["accuracy"][0]) == 1.0
    unsure = Process().loss(batch._replace(logprobs_BT=torch.zeros(1, 4)))
    assert float(unsure.metrics["accuracy"][0]) == 1.0, "two steps, each half right"


def expectation(objective: Distillation, logits: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The loss of every token of a vocabulary, weighted by its probability under who draws, and the metric kl alike."""
    student = logits.log_softmax(0)
    drawn = (teacher if objective.drawn_by == "teacher" else student.detach()).exp()
    total, kl = torch.zeros(()), 0.0
    for token in range(len(logits)):
        batch = LossBatch(student[token].reshape(1, 1), torch.ones(1, 1), {"reference": teacher[token].reshape(1, 1)})
        loss = objective.loss(batch)
        total = total + drawn[token] * loss.total
        kl += float(drawn[token] * loss.metrics["kl"][0])
    return total, kl


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("drawn_by", ["teacher", "student"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_distillation_has_the_gradient_of_the_divergence_in_the_mean(direction: Direction, drawn_by: Who, seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, generator=generator, requires_grad=True)
    teacher = torch.randn(5, generator=generator).log_softmax(0)
    objective = Distillation(direction=direction, drawn_by=drawn_by, mix=1.0, max_weight=1e6)
    total, kl = expectation(objective, logits, teacher)
    (found,) = torch.autograd.grad(total, [logits])
    student = logits.detach().log_softmax(0).double().tolist()
    assert same(found, slow.divergence_gradient(student, teacher.double().tolist(), direction))
    assert kl == pytest.approx(slow.divergence(student, teacher.double().tolist(), direction), abs=1e-5)


@pytest.mark.parametrize(
    ("direction", "drawn_by", "teacher", "expected"),
    [
        ("forward", "teacher", -1.0, math.exp(-1) - 1 + 1),  # d = -1
        ("forward", "student", -1.0, math.e * math.exp(-1)),
        ("forward", "student", -0.01, 5.0 * (math.expm1(-1.99) + 1.99)),  # the weight would be 7.3
        ("reverse", "student", -1.0, 0.5),
        ("reverse", "teacher", -1.0, 0.5 * math.exp(-1)),
        ("reverse", "teacher", -5.0, 0.5 * 9.0 * 5.0),  # d = 3: the weight would be 20
    ],
)
def test_distillation_of_one_token_by_hand_with_its_weight_cut(
    direction: Direction, drawn_by: Who, teacher: float, expected: float
):
    batch = LossBatch(torch.full((1, 1), -2.0), torch.ones(1, 1), {"reference": torch.full((1, 1), teacher)})
    loss = Distillation(direction=direction, drawn_by=drawn_by, mix=0.5, max_weight=5.0).loss(batch)
    assert same(loss.total, 0.5 * expected + 0.5 * 2.0)
    assert same(loss.metrics["teacher_nll"][0], -teacher)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_the_divergence(direction: Direction):
    batch = LossBatch(
        torch.full((1, 2), -1.0, requires_grad=True), torch.ones(1, 2), {"reference": torch.full((1, 2), -1.0)}
    )
    loss = Distillation(direction=direction, mix=1.0).loss(batch)
    assert float(loss.total.detach()) == 0.0
    assert not gradient_of(loss.total, batch).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_without_the_divergence_distillation_is_sft(seed: int):
    batch = pair_batch(seed)
    assert torch.equal(Distillation(mix=0.0).loss(batch).total, SFT().loss(batch).total)


@pytest.mark.parametrize("drawn_by", ["teacher", "student"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_student_far_from_the_teacher_still_moves_towards_it(direction: Direction, drawn_by: Who):
    objective = Distillation(direction=direction, drawn_by=drawn_by, mix=1.0)
    batch = LossBatch(
        torch.tensor([[-60.0]], requires_grad=True), torch.ones(1, 1), {"reference": torch.tensor([[-1.0]])}
    )
    found = gradient_of(objective.loss(batch).total, batch)
    assert torch.isfinite(found).all()
    if (direction, drawn_by) != ("reverse", "teacher"):  # there the weight is the student's own probability
        assert float(found) <= -1.0 + 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_the_pretraining_loss_is_the_weighted_likelihood_of_texts(seed: int):
    batch = pair_batch(seed)
    masks = mask_rows(batch.mask_BT)
    assert_equals_slow(Pretraining(coef=0.3), batch, lambda lp: (0.3 * slow.sft(lp, masks)[0], slow.sft(lp, masks)[1]))
    assert same(Pretraining(coef=0.3).loss(batch).metrics["nll"][0], slow.sft(rows_of(batch.logprobs_BT), masks)[0])


def distilled(
    algorithm: OnPolicyDistillation, student: torch.Tensor, teacher: torch.Tensor, behaviour: torch.Tensor
) -> torch.Tensor:
    """The mean loss of every pair of tokens of a vocabulary, weighted by its probability under the policy that drew."""
    total = torch.zeros(())
    for pair in itertools.product(range(len(student)), repeat=2):
        old, ref, now = (each[list(pair)].detach()[:, None] for each in (behaviour, teacher, student))
        credited = algorithm.advantages(AdvantageBatch(torch.zeros(2), torch.ones(2, 1), old, ref))
        columns = {"behaviour": old, "proximal": now, "reference": ref, "advantages": credited.advantages_BT}
        loss = algorithm.loss(LossBatch(student[list(pair)][:, None], torch.ones(2, 1), columns))
        total = total + behaviour[list(pair)].sum().exp() * loss.total / loss.count
    return total


def reverse_kl(logits: list[float], teacher: list[float]) -> float:
    norm = math.log(sum(math.exp(x) for x in logits))
    return slow.divergence([x - norm for x in logits], teacher, "reverse")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("is_stale", [False, True])
def test_on_policy_distillation_has_the_gradient_of_the_reverse_kl_in_the_mean(is_stale: bool, seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, generator=generator, requires_grad=True)
    teacher = torch.randn(3, generator=generator).log_softmax(0)
    behaviour = (torch.randn(3, generator=generator) if is_stale else logits.detach()).log_softmax(0)
    # A decoupled correction makes samples of an older policy count as the policy's own.
    algorithm = OnPolicyDistillation(correction=Correction(kind="decoupled"))
    (found,) = torch.autograd.grad(distilled(algorithm, logits.log_softmax(0), teacher, behaviour), [logits])
    at = rows_of(logits[None])
    (expected,) = gradient(lambda moved: reverse_kl(moved[0], rows_of(teacher[None])[0]), at)
    assert same(found, expected, 2e-6)


def test_a_teacher_equally_far_from_every_sample_says_nothing_of_any_but_a_sample_alone():
    def equally_far(num: int) -> AdvantageBatch:
        shape = (num, 2)
        return AdvantageBatch(torch.zeros(num), torch.ones(shape), torch.full(shape, -1.0), torch.full(shape, -3.0))

    assert not OnPolicyDistillation().advantages(equally_far(3)).advantages_BT.any()
    assert OnPolicyDistillation().advantages(equally_far(1)).advantages_BT.tolist() == [[-2.0, -2.0]]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_token_is_worth_its_gap_less_that_of_the_other_samples_tokens(seed: int):
    group = advantage_batch(seed)
    assert group.reference_BT is not None
    ref, old, masks = rows_of(group.reference_BT), rows_of(group.behaviour_BT), mask_rows(group.mask_BT)
    expected: list[list[float]] = []
    for i, mask in enumerate(masks):
        others = [
            max(-0.3, min(0.3, ref[j][t] - old[j][t])) for j in range(len(masks)) if j != i for t in sampled(masks[j])
        ]
        worth = [max(-0.3, min(0.3, r - o)) - sum(others) / len(others) for r, o in zip(ref[i], old[i], strict=True)]
        expected.append([0.5 * each if sampled_here else 0.0 for each, sampled_here in zip(worth, mask, strict=True)])
    assert same(OnPolicyDistillation(coef=0.5, max_gap=0.3).advantages(group).advantages_BT, expected)


def test_a_policy_that_is_its_teacher_has_nothing_to_distil_and_a_reward_still_counts():
    flat_BT = torch.full((2, 3), -1.0)
    group = AdvantageBatch(torch.tensor([1.0, 0.0]), torch.ones(2, 3), flat_BT, flat_BT)
    assert not OnPolicyDistillation().advantages(group).advantages_BT.any()
    rewarded = OnPolicyDistillation(reward_coef=0.5)
    assert rewarded.advantages(group).advantages_BT.tolist() == [[0.25] * 3, [-0.25] * 3]
    assert rewarded.needs_group
    assert not OnPolicyDistillation().needs_group


def test_distillation_without_a_teacher_or_with_a_penalty_beside_it_is_refused():
    group = AdvantageBatch(torch.zeros(1), torch.ones(1, 1), torch.zeros(1, 1))
    with pytest.raises(ConfigError, match="add a reference node with the teacher"):
        OnPolicyDistillation().advantages(group)
    with pytest.raises(ConfigError, match="the reference is the teacher"):
        Select(use="flowrl.algorithms.on_policy_distillation:OnPolicyDistillation", options={"kl": {"coef": 0.1}}).load(
            "algorithm"
        )
