"""Packing: the layout changes nothing but the time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowrl.engines.base import TokenGroup
from flowrl.engines.packing import max_shared_tokens, pack, pack_columns, plan, unpack
from flowrl.errors import StageError
from flowrl.messages import Buffer

CPU = torch.device("cpu")


def group(num_prompt: int, *lengths: int, seed: int = 0) -> TokenGroup:
    rng = np.random.default_rng(seed)
    return TokenGroup(
        prompt_ids=Buffer.ints(rng.integers(3, 300, num_prompt, dtype=np.int32)),
        responses=[Buffer.ints(rng.integers(3, 300, n, dtype=np.int32)) for n in lengths],
        columns={"advantages": [Buffer.floats(rng.normal(size=n).astype(np.float32)) for n in lengths]},
    )


def random_groups(seed: int, count: int = 12) -> list[TokenGroup]:
    rng = np.random.default_rng(seed)
    return [
        group(int(rng.integers(1, 30)), *(int(n) for n in rng.integers(1, 9, rng.integers(1, 6))), seed=seed + k)
        for k in range(count)
    ]


def responses_of(dealt) -> list[tuple[int, int]]:
    return sorted(
        (piece.group, sample)
        for batches in dealt
        for batch in batches
        for row in batch
        for piece in row
        for sample in piece.samples
    )


def size_of(batch) -> int:
    return len(batch) * max(sum(piece.length for piece in row) for row in batch)


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("reads", ["before", "after"])
@pytest.mark.parametrize("whole_groups", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_response_is_dealt_once_and_ranks_keep_step(layout, reads, whole_groups, world_size):
    groups = random_groups(seed=7)
    dealt = plan(groups, layout=layout, reads=reads, budget=90, world_size=world_size, whole_groups=whole_groups)
    assert responses_of(dealt) == [(g, s) for g, item in enumerate(groups) for s in range(len(item.responses))]
    assert len({len(batches) for batches in dealt}) == 1


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_micro_batch_stays_within_the_budget(layout):
    dealt = plan(random_groups(seed=3), layout=layout, reads="after", budget=64)
    assert max(size_of(batch) for batch in dealt[0]) <= 64


def test_a_sequence_beyond_the_budget_goes_alone():
    dealt = plan([group(50, 10), group(5, 5)], layout="shared", reads="after", budget=20)
    assert sorted(size_of(batch) for batch in dealt[0]) == [10, 60]


def test_a_group_beyond_the_budget_is_split_by_responses():
    (batches,) = plan([group(10, 6, 6, 6)], layout="shared", reads="before", budget=20)
    assert [[piece.samples for row in batch for piece in row] for batch in batches] == [[(0, 1)], [(2,)]]


def test_whole_groups_keeps_responses_that_are_compared_in_one_micro_batch():
    (batches,) = plan([group(10, 6, 6, 6)], layout="padded", reads="before", budget=20, whole_groups=True)
    assert len(batches) == 1


def test_a_long_response_does_not_share_its_prompt_beyond_what_pays():
    assert max_shared_tokens(60) == 351
    (batches,) = plan([group(60, 300, 300)], layout="shared", reads="before", budget=4096)
    assert [piece.samples for row in batches[0] for piece in row] == [(0,), (1,)]


def test_ranks_are_balanced_by_tokens():
    dealt = plan(random_groups(seed=11, count=30), layout="shared", reads="before", budget=100, world_size=2)
    loads = [sum(piece.length for batch in batches for row in batch for piece in row) for batches in dealt]
    assert abs(loads[0] - loads[1]) <= 60


def test_the_first_token_is_predicted_by_the_prompts_last_position():
    item = group(4, 3, 2)
    ((rows,),) = plan([item], layout="shared", reads="before", budget=100)
    batch = pack([item], rows, layout="shared", reads="before", device=CPU)
    # Prompt at 0..3; response 0 feeds two tokens at 4, 5; response 1 feeds one at 6.
    assert batch.read_N.tolist() == [3, 4, 5, 3, 6]
    assert batch.position_ids_RL.tolist() == [[0, 1, 2, 3, 4, 5, 4]]
    assert batch.target_N.tolist() == item.responses[0].tolist() + item.responses[1].tolist()


def test_a_reward_is_read_at_the_token_itself():
    item = group(4, 3, 2)
    ((rows,),) = plan([item], layout="shared", reads="after", budget=100)
    batch = pack([item], rows, layout="shared", reads="after", device=CPU)
    assert batch.read_N.tolist() == [4, 5, 6, 7, 8]


def test_a_response_sees_its_prompt_and_itself_but_no_other_response():
    item = group(2, 2, 2)
    ((rows,),) = plan([item], layout="shared", reads="after", budget=100)
    mask = pack([item], rows, layout="shared", reads="after", device=CPU).attention(torch.float32)
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("seed", range(3))
def test_columns_and_results_return_to_their_responses(seed):
    groups = random_groups(seed)
    (batches,) = plan(groups, layout="shared", reads="before", budget=80)
    packed = [pack(groups, rows, layout="shared", reads="before", device=CPU) for rows in batches]
    found = unpack((batch, batch.target_N.float()) for batch in packed)
    for (g, s), values in found.items():
        assert values.tolist() == groups[g].responses[s].tolist()
    for batch in packed:
        column_BT = pack_columns(groups, batch)["advantages"]
        for row, (g, s) in zip(column_BT, batch.samples, strict=True):
            expected = groups[g].columns["advantages"][s].numpy()
            assert row[: len(expected)].tolist() == expected.tolist()
            assert not row[len(expected) :].any()


def test_an_empty_response_is_refused():
    with pytest.raises(StageError, match="group 0: the prompt or a response is empty"):
        plan([group(3, 0)], layout="shared", reads="before", budget=10)


def test_a_column_of_the_wrong_length_is_refused():
    item = TokenGroup(
        prompt_ids=Buffer.ints([5]), responses=[Buffer.ints([6, 7])], columns={"returns": [Buffer.floats([1.0])]}
    )
    ((rows,),) = plan([item], layout="shared", reads="before", budget=10)
    batch = pack([item], rows, layout="shared", reads="before", device=CPU)
    with pytest.raises(StageError, match="column 'returns' of sample 0 has 1 values for 2 tokens"):
        pack_columns([item], batch)
