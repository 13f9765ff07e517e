"""An exponential moving average of a policy's weights, in float32 on the CPU of rank 0.

After each optimizer step, average <- decay * average + (1 - decay) * weights, from the weights as the step before the
first left them.

Invariants:
- weights are averaged as generators get them, whole and under the names of the model. So the average is the same for
  every engine, ZeRO stage and number of ranks, and can be read by any of them;
- saved and read again it goes on bit by bit.

Called by trainer.

Tests: tests/unit/engines/test_average.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

FILE = "average.safetensors"


class Average:
    """The average; empty until it has been given weights or read."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {}

    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take in the weights after a step; the first call takes them as they are."""
        if not self.tensors:
            self.tensors = {name: tensor.float().cpu().clone() for name, tensor in weights}
            return
        for name, tensor in weights:
            self.tensors[name].lerp_(tensor.float().cpu(), 1.0 - self.decay)

    def write(self, directory: Path) -> None:
        """Write it beside the rest of a state."""
        from safetensors.torch import save_file

        save_file(self.tensors, directory / FILE)

    def read(self, directory: Path) -> None:
        """Read what `write` wrote."""
        from safetensors.torch import load_file

        self.tensors = load_file(directory / FILE)


def is_saved(directory: Path) -> bool:
    """Say whether a state has an average."""
    return (directory / FILE).is_file()
