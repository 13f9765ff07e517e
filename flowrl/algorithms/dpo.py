"""DPO: direct preference optimisation (Rafailov 2023, 2305.18290, equation 7), with its conservative form.

    h = beta ((lp_w - ref_w) - (lp_l - ref_l)), log-probs summed over response tokens, or their mean
    loss = -(1 - e) log sigmoid(h) - e log sigmoid(-h) - nll_coef lp_w / |y_w|

e > 0 says that a pair is labelled the wrong way round with that probability (cDPO, Mitchell 2023). The last term keeps
the chosen response likely (iterative reasoning preference optimisation, 2404.19733, equation 2: normalised by length).
A response's implicit reward is beta (lp - ref). With reduction=mean, length-normalised DPO (Tulu 3, 2411.15124, section
5.1), a long response is no better for its length; beta is then greater, 5 in the paper. The mean is over pairs.

Tests: tests/unit/algorithms/test_preference.py
"""

from __future__ import annotations

from typing import Annotated, Literal

from torch.nn.functional import logsigmoid

from flowrl.algorithms.base import Loss, LossBatch
from flowrl.algorithms.functional import sequence_mean
from flowrl.algorithms.pairs import PairObjective, log_ratios, num_pairs, pair_metrics, paired
from flowrl.config import Meta


class DPO(PairObjective):
    """Direct preference optimisation."""

    beta: Annotated[float, Meta(gt=0)] = 0.1  # per nat: greater keeps the policy closer to the reference
    label_smoothing: Annotated[float, Meta(ge=0, lt=0.5)] = 0.0  # e: the part of pairs labelled wrongly
    nll_coef: Annotated[float, Meta(ge=0)] = 0.0  # of the chosen response's mean NLL per token
    reduction: Literal["sum", "mean"] = "sum"  # of log ratios over a response's tokens

    def loss(self, batch: LossBatch) -> Loss:
        """Return the loss as a sum over pairs and their number.

        Metrics: accuracy, the share of pairs whose chosen response has the greater reward; margin of the rewards;
        reward.chosen and reward.rejected; with nll_coef, nll.
        """
        log_ratios_BT = log_ratios(batch)
        is_mean = self.reduction == "mean"
        log_ratio_B = sequence_mean(log_ratios_BT, batch.mask_BT) if is_mean else log_ratios_BT.sum(1)
        chosen_P, rejected_P = paired(batch, self.beta * log_ratio_B)
        margin_P = chosen_P - rejected_P
        loss_P = -(1.0 - self.label_smoothing) * logsigmoid(margin_P) - self.label_smoothing * logsigmoid(-margin_P)
        metrics = pair_metrics(chosen_P, rejected_P)
        if self.nll_coef:
            likelihood_P, _ = paired(batch, sequence_mean(batch.logprobs_BT, batch.mask_BT))
            loss_P = loss_P - self.nll_coef * likelihood_P
            metrics["nll"] = (-likelihood_P.detach().sum(), num_pairs(likelihood_P))
        return Loss(loss_P.sum(), num_pairs(loss_P), metrics)
