from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from flowrl.data.mixing import Mixture
from flowrl.errors import DataError

MIXES = [
    ([7, 20, 3], [0.5, 0.3, 0.2]),
    ([5, 5], [1, 2]),
    ([11], [3.0]),
    ([4, 9], [0.001, 0.999]),
    ([3, 3, 3], [1, 1, 1]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "weights"), MIXES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_source_has_exactly_its_share_of_a_long_run(sizes, weights, seed):
    mixture = Mixture(sizes, weights, seed)
    counts = Counter(mixture.at(position)[0] for position in range(30_000))
    assert [counts[source] for source in range(len(sizes))] == [
        pytest.approx(30_000 * weight / sum(weights), abs=1e-6) for weight in weights
    ]


@pytest.mark.parametrize(("sizes", "weights"), MIXES)
def test_no_source_is_ever_far_from_its_share(sizes, weights):
    mixture = Mixture(sizes, weights, 3)
    counts = [0] * len(sizes)
    block = max(100, round(sum(weights) / min(weights)))
    for position in range(3 * block):
        counts[mixture.at(position)[0]] += 1
        shares = [(position + 1) * weight / sum(weights) for weight in weights]
        assert all(abs(count - share) < block for count, share in zip(counts, shares, strict=True))
        if (position + 1) % block == 0:
            assert all(abs(count - share) <= 1 for count, share in zip(counts, shares, strict=True))


@pytest.mark.parametrize(("sizes", "weights"), MIXES)
def test_epochs_of_a_source_are_complete_permutations_in_orders_of_their_own(sizes, weights):
    mixture = Mixture(sizes, weights, 5)
    taken: list[list[int]] = [[] for _ in sizes]
    for position in range(20_000):
        source, place = mixture.at(position)
        taken[source].append(place)
    for rows, size in zip(taken, sizes, strict=True):
        epochs = [tuple(rows[start : start + size]) for start in range(0, len(rows) - size + 1, size)]
        assert len(epochs) >= 4
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(epochs)) > 1


def test_a_position_has_the_same_row_whatever_was_asked_before():
    walked, jumped = Mixture([6, 40], [1, 3], 9), Mixture([6, 40], [1, 3], 9)
    rows = [walked.at(position) for position in range(5000)]
    for position in (4999, 0, 731, 4998, 99, 100):
        assert jumped.at(position) == rows[position]


def test_another_seed_is_another_order():
    orders = [[Mixture([6, 40], [1, 3], seed).at(position) for position in range(200)] for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert Counter(source for source, _ in orders[0]) == Counter(source for source, _ in orders[1])


def test_sources_are_mixed_within_a_block_not_one_after_the_other():
    sources = [Mixture([50, 50], [1, 1], 0).at(position)[0] for position in range(100)]
    assert sources != sorted(sources)
    assert sum(one != other for one, other in pairwise(sources)) > 20


def test_source_without_rows_is_refused():
    with pytest.raises(DataError, match=r"data\.mix\[1\]: has no rows left"):
        Mixture([5, 0], [1, 1], 0)


def test_source_without_a_share_worth_the_name_is_refused():
    with pytest.raises(DataError, match=r"data\.mix\[0\]: has 1e-09 of all weight, so that hardly a row of it"):
        Mixture([5, 5], [1e-9, 1.0], 0)
