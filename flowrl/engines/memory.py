"""Out of memory: every rank leaves the same pass at the same place, and the step is taken again in smaller parts.

A pass is the forward and, in training, the backward of one micro-batch. A rank that runs out of memory in it will not
come to the collectives of the rest of that pass (ZeRO gathers parameters and sums gradients while it runs). The others
would wait there. So ranks vote: before every collective of a pass, and at its end, each says whether it still has room.
A rank that ran out says so at once; the others hear it at their next vote, and all of them raise `NoRoom` between the
same two collectives. What the pass has added to gradients is cleared by the engine, and the step is taken again with at
most half the tokens in a micro-batch; by law 7 its gradient is the same. Votes cost a message between all ranks for
each collective. So they are held only in passes larger than any that has fitted, which every rank can tell from the
plan; a run's later steps have next to none.

Called by trainer. Nothing here knows of gradients, of DeepSpeed or of what is computed.

Tests: tests/unit/engines/test_memory.py
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from flowrl.engines.packing import Size
from flowrl.errors import ResourceError, StageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from flowrl.engines.objective import Sums
    from flowrl.engines.ranks import RankLink

FITS = 0  # a vote; above it: the budget in tokens to go on with; below it: minus the tokens of what cannot be split
# What allocators say where they do not raise torch.OutOfMemoryError: the CPU's, and cuBLAS's for its workspace.
WORDS = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that an allocation was refused."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


class NoRoom(Exception):
    """A pass did not fit on some rank; every rank raises it in the same pass."""

    def __init__(self, votes: list[int]) -> None:
        super().__init__(votes)
        self.votes = votes


class FitVote:
    """The vote of this rank on whether a pass fits; with one rank there is nobody to ask."""

    def __init__(self, link: RankLink, *, where: str, ranks_meet: bool) -> None:
        """`ranks_meet` says whether there are collectives within a pass."""
        self._link = link
        self._where = where
        self._ranks_meet = ranks_meet and link.world_size > 1
        self._is_voting = False

    @contextmanager
    def one_pass(self, size: Size, vote: int, budget: Budget) -> Iterator[None]:
        """Run the block as a pass of so much; `vote` is this rank's should it not fit.

        Raises:
            NoRoom: it did not fit on some rank.
            StageError: it did not fit although one as large did, so that the ranks had not voted.
        """
        own = FITS
        is_voted = self._is_voting = not (self._ranks_meet and budget.has_fitted(size))
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if not is_voted:
                what = f"out of memory in a pass of {size[0]} tokens, although one as large fitted before ({error})"
                raise StageError(
                    self._where, what, "does something else use the device? lower micro_batch_tokens"
                ) from error
            own = vote
        finally:
            self._is_voting = False
        if is_voted:
            self._ask(own)
            budget.note(size)

    def before_collective(self) -> None:
        """Let every rank say that it still has room, in a pass that is voted on."""
        if self._is_voting:
            self._ask(FITS)

    def _ask(self, own: int) -> None:
        votes = self._link.share(own)
        if any(votes):
            raise NoRoom(votes)

    def guarded(self, collective: Callable[..., object]) -> Callable[..., object]:
        """Return a collective that is voted on first.

        Raises:
            StageError: it was itself refused memory, where no other rank can follow.
        """

        def voted(*args: object, **kwargs: object) -> object:
            self.before_collective()
            try:
                return collective(*args, **kwargs)
            except RuntimeError as error:
                if not (self._is_voting and is_out_of_memory(error)):
                    raise
                what = f"out of memory between ranks ({error})"
                raise StageError(self._where, what, "lower micro_batch_tokens or gpu_memory_utilization") from error

        return voted


class Budget:
    """How many tokens a micro-batch may have; it only ever gets smaller."""

    def __init__(self, num_tokens: int, *, where: str) -> None:
        self.num_tokens = num_tokens
        self.num_splits = 0  # since `figures`
        self._where = where
        self._fitted = Size(0, 0, 0)

    def has_fitted(self, size: Size) -> bool:
        """Say whether passes as large in every respect have fitted."""
        return all(mine <= most for mine, most in zip(size, self._fitted, strict=True))

    def note(self, size: Size) -> None:
        """Remember that a pass fitted."""
        self._fitted = Size(*map(max, size, self._fitted))

    def forget_fitted(self) -> None:
        """Take nothing for granted that fitted before: from here on something more is in memory."""
        self._fitted = Size(0, 0, 0)

    def shrink(self, votes: list[int]) -> str:
        """Go on with the least budget voted for; returns what to tell the user. The failed pass must have been left.

        Raises:
            ResourceError: a rank ran out of memory on a single sequence.
        """
        for rank, vote in enumerate(votes):
            if vote < FITS:
                what = f"rank {rank} ran out of memory in a pass of {-vote} tokens, which is one sequence or one group"
                remedy = "shorten prompts or responses, set gradient_checkpointing, or take more ranks at zero_stage=3"
                raise ResourceError(self._where, what, remedy)
        before, self.num_tokens = self.num_tokens, min(vote for vote in votes if vote != FITS)
        self.num_splits += 1
        if torch.cuda.is_available():
            gc.collect()  # whatever DeepSpeed's hooks may hold in cycles
            torch.cuda.empty_cache()
        ranks = ", ".join(str(rank) for rank, vote in enumerate(votes) if vote != FITS)
        return f"rank {ranks} ran out of memory; micro_batch_tokens is {self.num_tokens} from here on, {before} before"

    def figures(self) -> Sums:
        """Return how often it shrank since the last call and where it is now; nothing where it has not."""
        found, self.num_splits = self.num_splits, 0
        if not found:
            return {}
        return {"memory_splits": (float(found), 1.0), "micro_batch_tokens": (float(self.num_tokens), 1.0)}
