"""What `flowrl bench dschat` gives to every system alike, and what each must tell of a step.

A `Workload` is one setting of the comparison: model, prompts, sizes, sampling, optimizer, seed and device time to
spend. `StepTimes` is one measured step: its wall clock and the seconds in which each stage of the paper's tables 5
and 6 was at work. Where stages run at once their seconds add up to more than the wall clock, and the difference is
what overlap saved. Loads no torch: the command imports it before it needs any.
"""

from __future__ import annotations

from typing import Annotated, Literal

from flowrl.config import Config, Meta
from flowrl.data.prompts import PromptData
from flowrl.engines.base import Dtype

Mode = Literal["fixed", "eos"]
Positive = Annotated[int, Meta(ge=1)]


class Workload(Config):
    """One setting, the same for every system."""

    mode: Mode = "eos"  # fixed: every response has max_tokens tokens, the stop token being one like any other
    groups: Positive = 4  # prompts in a step
    group_size: Positive = 8  # responses to each prompt
    max_tokens: Positive = 64  # N, of a response
    warmup: Positive = 2  # steps that are dropped
    steps: Positive = 5  # measured
    model: str = "SmolLM2-135M-Instruct"  # policy, reference and, with another head, critic
    reward_model: str = ""  # sequence classifier; "": the model with a random head, which costs the same
    data: PromptData = PromptData(num_heldout=1)
    seed: int = 0
    dtype: Dtype = "auto"  # of all models; optimizers work on float32 copies
    temperature: Annotated[float, Meta(gt=0)] = 1.0
    lr: Annotated[float, Meta(ge=0)] = 1e-6
    critic_lr: Annotated[float, Meta(ge=0)] = 5e-6
    cores: Positive = 1  # of this machine that a system may use
    gpus: Annotated[int, Meta(ge=0)] = 0  # likewise

    @property
    def samples(self) -> int:
        """Return the responses learned in one step."""
        return self.groups * self.group_size


class StepTimes(Config):
    """One step: the seconds in which each stage was at work, and what came of it."""

    wall_s: float
    generation_s: float
    sync_s: float = 0.0  # new weights on their way to whoever generates, and no stage at work
    scoring_s: float  # "logits + reward": log-probs, reference, values, scores
    training_s: float  # policy and critic
    other_s: float  # none of these
    samples: int
    tokens: int  # sampled
    lengths: tuple[int, ...]  # of the responses
    fed_tokens: int = 0  # that went through one scoring forward, padding included; 0: not counted

    @property
    def overlap_s(self) -> float:
        """Return the seconds that stages were at work beside another one; 8 + 4 s of work in 10 s give 2."""
        return self.generation_s + self.sync_s + self.scoring_s + self.training_s + self.other_s - self.wall_s
