"""Even use of experts: the load-balancing loss of Switch Transformers, over the whole step.

Layer l gives token t a probability p_lte for each of E experts and sends it to the k likeliest. With f_le the share of
tokens sent to expert e and P_le the mean of p_lte, both over every token of the step,

    loss = mean over layers of E * sum_e f_le P_le

(Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6); it is k where experts are used evenly. A product of two means
is not linear in the batch: with f over a micro-batch, as transformers and OpenRLHF have it, another packing is another
loss. Small micro-batches press every few sequences to use all experts. But f takes no gradient. With f known for the
whole step the rest is a sum over tokens, which is law 7. It is the definition under which experts specialise best (Qiu
et al. 2025, arXiv:2501.11873). It costs one more forward without gradient, in which tokens are counted. transformers
forms the means over all layers together, so that one layer's favourites make up for another's; here each layer is
balanced by itself, as in both papers.

Tokens count as if every sequence were run alone: a prompt's once for each of its responses, padding never. Called by
trainer and models. Shapes: A layers with experts, E experts, T positions (rows times their length), k = top_k.

Tests: tests/unit/engines/test_router.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Routing:
    """What to measure at the routers of one pass: how many tokens each expert gets, or the loss."""

    shares_AE: Tensor | None = None  # f of the whole step; None: tokens are counted
    num_tokens: float = 0.0  # of the whole step, what the loss is divided by

    def measure(self, logits: Sequence[Tensor], copies_T: Tensor, top_k: int) -> Tensor:
        """Return the tokens of each expert, [A, E], or the sum over tokens that the loss is a mean of.

        `logits` are the routers' [T, E], layer by layer; `copies_T` is how many tokens each position counts for.
        """
        probs_ATE = torch.stack([layer.flatten(0, -2) for layer in logits]).float().softmax(-1)
        if self.shares_AE is None:
            chosen_ATE = torch.zeros_like(probs_ATE).scatter_(-1, probs_ATE.topk(top_k, -1).indices, 1.0)
            return torch.einsum("ate,t->ae", chosen_ATE, copies_T)
        num_layers, _, num_experts = probs_ATE.shape
        return torch.einsum("ate,ae,t->", probs_ATE, self.shares_AE, copies_T) * (num_experts / num_layers)


def check_router(config: PreTrainedConfig, where: str) -> None:
    """Insist that the experts of a model, of which this is the configuration, are balanced by this loss.

    Raises:
        ConfigError: it has no experts, or balances them otherwise.
    """
    if not hasattr(config.get_text_config(), "router_aux_loss_coef"):
        what = f"{(config.architectures or [config.model_type])[0]} has no experts that this loss balances"
        raise ConfigError(f"{where}.router_aux_loss", what, "leave it 0")
