"""An allocator that refuses: a model whose passes fail above so many tokens, as they would on a full device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from flowrl.engines.trainer import Trainer


def make_scarce(
    engine: Trainer, *, most_tokens: int, during: Literal["forward", "backward"], after_steps: int = 0
) -> list[int]:
    """Let the model's second layer run out of memory; returns where the tokens of every refused pass are noted."""
    refused: list[int] = []

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError(f"planted: {refused[-1]} tokens")

    def look(_module: object, _args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        states_RLH = output[0] if isinstance(output, tuple) else output
        num_tokens = states_RLH.shape[0] * states_RLH.shape[1]
        is_due = num_tokens > most_tokens and engine._num_steps >= after_steps
        if is_due and during == "forward":
            refused.append(num_tokens)
            refuse()
        elif is_due and states_RLH.requires_grad:
            refused.append(num_tokens)
            states_RLH.register_hook(refuse)

    engine.model.base_model.layers[1].register_forward_hook(look)  # pyright: ignore
    return refused
