"""What the objectives over preference pairs share: which rows are a pair, and the figures of a step's pairs.

A pair is a group of two responses, the chosen one first.

Invariants:
- pairs, not tokens, are counted;
- a pair of which either response has no token under the mask counts nowhere;
- the order of rows does not matter.

Shapes: B responses, T response tokens, P pairs. Called by dpo, ipo, pairwise and kin.

Tests: tests/unit/algorithms/test_preference.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flowrl.algorithms.base import Lesson, LossBatch, Objective
from flowrl.algorithms.functional import has_tokens, masked, right_side
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class PairObjective(Objective):
    """An objective over [chosen, rejected]."""

    @property
    def learns_from(self) -> Lesson:
        """Return "pairs"."""
        return "pairs"

    @property
    def needs_whole_groups(self) -> bool:
        """Return True: the two responses of a pair are compared."""
        return True

    @property
    def score_metric(self) -> str:
        """Return "accuracy": the share of held-out pairs in which the chosen response has the greater reward."""
        return "accuracy"


def paired(batch: LossBatch, values_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return each pair's value for the chosen and for the rejected response, both [P] in order of group.

    Raises:
        ConfigError: a group has not two responses.

    >>> batch = LossBatch(torch.zeros(2, 1), torch.ones(2, 1), {}, None, torch.tensor([5, 5]), torch.tensor([1, 0]))
    >>> [float(value) for value in paired(batch, torch.tensor([1.0, 2.0]))]
    [2.0, 1.0]
    """
    assert batch.group_B is not None, "a batch without groups has no pairs"
    assert batch.sample_B is not None, "a batch without samples has no pairs"
    num_responses = batch.group_B.bincount()
    wrong = num_responses[(num_responses != 0) & (num_responses != 2)]
    if len(wrong):
        what = f"compares pairs [chosen, rejected], but a group has {int(wrong[0])} responses"
        raise ConfigError("objective", what, "give preference data: two responses to each prompt")
    order = (batch.group_B * (batch.sample_B.max() + 1) + batch.sample_B).argsort()
    chosen, rejected = order[0::2], order[1::2]
    is_there = has_tokens(batch.mask_BT)
    kept = (is_there[chosen] * is_there[rejected]).nonzero().squeeze(1)
    return values_B[chosen[kept]], values_B[rejected[kept]]


def log_ratios(batch: LossBatch) -> Tensor:
    """Return log(pi / pi_ref) of each response token, 0 under mask 0."""
    return masked(batch.logprobs_BT - batch.column("reference"), batch.mask_BT)


def pair_metrics(chosen_P: Tensor, rejected_P: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return accuracy, margin and both rewards as sums over pairs with their number.

    A tie is half right, as in the area under a curve. So a policy beside itself as reference is at chance.

    >>> float(pair_metrics(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 3.0]))["accuracy"][0])
    1.5
    """
    chosen_P, rejected_P = chosen_P.detach(), rejected_P.detach()
    count = num_pairs(chosen_P)
    return {
        "accuracy": (right_side(chosen_P - rejected_P).sum(), count),
        "margin": ((chosen_P - rejected_P).sum(), count),
        "reward.chosen": (chosen_P.sum(), count),
        "reward.rejected": (rejected_P.sum(), count),
    }


def num_pairs(values_P: Tensor) -> Tensor:
    """Return how many pairs there are, as a tensor of the values' kind."""
    return torch.tensor(len(values_P), dtype=values_P.dtype, device=values_P.device)
