"""Attention without a mask: which tokens see which is said in spans, in memory that grows with tokens.

The layout "unmasked" of packing puts whole pieces one behind the other in one row. `spans` says of such a row what a
mask would. *Runs* are stretches of sequences of one length that each see their own past (a prompt, a response);
*crossings* are queries that see all of some keys (the responses of a piece, and its prompt). Spans stand in the place
of the 4D mask, which models hand to their layers as it is, also when layers are computed again in backward.

`attend` is registered with transformers under `NAME`, so every family that looks its attention up there takes it:
- spans, on CPUs: the flash kernel of torch for each run and each crossing, what both say of a query merged by
  log-sum-exp. Backward gives each kernel call the merged output and normaliser, with which its gradients are exact.
- spans, on GPUs: one call of a kernel for sequences of several lengths (flash-attn, else torch's), prompts' keys
  repeated for each response.
- a BlockMask: FlexAttention. Any other mask, or none: SDPA, as without us.
What neither takes (caps, sinks, biases, dropout) raises, and the model stays on masked layouts (agreement.py), as it
does where a kernel of this device fails its `trial`.

Called by models. Shapes: R rows, H heads, G heads of keys, L row length, D head size.

Tests: tests/unit/engines/test_attention.py, tests/gpu/test_attention.py
"""

from __future__ import annotations

import functools
import importlib.util
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.engines.base import AttentionKind

NAME = "flowrl"
FLEX_BLOCK = 128  # tokens a side; FlexAttention's own default
# Keys up to which backward on CPUs takes products of whole sequences (at 64 the flash kernel takes 3 times as long, at
# 128 1.4 times: bfloat16, one thread), and the most scores that it may hold.
SHORT, MOST_SCORES = 128, 1 << 24
NOT_TAKEN = ("softcap", "s_aux", "position_bias", "cache")
_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class AttentionSpan(NamedTuple):
    """Queries from `start` to `end` of the row; `length` > 0: a run of sequences so long, else a crossing."""

    start: int
    end: int
    length: int
    first_key: int = 0  # of a crossing: the keys that all its queries see
    last_key: int = 0


def check_attention(kind: AttentionKind, where: str, *, has_gpu: bool) -> None:
    """Insist that an attention can be computed, forward and backward, on this device.

    Raises:
        ConfigError: it cannot.
    """
    if kind == "flex" and not has_gpu:
        what = "flex, and FlexAttention has no backward on CPUs"
        raise ConfigError(f"{where}.attention", what, "take varlen or sdpa, or give the node a GPU")
    if kind == "varlen" and has_gpu and not _has_kernel():
        what = "varlen, but there is neither flash-attn nor torch.nn.attention.varlen"
        raise ConfigError(f"{where}.attention", what, "install flash-attn, or take flex or sdpa")


def _has_kernel() -> bool:
    return _has_flash_attn() or importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _has_flash_attn() -> bool:
    """Return whether flash-attn is there; a directory of its name without a module is flash-attn-4's, another API."""
    found = importlib.util.find_spec("flash_attn")
    return found is not None and found.origin is not None


def spans_of(pieces: Sequence[tuple[int, Sequence[int]]]) -> list[AttentionSpan]:
    """Return the spans of pieces that stand one behind the other, each a prompt's tokens and its responses'.

    A piece with one response is one sequence. `spans_of([(3, [2, 2]), (4, [1])])` is runs 0-3 of 3, 3-7 of 2 and 7-12
    of 5, and the crossing of 3-7 with keys 0-3.
    """
    found: list[AttentionSpan] = []
    start = 0
    for num_prompt, responses in pieces:
        if len(responses) == 1:
            found.append(AttentionSpan(start, start := start + num_prompt + responses[0], num_prompt + responses[0]))
            continue
        middle = start + num_prompt
        found.append(AttentionSpan(start, middle, num_prompt))
        end = middle
        for length, same in groupby(filter(None, responses)):
            found.append(AttentionSpan(end, end := end + length * len(list(same)), length))
        if end > middle:
            found.append(AttentionSpan(middle, end, 0, start, middle))
        start = end
    return found


def trial(num_heads: int, num_key_heads: int, width: int, *, dtype: torch.dtype, device: torch.device) -> float:
    """Return by how much attention by spans differs from a mask's on made-up tokens: values and gradients, the worst.

    In parts of their size; heads are those of a model. Whatever the kernel raises is raised.
    """
    pieces = [(5, [4, 3, 3]), (2, [6]), (SHORT + 1, [2, 2])]  # backward in either way
    spans, length = spans_of(pieces), sum(prompt + sum(fed) for prompt, fed in pieces)
    sees_LL = torch.zeros(length, length, dtype=torch.bool)
    for start, end, size, first, last in spans:
        for begin in range(start, end, size) if size else ():
            sees_LL[begin : begin + size, begin : begin + size] = torch.ones(size, size).tril().bool()
        sees_LL[start:end, first:last] = True
    random = torch.Generator().manual_seed(0)
    wide = {"generator": random, "dtype": torch.float32}  # vLLM may be setting another default meanwhile
    drawn = [torch.randn(1, n, length, width, **wide) for n in (num_heads, num_key_heads, num_key_heads)]
    outer = torch.randn(1, length, num_heads, width, **wide).to(dtype)
    found: list[tuple[Tensor, ...]] = []
    for is_ours in (True, False):
        leaves = [each.to(dtype) for each in drawn]
        leaves = q, k, v = [(each.to(device) if is_ours else each.double()).requires_grad_() for each in leaves]
        with torch.enable_grad():
            if is_ours:
                out, _ = attend(None, q, k, v, torch.tensor(spans)[None, None])
            else:
                out = scaled_dot_product_attention(q, k, v, sees_LL, enable_gqa=True).transpose(1, 2)
            found.append((out.detach(), *torch.autograd.grad(out, leaves, outer.to(out))))
    return max(float((a.cpu().double() - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))


def has_mask(given: Any) -> bool:
    """Return whether what a layer was given is a mask, rather than spans or FlexAttention's blocks."""
    return isinstance(given, Tensor) and given.dtype != torch.int64


def register() -> None:
    """Offer `attend` to transformers' models; as often as one likes."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def attend(
    module: Any, query_RHLD: Tensor, key_RGLD: Tensor, value_RGLD: Tensor, attention_mask: Any, *,
    scaling: float | None = None, dropout: float = 0.0, **further: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Return what a layer's queries see, [R, L, H, D], and None: transformers' interface of attention functions."""
    tensors = (query_RHLD, key_RGLD, value_RGLD)
    if not isinstance(attention_mask, Tensor) and attention_mask is not None:
        from transformers.integrations.flex_attention import flex_attention_forward

        return flex_attention_forward(module, *tensors, attention_mask, scaling=scaling, dropout=dropout, **further)
    if attention_mask is None or has_mask(attention_mask):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, *tensors, attention_mask, scaling=scaling, dropout=dropout, **further)
    asked = [name for name in NOT_TAKEN if further.get(name) is not None] + ["dropout"] * bool(dropout)
    if asked or query_RHLD.shape[0] != 1 or key_RGLD.shape[2] != query_RHLD.shape[2]:
        raise NotImplementedError(f"attention without a mask, with {', '.join(asked) or 'several rows'}")
    width, extra = value_RGLD.shape[-1], query_RHLD.shape[-1] - value_RGLD.shape[-1]
    if extra > 0:  # latent attention: kernels want one size of heads
        value_RGLD = torch.nn.functional.pad(value_RGLD, (0, extra))
    scale = query_RHLD.shape[-1] ** -0.5 if scaling is None else float(scaling)
    spans = [AttentionSpan(*each) for each in attention_mask[0, 0].tolist()]
    compute = _by_kernel if query_RHLD.is_cuda else _BySpan.apply
    return compute(query_RHLD, key_RGLD, value_RGLD, spans, scale)[..., :width], None


class _BySpan(torch.autograd.Function):
    """The flash kernel for CPUs, once for each span."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: list[AttentionSpan], scale: float
    ) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, num_heads, length, width = query.shape
        out_LHD = query.new_zeros(length, num_heads, width)
        total_LH = torch.zeros(length, num_heads, dtype=torch.float32 if query.dtype != torch.float64 else query.dtype)
        for span in spans:
            here = slice(span.start, span.end)
            parts = _parts_of(span, query, key, value)
            found, normaliser = _flash(*parts, 0.0, span.length > 0, scale=scale)
            found_LHD = found.transpose(1, 2).reshape(-1, num_heads, width)
            normaliser_LH = normaliser.transpose(1, 2).reshape(-1, num_heads)
            if span.length:
                out_LHD[here], total_LH[here] = found_LHD, normaliser_LH
                continue
            both_LH = torch.logaddexp(total_LH[here], normaliser_LH)
            share_LH1 = (normaliser_LH - both_LH).exp_()[..., None]
            out_LHD[here] = torch.lerp(out_LHD[here].to(share_LH1.dtype), found_LHD.to(share_LH1.dtype), share_LH1)
            total_LH[here] = both_LH
        ctx.save_for_backward(query, key, value, out_LHD, total_LH)
        ctx.spans, ctx.scale = spans, scale
        return out_LHD[None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out_LHD, total_LH = ctx.saved_tensors
        grads = [torch.zeros_like(each.transpose(1, 2)).transpose(1, 2) for each in (query, key, value)]
        out, gradient = out_LHD[None].transpose(1, 2), gradient.transpose(1, 2)
        total = total_LH[None].transpose(1, 2)
        for span in ctx.spans:
            parts = _parts_of(span, query, key, value)
            of_out, of_gradient = (_cut(each, span.start, span.end, span.length) for each in (out, gradient))
            of_total = _cut(total[..., None], span.start, span.end, span.length)[..., 0]
            # With the whole's normaliser, a part's gradients are its own.
            compute: Any = _short_backward if _is_short(*parts[:2]) else _flash_backward
            found = compute(of_gradient, *parts, of_out, of_total, 0.0, span.length > 0, scale=ctx.scale)
            for part, of_part in zip(_parts_of(span, *grads), found, strict=True):
                part += of_part
        return *grads, None, None


def _is_short(query: Tensor, key: Tensor) -> bool:
    return key.shape[2] <= SHORT and query.shape[:3].numel() * key.shape[2] <= MOST_SCORES


def _short_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, total_NHL: Tensor, _: float,
    is_causal: bool, *, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what the flash kernel's backward does, from its definition: products of whole, short sequences.

    The heads that share keys stand one behind the other, as queries of one sequence.
    """
    num, num_heads, length, _ = query.shape
    num_keys, width, wide = *key.shape[1:3], total_NHL.dtype

    def of_keys(tensor: Tensor) -> Tensor:
        return tensor.reshape(num * num_keys, -1, tensor.shape[-1])

    def by_head(tensor: Tensor) -> Tensor:
        return tensor.view(num, num_heads, length, width)

    q, k, v, given = map(of_keys, (query, key, value, gradient))
    probs = by_head(torch.bmm(q.to(wide) * scale, k.to(wide).transpose(1, 2))).sub_(total_NHL[..., None])
    if is_causal:
        probs.masked_fill_(torch.ones(length, width, dtype=torch.bool).triu_(1), -torch.inf)
    probs.exp_()
    of_value = torch.bmm(of_keys(probs.to(q.dtype)).transpose(1, 2), given)
    slack = (gradient.to(wide) * out).sum(-1, keepdim=True)
    moves = of_keys(probs.mul_(by_head(torch.bmm(given, v.transpose(1, 2))) - slack).mul_(scale).to(q.dtype))
    return torch.bmm(moves, k).view_as(query), torch.bmm(moves.transpose(1, 2), q).view_as(key), of_value.view_as(value)


def _cut(tensor: Tensor, start: int, end: int, length: int) -> Tensor:
    """Return a part of [1, H, L, D]; a run's sequences one by one, [N, H, length, D]. No copies."""
    part = tensor[:, :, start:end]
    return part[0].unflatten(1, (-1, length)).transpose(0, 1) if length else part


def _parts_of(span: AttentionSpan, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    keys = (span.start, span.end) if span.length else (span.first_key, span.last_key)
    return [
        _cut(query, span.start, span.end, span.length),
        *(_cut(tensor, *keys, span.length) for tensor in (key, value)),
    ]


@functools.lru_cache(maxsize=4)
def _sequences(
    spans: tuple[AttentionSpan, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
    """Return the queries' and keys' places in the row, where each sequence begins among them, and the longest."""
    crossed = {(each.start, each.end): range(each.first_key, each.last_key) for each in spans if not each.length}
    queries: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    for span in spans:
        before = next((seen for (start, end), seen in crossed.items() if start <= span.start < end), range(0))
        for start in range(span.start, span.end, span.length) if span.length else ():
            queries.append(np.arange(start, start + span.length))
            keys.append(np.concatenate((np.asarray(before, dtype=np.int64), queries[-1])))
    sizes = [[len(each) for each in side] for side in (queries, keys)]
    begins = [torch.tensor(np.cumsum([0, *side]), dtype=torch.int32, device=device) for side in sizes]
    places = [torch.from_numpy(np.concatenate(side)).to(device) for side in (queries, keys)]
    return places[0], places[1], begins[0], begins[1], max(sizes[0]), max(sizes[1])


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, spans: list[AttentionSpan], scale: float) -> Tensor:
    """Return the same from one call for sequences whose queries are the last of their keys."""
    asked, seen, begins_q, begins_k, most_q, most_k = _sequences(tuple(spans), query.device)
    q, k, v = (
        tensor[0].transpose(0, 1).index_select(0, at) for tensor, at in ((query, asked), (key, seen), (value, seen))
    )
    if _has_flash_attn():
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        found = flash_attn_varlen_func(q, k, v, begins_q, begins_k, most_q, most_k, softmax_scale=scale, causal=True)
    else:
        from torch.nn.attention.varlen import varlen_attn

        found = varlen_attn(
            q, k, v, begins_q, begins_k, most_q, most_k, scale=scale, window_size=(-1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
    return query.new_zeros(query.shape[2], *found.shape[1:]).index_copy(0, asked, found)[None]  # pyright: ignore


def block_mask(spans: list[AttentionSpan], length: int, device: torch.device) -> Any:
    """Return spans as FlexAttention's mask: the blocks to compute, and within them which key a query sees."""
    from torch.nn.attention.flex_attention import BlockMask

    num_blocks = -(-length // FLEX_BLOCK)
    visited = np.zeros((num_blocks, num_blocks), dtype=bool)
    begin, first, last = (np.arange(num_blocks * FLEX_BLOCK), *np.zeros((2, num_blocks * FLEX_BLOCK), dtype=np.int64))
    for span in spans:
        if span.length:
            begin[span.start : span.end] = np.arange(span.start, span.end, span.length).repeat(span.length)
        else:
            first[span.start : span.end], last[span.start : span.end] = span.first_key, span.last_key
    for token in range(len(begin)):
        row = visited[token // FLEX_BLOCK]
        row[begin[token] // FLEX_BLOCK : token // FLEX_BLOCK + 1] = True
        row[first[token] // FLEX_BLOCK : -(-last[token] // FLEX_BLOCK)] = True
    begin_L, first_L, last_L = (torch.from_numpy(each).to(device) for each in (begin, first, last))

    def sees(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key >= begin_L[query]) & (key <= query)
        return own | ((key >= first_L[query]) & (key < last_L[query]))

    counts = torch.from_numpy(visited.sum(1).astype(np.int32)).to(device)[None, None]
    order = torch.from_numpy(np.argsort(~visited, axis=1, kind="stable").astype(np.int32)).to(device)[None, None]
    return BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees, seq_lengths=(length, length))
