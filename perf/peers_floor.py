"""The floor under a training step: the arithmetic that no implementation can leave out, over the machine's own rate.

With P parameters a token costs 2 P operations forward and 4 P backward, so training on it costs 6 P; the frozen
reference of DPO and GRPO reads it for 2 P, and sampling it costs 2 P. A prompt that several sequences begin with is
counted once, for once is enough; padding is not counted. Attention, norms, softmax and the optimizer are left out, and
the rate is that of large matrix products of the model's own shapes on every core. All of P is counted for prompts too,
though nobody needs their logits: at SmolLM2's shape a fifth of what a prompt token is counted for. Called by
perf/peers.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.data.models import inspect_model
from flowrl.data.prompts import load_tokenizer

if TYPE_CHECKING:
    from perf.peers_order import PeerStep, PeerWork

OPERATIONS = {"sft": 6, "dpo": 6 + 2, "grpo": 6 + 2 + 2}  # for each token and parameter
ROWS = 2048  # tokens in one of the measured products
REPEATS = 20


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """Mean tokens of one row of the data."""

    prompt: float
    responses: float  # all of a row's together, each with its stop token


def data_sizes(path: Path, model: Path) -> Sizes:
    """Return the mean tokens of the rows in a data file of perf/peers_data.py."""
    tokenizer: Any = load_tokenizer(model)
    rows = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]

    def tokens(names: tuple[str, ...]) -> int:
        return sum(len(tokenizer(row[name])["input_ids"]) for row in rows for name in names if name in row)

    answers = ("completion", "chosen", "rejected")
    num_answers = sum(name in row for row in rows for name in answers)
    return Sizes(prompt=tokens(("prompt",)) / len(rows), responses=(tokens(answers) + num_answers) / len(rows))


def floor_s(work: PeerWork, step: PeerStep, sizes: Sizes, *, rate: float) -> float:
    """Return the seconds that a step takes at least at `rate` operations per second."""
    if work.method == "grpo":
        num_tokens = work.groups * sizes.prompt + step.sampled_tokens
    else:
        num_tokens = work.examples * (sizes.prompt + sizes.responses)
    return OPERATIONS[work.method] * num_tokens * num_parameters(work.model) / rate


def num_parameters(model: str) -> int:
    """Return a model's parameters; a tied embedding counts once, as the head, which is what it is multiplied as."""
    return inspect_model(Path(model)).num_parameters


def matrix_rate(model: Path, *, cores: int, dtype: str = "bfloat16") -> float:
    """Return the operations per second of the model's largest kind of matrix product, the best of some tries."""
    import torch
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model).get_text_config()
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    shape = (ROWS, config.hidden_size, config.intermediate_size)
    left = torch.randn(shape[0], shape[1], dtype=getattr(torch, dtype))
    right = torch.randn(shape[2], shape[1], dtype=getattr(torch, dtype))
    seconds: list[float] = []
    for _ in range(REPEATS):
        start_s = time.perf_counter()
        torch.nn.functional.linear(left, right)
        seconds.append(time.perf_counter() - start_s)
    torch.set_num_threads(before)
    return 2.0 * shape[0] * shape[1] * shape[2] / min(seconds)
