"""Examples: the sources of offline training, demonstrations and preferences instead of prompts.

`Examples` admits training examples, one against each credit, in the order of their group ids; `HeldoutExamples` sends
every held-out example once.

Invariant: example k of a run is the row at position k of the data set's order, whatever happened before: each credit
says which k it is for.

An objective that needs mismatched pairs (KTO) gets with each row the first response of the next row that has another
prompt.

Tests: tests/unit/stages/test_offline.py
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import msgspec

from flowrl.data.examples import ExampleRow, ExampleSet, load_examples
from flowrl.data.models import check_reach, inspect_model, prepare_model
from flowrl.data.prompts import load_tokenizer
from flowrl.data.vocabulary import check_same_vocabulary
from flowrl.errors import ConfigError, DataError
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import FIRST_HELDOUT, Buffer, Credit, Example
from flowrl.stages.reference import ExampleReference
from flowrl.stages.sampler import Course
from flowrl.stages.tokens import example_group, group_batch, with_constant
from flowrl.stages.trial import try_loss
from flowrl.telemetry.events import Cause

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from flowrl.algorithms.base import Lesson, LossBatch, Objective
    from flowrl.config import Select
    from flowrl.data.formats import Kind
    from flowrl.graph.stage import Context, Say


LESSONS: dict[Kind, Lesson] = {
    "preference": "pairs",
    "stepwise-supervision": "labelled steps",
    "unpaired-preference": "labelled responses",
    "prompt-completion": "demonstrations",
    "language-modeling": "demonstrations",
}
OBJECTIVES: dict[Lesson, str] = {  # that are shipped for each
    "demonstrations": "SFT",
    "pairs": "DPO, IPO or Pairwise",
    "labelled responses": "KTO",
    "labelled steps": "Process",
}


def load_objective(choice: Select) -> Objective:
    """Load an objective for offline training.

    Raises:
        ConfigError: it is none, or an option is wrong, or it is an online algorithm.
    """
    from flowrl.algorithms.base import Algorithm, Objective

    objective = choice.load("objective")
    if not isinstance(objective, Objective):
        remedy = "subclass flowrl.algorithms.base:Objective"
        raise ConfigError("objective", f"{choice.use} is not an Objective", remedy)
    if isinstance(objective, Algorithm):
        what = f"{choice.use} learns from samples of its own policy, not from given examples"
        raise ConfigError("objective", what, "run it with graphs/ppo_async.py or graphs/group_async.py")
    return objective


def with_teacher(choice: Select, model: str, *, say: Say = lambda text: None) -> Select:
    """Return the choice with its objective's teacher, where it has one, as a prepared local directory.

    Raises:
        ModelError: the teacher reads other tokens than `model`, whose token ids it will be given.
    """
    name = load_objective(choice).teacher_model
    if not name:
        return choice
    teacher = prepare_model(name, say=say)
    check_same_vocabulary(prepare_model(model, say=say), teacher, "objective.teacher")
    options = {**choice.options, "teacher": str(teacher)}
    return msgspec.structs.replace(choice, options=options)


class Examples(Stage):
    """Source of training examples."""

    class Config(StageConfig):
        """Settings of the examples node."""

    is_single = True
    credits: In[Credit]
    examples: Out[Example]

    def __init__(self, config: Config, course: Course) -> None:
        self.config: Examples.Config = config
        self.course = course

    def check(self, say: Say) -> None:
        """Load the tokenizer and the data set, and try the objective on one row of each kind."""
        directory = prepare_model(self.course.model, say=say)
        objective = load_objective(self.course.objective)
        rows = self.load()
        self.data_digest = rows.digest
        for line in rows.told():
            say(line)
        reference = self.examples.leads_to
        has_reference = isinstance(reference, ExampleReference)
        others = [reference.model if isinstance(reference, ExampleReference) else "", objective.teacher_model]
        for reader in {directory, *(prepare_model(each, say=say) for each in others if each)}:
            check_rows(reader, [*rows.train, *rows.heldout])
        try_rows(objective, [*rows.train, *rows.heldout], has_reference=has_reference)
        for part in (rows.train, rows.heldout) if objective.needs_mismatched else ():
            if part:
                mismatched_of(_endless(part), 0, len(part))

    def load(self) -> ExampleSet:
        """Return the data set; example k is its row at position k."""
        return load_examples(self.course.data, load_tokenizer(prepare_model(self.course.model)))

    async def run(self, context: Context) -> None:
        """Admit examples until the edges close."""
        with context.clock.charge(Cause.START):
            objective = await context.compute(load_objective, self.course.objective)
            rows = await context.compute(self.load)
        while not context.stopping.is_set():
            (group_id,) = (await self.credits.get()).groups
            other = mismatched_of(rows.row_at, group_id, len(rows.train)) if objective.needs_mismatched else None
            await self.examples.put(example_of(rows.row_at(group_id), group_id, other))
            context.done += 1


class HeldoutExamples(Stage):
    """Source of held-out examples; ends when it has sent them all."""

    class Config(StageConfig):
        """Settings of the held-out node."""

    is_single = True
    examples: Out[Example]

    def __init__(self, config: Config, course: Course) -> None:
        self.config: HeldoutExamples.Config = config
        self.course = course

    def load(self) -> Sequence[ExampleRow]:
        """Return the held-out rows."""
        return load_examples(self.course.data, load_tokenizer(prepare_model(self.course.model))).heldout

    async def run(self, context: Context) -> None:
        """Send each held-out example once."""
        with context.clock.charge(Cause.START):
            objective = await context.compute(load_objective, self.course.objective)
            rows = await context.compute(self.load)
        for place, row in enumerate(rows):
            other = mismatched_of(_endless(rows), place, len(rows)) if objective.needs_mismatched else None
            await self.examples.put(example_of(row, FIRST_HELDOUT + place, other))
            context.done += 1


def mismatched_of(row_at: Callable[[int], ExampleRow], position: int, num_rows: int) -> ExampleRow:
    """Return the next row in the order after `position` that has another prompt.

    Raises:
        DataError: there is only one prompt.
    """
    prompt_ids = row_at(position).prompt_ids
    for later in range(position + 1, position + 2 * num_rows):  # two epochs: their orders differ
        other = row_at(later)
        if other.prompt_ids != prompt_ids:
            return other
    what = f"all {num_rows} rows have one prompt, but the objective needs responses to other prompts as well"
    raise DataError("data", what, "give rows with different prompts, and hold out two or none")


def _endless(rows: Sequence[ExampleRow]) -> Callable[[int], ExampleRow]:
    return lambda position: rows[position % len(rows)]


def example_of(row: ExampleRow, group_id: int, other: ExampleRow | None) -> Example:
    """Return a row as a message, with the first response of `other` behind its own."""
    sources = [row, other] if other is not None else [row]
    responses = [*row.responses, *(each.responses[0] for each in sources[1:])]
    masks: list[Buffer] | None = None
    if any(each.masks is not None for each in sources):
        masks = [Buffer.floats(mask) for mask in _masks(row)]
        masks += [Buffer.floats(next(_masks(each))) for each in sources[1:]]
    return Example(
        group_id=group_id,
        token_ids=Buffer.ints(row.prompt_ids),
        responses=[Buffer.ints(response) for response in responses],
        masks=masks,
        labels=row.labels,
        step_labels=None if row.step_labels is None else [Buffer.floats(labels) for labels in row.step_labels],
        num_mismatched=len(sources) - 1,
    )


def _masks(row: ExampleRow) -> Iterator[list[int]]:
    return iter(row.masks if row.masks is not None else [[1] * len(response) for response in row.responses])


def check_rows(model: Path, rows: Sequence[ExampleRow]) -> None:
    """Insist that a model has embeddings and positions for every row.

    Raises:
        DataError: it has not.
    """
    card = inspect_model(model)
    for row in rows:
        check_reach(card, row.place, chain(row.prompt_ids, *row.responses), row.num_tokens)


def try_rows(objective: Objective, rows: Sequence[ExampleRow], *, has_reference: bool) -> None:
    """Ask the objective for its loss on the first two rows of each kind, with made-up log-probs.

    Raises:
        DataError: the objective is not meant for such a row, cannot learn from it, or counts nothing in it; or it needs
            both good and bad responses, and all are one.
    """
    _check_lessons(objective, rows)
    name, kinds = type(objective).__name__, dict[tuple[object, ...], list[ExampleRow]]()
    for row in rows:
        if row.labels and len(row.labels) != len(row.responses):
            raise DataError(row.place, f"has {len(row.labels)} labels for {len(row.responses)} responses")
        alike = kinds.setdefault((len(row.responses), len(row.labels), row.masks is None, row.step_labels is None), [])
        if len(alike) < 2:
            alike.append(row)
    for alike in kinds.values():
        batches = [_made_up(objective, row, has_reference=has_reference) for row in alike]
        try:
            counts = try_loss(objective, alike[0].place, batches)
        except ConfigError as error:
            raise DataError(alike[0].place, f"{name} {error.what}", error.remedy) from error
        for row, count in zip(alike, counts, strict=True):
            if not count:
                raise DataError(row.place, f"{name} finds nothing to learn in it", "is every token masked out?")


def _made_up(objective: Objective, row: ExampleRow, *, has_reference: bool) -> LossBatch:
    """Return a row as it is learned, with log-probs near -1."""
    import numpy as np

    group = example_group(example_of(row, 0, None))
    found = [np.linspace(-1.1, -0.9, len(each), dtype=np.float32) for each in row.responses]
    if has_reference:
        reference = [Buffer.floats(each - 0.01) for each in found]
        group = msgspec.structs.replace(group, columns={**group.columns, "reference": reference})
    if objective.needs_mismatched:
        group = with_constant(group, "reference_point", 0.0)
    batch = group_batch(group, found)
    return batch._replace(divergence_BT=batch.mask_BT) if objective.teacher_model else batch


def _check_lessons(objective: Objective, rows: Sequence[ExampleRow]) -> None:
    name, wanted = type(objective).__name__, objective.learns_from
    for row in rows:
        found = wanted if row.kind is None else LESSONS[row.kind]
        if found != wanted:
            what = f"is {row.kind} data, which are {found}, but {name} learns from {wanted}"
            remedy = f"take {OBJECTIVES[found]} for {found}"
            if wanted == "demonstrations" and found != "labelled steps":
                remedy += ", or set data.only_good=true to learn the good responses alone"
            raise DataError(row.place, what, remedy)
    labels = [row.labels[0] > 0 for row in rows if row.labels] if wanted == "labelled responses" else []
    if labels and len(set(labels)) == 1:
        kind, other = ("good", "bad") if labels[0] else ("bad", "good")
        what = f"all {len(labels)} responses are labelled {kind}, but {name} needs {other} ones as well"
        raise DataError("data", what, f"add responses labelled {other}, or take SFT for demonstrations")
