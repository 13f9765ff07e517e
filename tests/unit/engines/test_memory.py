"""Out of memory: a step is taken again in smaller parts, with the same gradient, and the user is told."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import msgspec
import pytest
import torch

from flowrl.engines.base import Ranks, Schedule, TrainingConfig
from flowrl.engines.memory import Budget, FitVote, NoRoom, is_out_of_memory
from flowrl.engines.packing import Part, Size, halved, plan
from flowrl.engines.torch import TorchEngine
from flowrl.errors import ResourceError, StageError
from flowrl.messages import Buffer
from tests.support.scarce_memory import make_scarce
from tests.unit.engines.test_packing import random_groups
from tests.unit.engines.test_trainer import WeightedTokens, choose, gradients

if TYPE_CHECKING:
    from flowrl.algorithms.base import Objective

GROUPS = random_groups(seed=21, count=6)


class PerGroup(WeightedTokens):
    """An objective that compares the responses of a group."""

    @property
    def needs_whole_groups(self) -> bool:
        return True


def opened(directory, **settings) -> tuple[TorchEngine, list[str]]:
    said: list[str] = []
    config = TrainingConfig(
        model=str(directory), dtype="float32", lr=1e-3, schedule=Schedule(kind="constant"), **settings
    )
    engine = TorchEngine(config, where="learner", name="test", say=said.append)
    engine.open(Ranks())
    return engine, said


def assert_same_gradients(one: TorchEngine, other: TorchEngine) -> None:
    found = gradients(other)
    for name, expected in gradients(one).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)


def test_what_allocators_say_is_known_and_nothing_else():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(MemoryError())


@pytest.mark.parametrize("during", ["forward", "backward"])
def test_a_step_that_ran_out_of_memory_has_the_gradient_of_one_that_did_not(tiny_llama, during):
    (calm, _), (scarce, said) = opened(tiny_llama), opened(tiny_llama)
    make_scarce(scarce, most_tokens=60, during=during)
    expected, found = (engine.accumulate(GROUPS, choose(WeightedTokens)) for engine in (calm, scarce))
    assert found.pop("memory_splits") >= 1
    assert found.pop("micro_batch_tokens") <= 60
    assert found == pytest.approx(expected, abs=1e-6)
    assert_same_gradients(calm, scarce)
    assert "rank 0 ran out of memory" in said[0]


def test_the_smaller_budget_stays_and_is_said_once(tiny_llama):
    engine, said = opened(tiny_llama)
    refused = make_scarce(engine, most_tokens=60, during="forward")
    engine.accumulate(GROUPS, choose(WeightedTokens))
    engine.apply()
    num_refused, num_said = len(refused), len(said)
    assert "memory_splits" not in engine.accumulate(GROUPS, choose(WeightedTokens))
    assert (len(refused), len(said)) == (num_refused, num_said)


@pytest.mark.parametrize("during", ["forward", "backward"])
def test_activations_of_a_failed_pass_are_gone_before_the_next(tiny_llama, monkeypatch, during):
    engine, _ = opened(tiny_llama, gradient_checkpointing=True)
    made: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []

    def note(_module: object, _args: object, output: torch.Tensor) -> None:
        made.append(weakref.ref(output))

    engine.model.model.layers[0].register_forward_hook(note)
    make_scarce(engine, most_tokens=60, during=during)
    monkeypatch.setattr(engine, "_leave_pass", lambda: left.append(sum(ref() is not None for ref in made)))
    gc.disable()
    try:
        engine.accumulate(GROUPS, choose(WeightedTokens))
    finally:
        gc.enable()
    assert made
    assert left[0] == 0


def test_gradients_of_earlier_calls_of_the_step_are_not_lost_and_those_of_earlier_steps_not_found_again(tiny_llama):
    (calm, _), (scarce, _) = opened(tiny_llama), opened(tiny_llama)
    make_scarce(scarce, most_tokens=60, during="backward", after_steps=1)
    for engine in (calm, scarce):
        engine.accumulate(GROUPS[:3], choose(WeightedTokens))
        engine.apply()
        engine.accumulate(GROUPS[:1], choose(WeightedTokens))
    assert "memory_splits" in scarce.accumulate(GROUPS, choose(WeightedTokens))
    calm.accumulate(GROUPS, choose(WeightedTokens))
    assert_same_gradients(calm, scarce)


def test_scoring_splits_by_itself_and_leaves_the_gradient_alone(tiny_llama):
    (calm, _), (scarce, said) = opened(tiny_llama), opened(tiny_llama)
    for engine in (calm, scarce):
        engine.accumulate(GROUPS, choose(WeightedTokens))
    make_scarce(scarce, most_tokens=60, during="forward")
    for rows, others in zip(calm.score(GROUPS), scarce.score(GROUPS), strict=True):
        assert [row.tolist() for row in rows] == [pytest.approx(row.tolist(), abs=1e-5) for row in others]
    assert said
    assert_same_gradients(calm, scarce)


@pytest.mark.parametrize("kind", [WeightedTokens, PerGroup])
def test_one_sequence_or_group_that_does_not_fit_is_an_error_that_says_its_size(tiny_llama, kind: type[Objective]):
    engine, _ = opened(tiny_llama)
    make_scarce(engine, most_tokens=20, during="forward")
    with pytest.raises(ResourceError, match=r"learner: rank 0 ran out of memory in a pass of \d+ tokens") as error:
        engine.accumulate(GROUPS, choose(kind))
    assert "shorten prompts or responses" in error.value.remedy


class ThreeRanks:
    """A connection on which the others vote as they are told to."""

    world_size = 3

    def __init__(self) -> None:
        self.num_votes = 0
        self.others = [0, 0]

    def share(self, value: int) -> list[int]:
        self.num_votes += 1
        return [*self.others, value]


def part_of(num_tokens: int) -> Part:
    return Part(groups=[], rows=[], layout="shared", reads="before", num_chunks=1, vote=num_tokens // 2,
                size=Size(num_tokens, num_tokens**2, 1))  # fmt: skip


def passed(room: FitVote, budget: Budget, num_tokens: int, error: Exception | None = None) -> None:
    """Run a pass with two collectives and perhaps an error between them."""
    collective = room.guarded(lambda: None)
    part = part_of(num_tokens)
    with room.one_pass(part.size, part.vote, budget):
        collective()
        if error is not None:
            raise error
        collective()


def test_ranks_vote_before_each_collective_and_at_the_end_of_passes_larger_than_any_that_fitted():
    line, budget = ThreeRanks(), Budget(100, where="learner")
    room = FitVote(line, where="learner", ranks_meet=True)  # pyright: ignore[reportArgumentType]
    votes = []
    for num_tokens in (50, 50, 40, 60, 50):
        passed(room, budget, num_tokens)
        votes.append(line.num_votes)
    assert votes == [3, 3, 3, 6, 6]
    budget.forget_fitted()
    passed(room, budget, 40)
    assert line.num_votes == 9


def test_a_rank_that_ran_out_votes_at_once_and_one_that_did_not_hears_it_at_its_next_collective():
    line, budget = ThreeRanks(), Budget(100, where="learner")
    room = FitVote(line, where="learner", ranks_meet=True)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NoRoom) as own:
        passed(room, budget, 60, torch.OutOfMemoryError("planted"))
    assert (own.value.votes, line.num_votes) == ([0, 0, 30], 2)
    line.others = [20, 0]
    with pytest.raises(NoRoom) as theirs:
        passed(room, budget, 60)
    assert (theirs.value.votes, line.num_votes) == ([20, 0, 0], 3)
    assert "rank 0, 2 ran out of memory; micro_batch_tokens is 20 from here on, 100 before" in budget.shrink(
        [20, 0, 30]
    )
    line.others = [0, 0]
    with pytest.raises(ZeroDivisionError):
        passed(room, budget, 60, ZeroDivisionError())
    assert not budget.has_fitted(part_of(60).size)


def test_memory_that_is_gone_where_ranks_did_not_vote_breaks_them_with_the_reason():
    budget = Budget(100, where="learner")
    room = FitVote(ThreeRanks(), where="learner", ranks_meet=True)  # pyright: ignore[reportArgumentType]
    passed(room, budget, 60)
    with pytest.raises(StageError, match="in a pass of 60 tokens, although one as large fitted before"):
        passed(room, budget, 60, torch.OutOfMemoryError("planted"))

    def refused() -> None:
        raise torch.OutOfMemoryError("planted")

    with (
        pytest.raises(StageError, match="out of memory between ranks"),
        room.one_pass(part_of(70).size, part_of(70).vote, budget),
    ):
        room.guarded(refused)()


@pytest.mark.parametrize("whole_groups", [False, True])
@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("seed", range(4))
def test_halving_until_nothing_can_be_split_ends_with_single_parts(seed, layout, whole_groups):
    groups = random_groups(seed=seed)
    budget, largest = 1 << 20, 1 << 20
    while budget > 0:
        ((*batches,),) = plan(groups, layout=layout, reads="before", budget=budget, whole_groups=whole_groups)
        votes = [halved(rows, whole_groups=whole_groups) for rows in batches]
        if max(votes) <= 0:
            break
        assert max(votes) < largest
        budget = largest = max(votes)
    for rows in batches:
        pieces = [piece for row in rows for piece in row]
        assert len({p.group for p in pieces} if whole_groups else [s for p in pieces for s in p.samples]) == 1


def test_a_micro_batch_votes_for_half_its_tokens_or_says_that_it_is_one_sequence():
    item = msgspec.structs.replace(GROUPS[0], prompt_ids=Buffer.ints([1] * 5), columns={})
    one, two = ([Buffer.ints([1] * 6)] * n for n in (1, 2))
    for responses, expected in ((one, -10), (two, 7)):  # 5 + 5 fed, and 5 + 5 + 5
        item = msgspec.structs.replace(item, responses=responses)
        ((rows,),) = plan([item], layout="shared", reads="before", budget=100)
        assert halved(rows, whole_groups=False) == expected
