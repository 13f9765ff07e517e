"""Knowledge distillation over the whole vocabulary: at each response token the exact KL to a teacher's distribution.

    forward  KL(teacher || student) = sum_v p_T(v) (log p_T(v) - log p_S(v))     (Hinton 2015, 1503.02531)
    reverse  KL(student || teacher) = sum_v p_S(v) (log p_S(v) - log p_T(v))     (MiniLLM, 2306.08543)
    jsd      b KL(teacher || M) + (1 - b) KL(student || M), M = b p_T + (1 - b) p_S    (GKD, 2306.13649, equation 1)
    loss = mix KL + (1 - mix) NLL, mean over the step's masked tokens

Forward covers all the teacher does, reverse seeks what it does most, jsd is bounded and between them. Both are taken at
one temperature, the samples' unless `at_temperature` gives another. On given responses (graphs/sft.py) this is
distillation from data; on the student's own samples (graphs/distill_online.py) on-policy distillation (GKD, 2306.13649,
whose gradient likewise goes through the loss and not through the sampling); there mix=1, for the NLL of one's own
samples teaches nothing.

A teacher's log-probs of the whole vocabulary cannot travel (V numbers a token, 200 kB of SmolLM2). Its k greatest would
cut off the tail, which the reverse KL is largest in. So the teacher is loaded beside the student in the training
engine, and reads the same packed batches. The KL is formed a chunk of tokens at a time (engines/teacher.py): exact, at
the price of the teacher's weights on every rank. Where those do not fit, distillation.py estimates the KL from the
sampled token alone, with the teacher anywhere. The teacher shares the student's vocabulary.

Tests: tests/unit/algorithms/test_full_distillation.py
"""

from __future__ import annotations

from typing import Annotated, Literal

from flowrl.algorithms.base import Direction, Loss, LossBatch, Objective
from flowrl.algorithms.functional import masked
from flowrl.config import Meta
from flowrl.errors import ConfigError


class FullDistillation(Objective):
    """Exact KL to a teacher's distribution at the response tokens."""

    teacher: str = ""  # Hugging Face id or local directory, or a run's directory
    direction: Literal["forward", "reverse", "jsd"] = "forward"  # forward covers the teacher's modes, reverse seeks one
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.5  # b of jsd
    at_temperature: Annotated[float, Meta(ge=0)] = 0.0  # of both distributions; 0: what samples are drawn with
    mix: Annotated[float, Meta(gt=0, le=1)] = 0.5  # of the KL; the rest is the likelihood of the tokens

    @property
    def teacher_model(self) -> str:
        """Return the teacher.

        Raises:
            ConfigError: none is set.
        """
        if not self.teacher:
            raise ConfigError("objective.teacher", "is not set", "name a model with the student's vocabulary")
        return self.teacher

    @property
    def divergence(self) -> Direction:
        """Return which divergence the engine is to form."""
        return self.direction

    @property
    def teacher_share(self) -> float:
        """Return b."""
        return self.share

    @property
    def temperature(self) -> float | None:
        """Return what both models' logits are divided by."""
        return self.at_temperature or None

    def idle_settings(self, num_updates: int, *, is_fresh: bool = False) -> list[str]:
        """Return which settings have no effect, and why."""
        is_idle = self.direction != "jsd" and self.changed("share")
        return [f"objective.share: no effect with direction={self.direction}"] if is_idle else []

    def loss(self, batch: LossBatch) -> Loss:
        """Return the mixed loss as a sum over masked tokens and their number.

        Metrics: kl, exact; nll. Where the engine only scores there is no KL, and the loss is the NLL alone.

        Raises:
            ConfigError: there is a gradient but no KL.
        """
        mask_BT = batch.mask_BT
        nll_BT = -masked(batch.logprobs_BT, mask_BT)
        count = mask_BT.sum()
        metrics = {"nll": (nll_BT.detach().sum(), count)}
        if batch.divergence_BT is None:
            if batch.logprobs_BT.requires_grad:
                raise ConfigError("objective.teacher", "this engine loads no teacher", "take one built on Trainer")
            return Loss(nll_BT.sum(), count, metrics)
        kl_BT = masked(batch.divergence_BT, mask_BT)
        metrics["kl"] = (kl_BT.detach().sum(), count)
        return Loss((self.mix * kl_BT + (1.0 - self.mix) * nll_BT).sum(), count, metrics)
