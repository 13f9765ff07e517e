"""Which rows are held out, and the order in which those of several sources are learned: endless, by probability.

Invariants:
- no prompt that is held out is learned;
- `split` takes rows as they come, so whoever sorts them first is held to no order of the source;
- `at(position)` is a pure function of the sizes, the weights, the seed and the position, so that a run resumes
  anywhere;
- of the first n positions every source has its share, to within one row at the end of a block and to within a block
  everywhere;
- the rows of a source come in complete permutations, one after the other, whatever stands between them.

Called by whoever loads prompts or examples.

Tests: tests/unit/data/test_mixing.py
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from flowrl.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

MIN_BLOCK = 100  # positions whose shares are exact; longer where a source's weight is below 1/100
MAX_BLOCK = 100_000  # a block is drawn as a whole


class Origin(Protocol):
    """Where a row comes from."""

    @property
    def source(self) -> int: ...

    @property
    def digest(self) -> bytes:
        """Return what tells rows that are the same."""
        ...


From = TypeVar("From", bound=Origin)
R = TypeVar("R")


@dataclass
class Split(Generic[R]):
    """Rows to train on and rows held out."""

    parts: list[list[R]]  # to train on, of each source
    heldout: list[R] = field(default_factory=list[R])
    num_left_out: int = 0  # further rows that ask what a held-out one asks

    @property
    def num_train(self) -> int:
        """Return the rows to train on."""
        return sum(map(len, self.parts))


def split(
    rows: Iterable[tuple[From, R]],
    *,
    num_sources: int,
    num_heldout: int,
    num_train: int,
    prompt_of: Callable[[From, R], Hashable],
) -> Split[R]:
    """Hold the first different rows out, train on the others; reads no further than `num_train` of them (0: all)."""
    found = Split[R]([[] for _ in range(num_sources)])
    held: set[bytes] = set()
    held_prompts: set[Hashable] = set()
    left = num_train
    for each, row in rows:
        prompt = prompt_of(each, row)
        if len(held) < num_heldout and each.digest not in held:
            held.add(each.digest)
            held_prompts.add(prompt)
            found.heldout.append(row)
        elif prompt in held_prompts:
            found.num_left_out += 1
        else:
            found.parts[each.source].append(row)
            left -= 1
            if left == 0:
                break
    return found


class Mixture:
    """An order over sources of `sizes` rows, drawn in proportion to `weights`."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """Raises `DataError` where a source has no rows, or hardly any share."""
        for number, size in enumerate(sizes):
            if not size:
                raise DataError(f"data.mix[{number}]", "has no rows left to train on", "drop it, or add rows to it")
        exact = [Fraction(str(weight)) for weight in weights]  # as they were written: 0.1 is a tenth
        self.sizes = list(sizes)
        self.shares = [weight / sum(exact) for weight in exact]
        if (least := min(self.shares)) < Fraction(1, MAX_BLOCK):
            what = f"has {float(least):.1g} of all weight, so that hardly a row of it would ever be learned"
            raise DataError(f"data.mix[{self.shares.index(least)}]", what, f"give it 1/{MAX_BLOCK} or more, or drop it")
        self._ends = list(accumulate(self.shares))
        self._seed = seed
        self._block_size = max(MIN_BLOCK, math.ceil(1 / min(self.shares)))
        # A run only ever touches neighbouring blocks and, of each source, two neighbouring epochs.
        self._block = functools.lru_cache(maxsize=4)(self._drawn)
        self._order = functools.lru_cache(maxsize=2 * len(self.sizes))(self._shuffled)

    def at(self, position: int) -> tuple[int, int]:
        """Return the source at a position and which of its rows is learned there."""
        block, offset = divmod(position, self._block_size)
        source, place = self._block(block)[offset]
        epoch, place = divmod(place, self.sizes[source])
        return source, self._order(source, epoch)[place]

    def counts(self, num_positions: int) -> list[int]:
        """Return how many of the first positions are each source's, at the end of a block.

        >>> Mixture([5, 5], [1, 2], seed=0).counts(300)
        [100, 200]
        """
        ends = [round(end * num_positions) for end in self._ends]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def _drawn(self, block: int) -> list[tuple[int, int]]:
        """Return (source, how many of its rows came before) for each position of a block."""
        begins, ends = self.counts(block * self._block_size), self.counts((block + 1) * self._block_size)
        sources = [
            number for number, (begin, end) in enumerate(zip(begins, ends, strict=True)) for _ in range(end - begin)
        ]
        random.Random(f"{self._seed}/block/{block}").shuffle(sources)
        drawn: list[tuple[int, int]] = []
        for source in sources:
            drawn.append((source, begins[source]))
            begins[source] += 1
        return drawn

    def _shuffled(self, source: int, epoch: int) -> list[int]:
        order = list(range(self.sizes[source]))
        random.Random(f"{self._seed}/{source}/{epoch}").shuffle(order)
        return order
