"""Where the gain of one system over another comes from, in seconds of a step, and what overlap could give at most.

`causes` splits the difference between two systems' steps so that its parts add up to it, whichever way it goes.
`Ceiling` is the arithmetic of "what overlap can and cannot give" (docs/benchmarks.md): with G, S and T the seconds of
a synchronous step's generation, scoring and training and e the busy share of a closed batch's decode slots, a run that
overlaps generation with the rest on the same split of devices takes at least max(e G, S + T) and the sync that nothing
hides; and no split of the devices of a colocated run can take less than its e G + S + T, all work and no waiting.

Called by perf/dschat.py; pure arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from flowrl.simulation.costs import DecodeCost
from perf.dschat_workload import StepTimes

if TYPE_CHECKING:
    from collections.abc import Sequence

SLOTS = DecodeCost(step_s=1.0)  # a decoding step takes as long however many samples run: slots are all that counts


def mean(times: Sequence[StepTimes]) -> StepTimes:
    """Return the mean of every figure over the steps; whole numbers are rounded."""
    rows = [msgspec.structs.asdict(step) for step in times]
    figures = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if name != "lengths"}
    whole = {name: round(figures[name]) for name in ("samples", "tokens", "fed_tokens")}
    return StepTimes(**{**figures, **whole}, lengths=())


def busy_share(lengths: Sequence[int], cost: DecodeCost = SLOTS) -> float:
    """Return e: what decoding would take with every slot always filled, over what the closed batch takes.

    Responses of 2, 2 and 8 tokens use 12 of 24 slots, 0.5; where half of a full step's time is for its samples, they
    take 8 + 12 / 3 instead of 4 + 12 / 3, and the share is 0.67.
    """
    num_tokens = sum(lengths)
    closed_s = cost.step_s * max(lengths) + cost.sample_s * num_tokens
    filled_s = cost.step_s * num_tokens / len(lengths) + cost.sample_s * num_tokens
    return filled_s / closed_s if closed_s else 1.0


def causes(slow: StepTimes, fast: StepTimes, share: float) -> dict[str, float]:
    """Return the seconds of a step that each cause saves `fast` against `slow`; they add up to the whole difference.

    `share` is the busy share of the slow system's closed batches; 1 where their tail is not to be told apart.
    """
    return {
        "long tail": (1 - share) * slow.generation_s,
        "generation": share * slow.generation_s - fast.generation_s,
        "logits + reward": slow.scoring_s - fast.scoring_s,
        "training": slow.training_s - fast.training_s,
        "switching and sync": slow.sync_s - fast.sync_s,
        "waiting and other": slow.other_s - fast.other_s,
        "overlap": fast.overlap_s - slow.overlap_s,
    }


class Ceiling(msgspec.Struct, frozen=True, kw_only=True):
    """What the formula says of a synchronous system and of the asynchronous one beside it, in seconds of a step."""

    name: str  # of the synchronous system
    serial_s: float  # the formula for the synchronous system
    measured_s: float  # the synchronous system as it ran
    least_s: float  # for the asynchronous system with the split it has
    best_s: float | None  # for any split of the same devices; None: least_s is that already
    asynchronous_s: float  # the asynchronous system as it ran

    @property
    def allowed(self) -> float:
        """Return the speed-up that this split allows."""
        return self.measured_s / self.least_s

    @property
    def gained(self) -> float:
        """Return the speed-up there was."""
        return self.measured_s / self.asynchronous_s

    def verdict(self) -> str:
        """Return in words what was possible and what came of it."""
        lines = [
            f"over {self.name}: the formula gives it {self.serial_s:.2f} s a step, it took {self.measured_s:.2f} s; "
            f"asynchrony with this split takes {self.least_s:.2f} s at least, which allows {self.allowed:.2f} times; "
            f"it took {self.asynchronous_s:.2f} s, {self.gained:.2f} times."
        ]
        if self.best_s is not None:
            lines.append(
                f"No split of the same devices could take less than {self.best_s:.2f} s "
                f"({self.measured_s / self.best_s:.2f} times)."
            )
        if self.allowed <= 1.0:
            lines.append(
                "Asynchrony cannot win here: the stage that is slowest on its part of the devices takes as "
                "long as all stages in turn on all of them."
            )
        elif self.gained <= 1.0:
            lines.append("Asynchrony could have won here and did not.")
        return " ".join(lines)


def ceilings(
    asynchronous: StepTimes, disaggregated: StepTimes | None, colocated: StepTimes | None, share: float
) -> list[Ceiling]:
    """Return the formula's word on each synchronous system that was measured; the split's must be among them."""
    if disaggregated is None:
        return []
    busy_s = max(share * disaggregated.generation_s, disaggregated.scoring_s + disaggregated.training_s)
    least_s = busy_s + asynchronous.sync_s
    found: list[Ceiling] = []
    for name, step in (("disaggregated", disaggregated), ("colocated", colocated)):
        if step is None:
            continue
        work_s = step.generation_s + step.scoring_s + step.training_s
        found.append(
            Ceiling(
                name=name,
                serial_s=work_s + step.sync_s,
                measured_s=step.wall_s,
                least_s=least_s,
                best_s=work_s - (1 - share) * step.generation_s if name == "colocated" else None,
                asynchronous_s=asynchronous.wall_s,
            )
        )
    return found
