"""On a GPU, attention without a mask has the values and gradients of attention with one, by either kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from flowrl.engines.attention import attend, block_mask, check_attention, spans_of
from tests.unit.engines.test_attention import mask_of

PIECES = [(300, [200, 200, 70]), (50, [400]), (128, [128, 0, 129])]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["varlen", "flex"])
def test_values_and_gradients_are_those_of_a_mask(kind):
    check_attention(kind, "learner", has_gpu=True)
    torch.manual_seed(0)
    device = torch.device("cuda", 0)
    length = sum(prompt + sum(fed) for prompt, fed in PIECES)
    spans = spans_of(PIECES)
    given: Any = torch.tensor(spans)[None, None] if kind == "varlen" else block_mask(spans, length, device)
    tensors = [torch.randn(1, heads, length, 64, device=device, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    outer = torch.randn(1, length, 4, 64, device=device, dtype=torch.bfloat16)
    ours = q, k, v = [tensor.clone().requires_grad_() for tensor in tensors]
    theirs = q, k, v = [tensor.double().requires_grad_() for tensor in tensors]
    out, _ = attend(torch.nn.Module(), q, k, v, given, scaling=0.125)
    mask = mask_of(PIECES).to(device)
    expected = scaled_dot_product_attention(q, k, v, mask, scale=0.125, enable_gqa=True).transpose(1, 2)
    found = (out.detach(), *torch.autograd.grad(out, ours, outer))
    right = (expected.detach(), *torch.autograd.grad(expected, theirs, outer.double()))
    for one, other in zip(found, right, strict=True):
        assert float((one.double() - other).abs().max()) <= 0.02 * float(other.abs().max())
