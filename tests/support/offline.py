"""Example rows without a tokenizer, sources that give them, and a fake engine that scores tokens by their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowrl.data.examples import ExampleRow
from flowrl.simulation.fake import FakeTraining
from flowrl.stages.examples import Examples, HeldoutExamples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.data.formats import Kind
    from flowrl.engines.base import TokenGroup


def example_row(
    prompt_ids: list[int],
    responses: list[list[int]],
    labels: list[float] | None = None,
    *,
    masks: list[list[int]] | None = None,
    step_labels: list[list[float]] | None = None,
    kind: Kind | None = None,
    index: int = 0,
    place: str = "rows:1",
) -> ExampleRow:
    """One row as the loader gives it."""
    return ExampleRow(
        prompt_ids=prompt_ids,
        responses=responses,
        labels=labels or [],
        masks=masks,
        step_labels=step_labels,
        kind=kind,
        index=index,
        place=place,
    )


class Rows:
    """A data set in the order in which it stands."""

    digest = ""

    def __init__(self, train: list[ExampleRow], heldout: list[ExampleRow] | None = None) -> None:
        self.train = train
        self.heldout = heldout or []

    def told(self) -> list[str]:
        return []

    def row_at(self, position: int) -> ExampleRow:
        return self.train[position % len(self.train)]


def numbered_rows(count: int, *, responses: int = 2, heldout: int = 2) -> Rows:
    """Row k has the prompt [3 + k, 4] and responses of different lengths, the first labelled 1 and the others 0."""
    rows = [
        example_row(
            prompt_ids=[3 + k, 4],
            responses=[[10 + k + 7 * r] * (1 + (k + r) % 3) for r in range(responses)],
            labels=[1.0] + [0.0] * (responses - 1),
            index=k,
            place=f"rows:{k + 1}",
        )
        for k in range(count + heldout)
    ]
    return Rows(rows[:count], rows[count:])


NUMBERED = numbered_rows(5, heldout=4)


class TokenEngine(FakeTraining):
    """A fake to which every token's log-prob is minus its own number."""

    def score(self, groups: Sequence[TokenGroup]) -> Any:
        super().score(groups)
        return [[-response.numpy().astype("float32") for response in group.responses] for group in groups]


class NumberedExamples(Examples):
    """The real admission of examples over numbered rows, without a tokenizer."""

    def load(self) -> Any:
        return NUMBERED


class NumberedHeldout(HeldoutExamples):
    """The real source of held-out examples over numbered rows."""

    def load(self) -> Any:
        return NUMBERED.heldout
