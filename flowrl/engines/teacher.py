"""A frozen teacher beside a training engine's model: it reads the same batches, and KLs are formed chunk by chunk.

Invariants:
- the teacher has no gradient, no optimizer and no place in the engine's own module, so that no checkpoint sees it;
- never more of its logits are held than of the student's, and they are made again in backward.

How it is loaded, and whether ranks hold it whole or a part each, the engine says. Called by trainer and models.
Shapes: N response tokens, H the teacher's hidden size, V vocabulary.

Tests: tests/contracts/test_teacher.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import torch

from flowrl.engines.agreement import settle
from flowrl.engines.base import Lora, TrainingConfig
from flowrl.engines.models import Reading, TokenReader
from flowrl.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from transformers import PreTrainedModel

    from flowrl.algorithms.base import Direction
    from flowrl.engines.packing import PackedBatch


class Teacher:
    """A frozen language model with the student's vocabulary."""

    def __init__(
        self,
        directory: str,
        config: TrainingConfig,
        *,
        where: str,
        vocab_size: int,
        load: Callable[[TrainingConfig, str], PreTrainedModel],
        place: Callable[[TokenReader], nn.Module],
    ) -> None:
        """Load it with `load`; `place` makes of its reader what is to be called in its place.

        Raises:
            ModelError: it cannot be loaded, or its vocabulary is not of `vocab_size` tokens.
        """
        self.directory = directory
        settings = msgspec.structs.replace(config, model=directory, head="policy", lora=Lora(), frozen=True)
        model = load(settings, f"{where}.teacher")
        model.requires_grad_(False).eval()
        found = int(model.config.get_text_config().vocab_size)
        if found != vocab_size:
            what = f"{directory} has a vocabulary of {found} tokens, the student one of {vocab_size}"
            raise ModelError(f"{where}.teacher", what, "take a teacher of the same family")
        self.reader = TokenReader(model, head="policy", temperature=1.0, attention=settings.attention)
        self.module = place(self.reader)
        settle(self.reader, self.module, settings, where=f"{where}.teacher")

    @torch.no_grad()
    def read(self, batch: PackedBatch, *, direction: Direction, share: float, temperature: float) -> Reading:
        """Return what the teacher knows at the response tokens of a batch."""
        states_NH, *_ = self.module(batch, as_states=True)
        return Reading(self.reader, states_NH, direction, share, temperature)
