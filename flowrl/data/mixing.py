"""The order in which the rows of several sources are learned: endless, by probability, the same at every start.

Invariants: `at(position)` is a pure function of the sizes, the weights, the seed and the position, so that a run
resumes anywhere; of the first n positions every source has its share, to within one row at the end of a block and to
within a block everywhere; the rows of a source come in complete permutations, one after the other, whatever stands
between them. Called by `ExampleSet`.

Tests: tests/unit/data/test_mixing.py
"""

from __future__ import annotations

import functools
import math
import random
from fractions import Fraction
from itertools import accumulate
from typing import TYPE_CHECKING

from flowrl.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_BLOCK = 100  # positions whose shares are exact; longer where a source's weight is below 1/100


class Mixture:
    """An order over sources of `sizes` rows, drawn in proportion to `weights`."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """Raises `DataError` where a source has no rows."""
        for number, size in enumerate(sizes):
            if not size:
                raise DataError(f"data.mix[{number}]", "has no rows left to train on", "drop it, or add rows to it")
        exact = [Fraction(str(weight)) for weight in weights]  # as they were written: 0.1 is a tenth
        self.sizes = list(sizes)
        self.shares = [weight / sum(exact) for weight in exact]
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
