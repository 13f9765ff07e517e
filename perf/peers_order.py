"""What `flowrl bench peers` asks of both sides, and what each step of either is told as. Loads no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from flowrl.config import Config, Meta
from perf.peers_data import Method

Way = Literal["autocast", "bfloat16", "float32"]


class PeerWork(Config):
    """One method at one setting, the same for both sides."""

    method: Method
    model: str  # local directory
    data: str  # JSONL
    groups: int = 4  # prompts in a step (GRPO)
    group_size: int = 8  # responses to each
    examples: int = 32  # in a step (SFT, DPO; pairs in DPO)
    max_tokens: int = 64  # of a response (GRPO)
    is_fixed: bool = False  # every response has max_tokens tokens
    warmup: Annotated[int, Meta(ge=1)] = 2
    steps: Annotated[int, Meta(ge=1)] = 5
    lr: float = 1e-6
    beta: float = 0.04  # GRPO: of the KL term, k3 against the reference; DPO: 0.1
    seed: int = 0
    cores: int = 1

    @property
    def sequences(self) -> int:
        """Return the sequences learned in one step."""
        return self.groups * self.group_size if self.method == "grpo" else self.examples


class PeerOrder(Config):
    """What TRL's process is to do; the settings that only it has."""

    work: PeerWork
    # autocast: float32 weights, computed in bfloat16; bfloat16: weights and optimizer in it; float32: all of it
    way: Way = "autocast"
    rows: int = 8  # sequences in one backward


class PeerStep(Config):
    """One step of either side."""

    wall_s: float
    sequences: int
    sampled_tokens: int = 0  # GRPO: of the responses
    tokens: int = 0  # of prompts and responses, each sequence with its own prompt; 0: not counted
    fed_tokens: int = 0  # the same with padding; 0: not counted
