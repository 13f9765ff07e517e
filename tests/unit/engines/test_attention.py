"""Attention without a mask: what each token sees, forward and backward, and no tensor of pairs of tokens."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from flowrl.engines.attention import AttentionSpan, _has_flash_attn, attend, block_mask, check_attention, spans_of
from flowrl.engines.models import TokenReader
from flowrl.engines.packing import pack, plan
from flowrl.errors import ConfigError
from tests.unit.engines.test_models import load
from tests.unit.engines.test_packing import CPU, group, random_groups

PIECES = [(3, [2, 2, 1]), (5, [4]), (2, [0, 3]), (4, [0, 0])]


def mask_of(pieces) -> torch.Tensor:
    """Return which key each query sees, said one pair at a time."""
    owners = [(p, b) for p, (prompt, fed) in enumerate(pieces) for b, n in enumerate([prompt, *fed]) for _ in range(n)]
    sees = [[p == q and (c in (0, b)) and j <= i for j, (q, c) in enumerate(owners)] for i, (p, b) in enumerate(owners)]
    return torch.tensor(sees)


def test_spans_are_runs_of_equal_sequences_and_the_prompts_they_see():
    found = [AttentionSpan(0, 3, 3), AttentionSpan(3, 7, 2), AttentionSpan(3, 7, 0, 0, 3), AttentionSpan(7, 12, 5)]
    assert spans_of([(3, [2, 2]), (4, [1])]) == found


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("short", [0, 128])
def test_values_and_gradients_are_those_of_a_mask(dtype, tolerance, short, monkeypatch):
    monkeypatch.setattr("flowrl.engines.attention.SHORT", short)
    torch.manual_seed(0)
    length = sum(prompt + sum(fed) for prompt, fed in PIECES)
    spans = torch.tensor(spans_of(PIECES))[None, None]
    tensors = [torch.randn(1, heads, length, width) for heads, width in ((4, 32), (2, 32), (2, 16))]
    outer = torch.randn(1, length, 4, 16)
    found: list[tuple[torch.Tensor, ...]] = []
    for kind in (dtype, torch.float64):
        leaves = q, k, v = [tensor.to(dtype).to(kind).requires_grad_() for tensor in tensors]
        if found:
            out = scaled_dot_product_attention(q, k, v, mask_of(PIECES), scale=0.3, enable_gqa=True).transpose(1, 2)
        else:
            out, _ = attend(None, q, k, v, spans, scaling=0.3)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, outer.to(kind))))
    for ours, theirs in zip(*found, strict=True):
        assert float((ours.double() - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


def test_flex_attention_sees_the_same():
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    pieces = [*PIECES, (130, [140, 20])]
    length = sum(prompt + sum(fed) for prompt, fed in pieces)
    blocks = block_mask(spans_of(pieces), length, CPU)
    assert torch.equal(create_mask(blocks.mask_mod, None, None, length, length, device="cpu")[0, 0], mask_of(pieces))
    assert float(blocks.sparsity()) > 0
    q, k, v = (torch.randn(1, 2, length, 16) for _ in range(3))
    spans = torch.tensor(spans_of(pieces))[None, None]
    with pytest.warns(UserWarning, match="without torch.compile"):
        theirs: Any = flex_attention(q, k, v, block_mask=blocks)
    assert torch.allclose(attend(None, q, k, v, spans)[0].transpose(1, 2), theirs, atol=1e-5)


class Squares(TorchDispatchMode):
    """Adds up the bytes of every tensor made with two sides of `length` or more."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.square = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and sum(n >= self.length for n in tensor.shape) > 1:
                self.square += tensor.numel() * tensor.element_size()
        return out


@pytest.mark.parametrize(("kind", "layout"), [("varlen", "unmasked"), ("sdpa", "shared")])
def test_no_tensor_is_the_square_of_a_rows_length(tiny_llama, kind, layout):
    reader = TokenReader(load(tiny_llama), head="policy", temperature=1.0, attention=kind)
    groups = [group(200, 90, 150), group(60, 40)]
    ((rows,),) = plan(groups, layout=layout, reads="before", budget=1000)
    length = max(sum(piece.length for piece in row) for row in rows)
    assert length > 320, "longer than any weight's side"
    with Squares(length) as seen:
        reader.states(pack(groups, rows, layout=layout, reads="before", device=CPU)).sum().backward()
    assert (seen.square == 0) == (kind == "varlen")


def test_a_prompt_is_shared_by_all_responses_and_rows_have_no_padding():
    groups = [group(60, *[300] * 4), *random_groups(seed=5)]
    (batches,) = plan(groups, layout="unmasked", reads="before", budget=2048)
    assert [len(rows) for rows in batches] == [1] * len(batches)
    assert next(piece.samples for rows in batches for piece in rows[0] if piece.group == 0) == (0, 1, 2, 3)
    assert all(
        (pack(groups, rows, layout="unmasked", reads="before", device=CPU).piece_RL >= 0).all() for rows in batches
    )


def test_what_a_device_cannot_compute_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"learner\.attention: flex, and FlexAttention has no backward on CPUs; take"):
        check_attention("flex", "learner", has_gpu=False)


def test_flash_attn_4_is_not_taken_for_flash_attn(tmp_path, monkeypatch):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not _has_flash_attn()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert _has_flash_attn()
