"""What ranks of a group do with parts of rows is what one does with whole ones; ranks are threads here."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flowrl.engines.attention import attend, spans_of
from flowrl.engines.base import TrainingConfig
from flowrl.engines.sequence import SequenceSplit, check_split
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

PIECES = [(3, [2, 2, 1]), (5, [3])]  # sixteen tokens in all
LENGTH = 16


def on_ranks(size: int, work: Callable[[SequenceSplit], Any]) -> list[Any]:
    """Run `work` as every rank of a group and return what each gives."""
    boxes: dict[int, tuple[torch.Tensor, list[int]]] = {}
    barrier = threading.Barrier(size, timeout=10)

    def exchanger(rank: int) -> Callable[..., None]:
        def exchange(found: torch.Tensor, parts: torch.Tensor, received: list[int] | None, sent: list[int] | None):
            each = [len(parts) // size] * size
            boxes[rank] = (parts, sent or each)
            barrier.wait()
            mine = [boxes[other][0].split(boxes[other][1])[rank] for other in range(size)]
            assert [len(part) for part in mine] == (received or each)
            torch.cat(mine, out=found)
            barrier.wait()

        return exchange

    def be(rank: int) -> Any:
        link: Any = SimpleNamespace(form_groups=lambda size: None, rank=rank)
        room: Any = SimpleNamespace(guarded=lambda collective: exchanger(rank))
        return work(SequenceSplit(link, room, size))

    with ThreadPoolExecutor(size) as pool:
        return [found.result() for found in [pool.submit(be, rank) for rank in range(size)]]


# Heads of queries and keys: N divides both, neither keys, queries alone or nothing, and one key serves all.
@pytest.mark.parametrize("heads", [(8, 4), (4, 2), (8, 2), (6, 3), (9, 3), (6, 1)])
@pytest.mark.parametrize("size", [2, 4])
def test_attention_over_a_group_is_attention(size, heads):
    torch.manual_seed(0)
    spans = torch.tensor(spans_of(PIECES))[None, None]
    tensors = [torch.randn(1, n, LENGTH, 8, dtype=torch.float64) for n in (heads[0], heads[1], heads[1])]
    outer = torch.randn(1, LENGTH, heads[0], 8, dtype=torch.float64)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected, _ = attend(None, leaves[0], leaves[1], leaves[2], spans)
    wanted = (expected, *torch.autograd.grad(expected, leaves, outer))

    def work(split: SequenceSplit) -> tuple[torch.Tensor, ...]:
        parts = [tensor.chunk(size, 2)[split.place].clone().requires_grad_() for tensor in tensors]
        q, k, v = parts
        found = split.attend(torch.nn.Module(), q, k, v, spans, scaling=None, dropout=0.0)
        return (found.detach(), *torch.autograd.grad(found, parts, outer.chunk(size, 1)[split.place]))

    values, *gradients = zip(*on_ranks(size, work), strict=True)
    torch.testing.assert_close(torch.cat(values, 1), wanted[0])
    for found, theirs in zip(gradients, wanted[1:], strict=True):
        torch.testing.assert_close(torch.cat(found, 2), theirs)


@pytest.mark.parametrize("read", [[5, 6, 7, 15, 17, 18, 30, 31], [31], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_judges_as_many_tokens_and_hears_of_all(size, read):
    states_RLH = torch.randn(2, LENGTH, 3, dtype=torch.float64)
    outer_N = torch.arange(1.0, 1 + len(read), dtype=torch.float64)

    def work(split: SequenceSplit) -> tuple[int, torch.Tensor, torch.Tensor]:
        part = split.part(states_RLH).clone().requires_grad_()
        dealt = split.deal(part, torch.tensor(read), LENGTH)
        told = split.tell(dealt.square().sum(-1), len(read))
        (told @ outer_N / size).backward()
        assert part.grad is not None
        return len(dealt), told.detach(), part.grad

    found = on_ranks(size, work)
    assert max(count for count, _, _ in found) == -(-len(read) // size)
    whole = states_RLH.clone().requires_grad_()
    expected_N = whole.flatten(0, 1)[read].square().sum(-1)
    (expected_N @ outer_N).backward()
    for _, told_N, _ in found:
        torch.testing.assert_close(told_N, expected_N.detach())
    torch.testing.assert_close(torch.cat([gradient for _, _, gradient in found], 1), whole.grad)


def test_groups_that_do_not_come_out_are_refused_with_the_numbers(tmp_path):
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3}')
    for size, ranks, words in (
        (2, 3, "2 does not divide 3 ranks"),
        (4, 4, "4 ranks, but the model has 3 attention heads"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_split(TrainingConfig(model="", sequence_parallel=size), tmp_path, "learner", num_ranks=ranks)
    check_split(TrainingConfig(model="", sequence_parallel=2), tmp_path, "learner", num_ranks=4)
