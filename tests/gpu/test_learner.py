"""A DeepSpeed learner in bfloat16 on one device: its numbers, its memory beside the plan's, its speed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from flowrl.config import Select
from flowrl.engines.agreement import SAME_WEIGHTS
from flowrl.engines.base import TokenGroup
from flowrl.messages import Buffer
from flowrl.tuning.machines import this_site
from flowrl.tuning.memory import Work, computing
from flowrl.tuning.shapes import find_shape

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

OBJECTIVE = Select(use="perf.learner:TokenMean")  # whoever has a positive advantage becomes likelier
PROMPT, RESPONSE, SAMPLES = 64, 64, 4
GROUPS = {"cuda": 64, "cpu": 4}  # of a step
WITHIN = 0.15  # of the plan: the peak that torch tells


def groups_of(number: int) -> list[TokenGroup]:
    draw = np.random.default_rng(0)
    advantages = [Buffer.floats(np.ones(RESPONSE, dtype=np.float32))] * SAMPLES
    return [
        TokenGroup(
            prompt_ids=Buffer.ints(draw.integers(0, 300, PROMPT, dtype=np.int32)),
            responses=[Buffer.ints(draw.integers(0, 300, RESPONSE, dtype=np.int32)) for _ in range(SAMPLES)],
            columns={"advantages": advantages},
        )
        for _ in range(number)
    ]


def mean_of(scores: Any) -> float:
    return float(np.mean([row for group in scores for row in group]))


def plain_logprobs(model: Path, group: TokenGroup) -> np.ndarray:
    """Return transformers' log-probs of a group's responses in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompt = group.prompt_ids.tolist()
    rows = torch.tensor([prompt + response.tolist() for response in group.responses])
    with torch.no_grad():
        logprobs = plain(rows).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    return logprobs.gather(2, rows[:, PROMPT:, None])[..., 0].numpy()


def test_a_step_in_bfloat16_makes_what_is_rewarded_likelier(learner, model, device, figure) -> None:
    assert learner.device.type == device
    groups = groups_of(4)
    before = learner.score(groups)
    gap = np.abs(np.stack(before[0]) - plain_logprobs(model, groups[0])).mean()
    assert gap < SAME_WEIGHTS[torch.bfloat16], "the device computes what float32 on the CPU does"
    for _ in range(2):
        learner.accumulate(groups, OBJECTIVE)
        figures = learner.apply()
    assert np.isfinite(figures["grad_norm"])
    gain = mean_of(learner.score(groups)) - mean_of(before)
    assert gain > 0
    figure("bfloat16 against float32, nats", f"{gap:.4f}")
    figure("log-prob gained by two steps, nats", f"{gain:.3f}")


def test_a_learner_takes_the_memory_that_the_plan_says_and_its_speed_is_told(learner, model, device, figure) -> None:
    groups = groups_of(GROUPS[device])
    learner.accumulate(groups[:1], OBJECTIVE)
    learner.apply()  # the optimizer's states are there, kernels are chosen
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start_s = time.perf_counter()
    learner.accumulate(groups, OBJECTIVE)
    learner.apply()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start_s
    shape, site = find_shape(str(model), {}), this_site()
    num_tokens = len(groups) * (PROMPT + SAMPLES * RESPONSE)
    rate = 6 * (shape.active + shape.embedding) * num_tokens / seconds
    figure("learner, tokens/s", f"{num_tokens / seconds:.0f}")
    figure("learner, TFLOP/s", f"{rate / 1e12:.2f}")
    if device != "cuda":
        return
    assert site.speed is not None
    figure(f"learner, MFU of a {site.speed.name}", f"{rate / site.speed.flops:.0%}")
    work = Work(prompt=PROMPT, response=RESPONSE, samples=SAMPLES)
    need = computing(shape, learner.config, work, "policy", on_gpu=True)
    planned = sum(size for name, size in need.device.items() if name not in ("CUDA context", "fragments"))
    peak = torch.cuda.max_memory_allocated()
    figure("learner, peak of torch / plan, GB", f"{peak / 1e9:.2f} / {planned / 1e9:.2f}")
    assert peak == pytest.approx(planned, rel=WITHIN)
