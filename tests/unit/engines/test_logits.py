"""The head's logits are made, in forward and in backward, a part at a time, and none of them are kept.

Of a lone log-prob a linear head keeps a number for each, of which twice as many are allowed in float32.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowrl.engines.head import FloatLinear
from flowrl.engines.packing import pack, plan
from tests.unit.engines.test_trainer import GROUPS, WeightedTokens, choose, gradients, opened

VOCAB, MOST_TOKENS = 320, 7


class Widest(TorchDispatchMode):
    """Notes the most rows that any tensor [rows, vocabulary] has that an operation makes; the head's weight aside."""

    def __init__(self) -> None:
        super().__init__()
        self.num_rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCAB:
                rows = tensor.numel() // VOCAB
                self.num_rows = max(self.num_rows, rows if rows != 64 else 0)  # 64: the weight, transposed
        return made


@pytest.mark.slow
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_logits_of_more_tokens_than_the_bound_never_exist_and_gradients_are_those_of_the_whole(tiny_llama, entropy):
    num_tokens = sum(len(response) for item in GROUPS for response in item.responses)
    assert num_tokens > 8 * MOST_TOKENS
    assert num_tokens != 64
    found = []
    for max_logits in (VOCAB * num_tokens, VOCAB * MOST_TOKENS):
        engine = opened(tiny_llama)
        engine.reader.max_logits = max_logits
        kept: list[int] = []

        def pack(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept += [tensor.numel() // VOCAB] if tensor.shape[-1:] == (VOCAB,) and tensor.shape[0] != 64 else []
            return tensor

        with Widest() as widest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = engine.accumulate(GROUPS, choose(WeightedTokens, entropy=entropy))["loss"]
        found.append((loss, gradients(engine), widest.num_rows, max(kept, default=0)))
    whole, parts = found
    assert whole[2] == whole[3] == num_tokens
    most = MOST_TOKENS if entropy else 2 * MOST_TOKENS
    assert 0 < parts[2] <= most
    assert parts[3] <= most  # a part's own, while its backward runs
    assert parts[0] == pytest.approx(whole[0], abs=1e-6)
    for name, expected in whole[1].items():
        torch.testing.assert_close(parts[1][name], expected, atol=1e-6, rtol=1e-5)


def far_from_exact(directory, head_dtype: str) -> float:
    """Return how far the log-probs of a bfloat16 model lie from those of its states by a head in float64, in nats."""
    engine = opened(directory, dtype="bfloat16", head_dtype=head_dtype)
    reader = engine.reader
    batch = one_batch(reader)
    with torch.no_grad():
        states_NH, head = reader.states(batch), reader.model.get_parameter("lm_head.weight")
        exact_NV = (states_NH.double() @ head.double().T).log_softmax(-1)
        found_N, _ = reader(batch)
    exact_N = exact_NV.gather(-1, batch.target_N[:, None]).squeeze(-1)
    engine.close()
    return float((found_N.double() - exact_N).abs().mean())


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)])
def test_log_probs_are_exact_and_their_gradients_those_of_the_models_dtype(dtype, rounding):
    torch.manual_seed(0)
    layer = FloatLinear(64, VOCAB, bias=False).to(dtype)
    states_NH, outer_N = 4.0 * torch.randn(40, 64), torch.randn(40)
    targets_N = torch.randint(VOCAB, (40,))
    leaves = [states_NH.to(dtype).requires_grad_(), layer.weight]
    found_N = layer(leaves[0], targets_N, 0.7)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_N = (exact[0] @ exact[1].T / 0.7).log_softmax(-1).gather(-1, targets_N[:, None])[:, 0]
    torch.testing.assert_close(found_N.double(), exact_N, atol=5e-6, rtol=0)
    theirs = torch.autograd.grad(exact_N @ outer_N.double(), exact)
    for ours, expected in zip(torch.autograd.grad(found_N @ outer_N, leaves), theirs, strict=True):
        assert float((ours.double() - expected).norm() / expected.norm()) < rounding


def one_batch(reader):
    ((rows,),) = plan(GROUPS[:1], layout="padded", reads="before", budget=1 << 20)
    return pack(GROUPS[:1], rows, layout="padded", reads="before", device=reader.model.device)


def test_a_head_that_multiplies_in_float32_rounds_nothing(tiny_llama):
    assert far_from_exact(tiny_llama, "auto") < 1e-6 < 1e-4 < far_from_exact(tiny_llama, "model")


def test_a_large_head_multiplies_in_the_models_dtype_unless_told_otherwise(tiny_llama, monkeypatch):
    from flowrl.engines import models

    monkeypatch.setattr(models, "MAX_LOGITS", VOCAB * 64 - 1)
    assert far_from_exact(tiny_llama, "auto") > 1e-4
    assert far_from_exact(tiny_llama, "float32") < 1e-6
