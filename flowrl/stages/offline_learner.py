"""Offline learner: trains a model on given examples, in order, and measures it on held-out ones.

Invariants:
- step v learns exactly `examples_per_step` examples, in the order of the data, and makes version v + 1;
- the gradient is that of the objective over all of them, however they are packed;
- a held-out example is only ever scored.

What an objective needs of a whole step (KTO's reference point) is found here before the step is trained on. Its return
ends the run.

Tests: tests/unit/stages/test_offline.py
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from flowrl.config import ImportPath, Meta, widen
from flowrl.data.examples import read_template
from flowrl.data.models import prepare_model
from flowrl.engines.base import TokenGroup, Training, TrainingConfig, TrainingEngine
from flowrl.engines.checkpoint import CARD
from flowrl.errors import ConfigError
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage
from flowrl.graph.staleness import Admission
from flowrl.messages import Credit, Example
from flowrl.stages.examples import load_objective, with_teacher
from flowrl.stages.sampler import Course
from flowrl.stages.saving import save_checkpoint
from flowrl.stages.tokens import example_group, group_batch, padded, with_constant
from flowrl.stages.training import (
    check_loading,
    check_masters,
    check_training,
    load_state,
    opened,
    take_step,
)
from flowrl.telemetry.events import Evaluation, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.algorithms.base import Objective
    from flowrl.graph.stage import Context, Say
    from flowrl.messages import FloatArray

VALUES_CARD = """---
library_name: transformers
tags: [flowrl, reward-model]
---
# {name}

Reward model after {version} steps, trained with flowrl. Load it with `AutoModelForSequenceClassification` (one label):
the score of a response is the value at its last token. The run's settings are in `settings.yaml` and its figures in
`metrics.jsonl` of the run directory.
"""


class OfflineLearner(Stage):
    """Trains on examples with an objective's loss on a training engine."""

    class Config(Training):
        """Settings of the learner node."""

        engine: ImportPath = "flowrl.engines.deepspeed:DeepSpeedEngine"
        save_every: Annotated[int, Meta(ge=0)] = 0  # steps between checkpoints; 0: only at the end
        keep_checkpoints: Annotated[int, Meta(ge=1)] = 2  # newest ones kept
        evaluate_every: Annotated[int, Meta(ge=0)] = 0  # steps between evaluations; 0: before and after

    optional = frozenset({"heldout"})
    ordered = frozenset({"examples"})
    is_stateful = True
    examples: In[Example]
    heldout: In[Example]
    released: Out[Credit]

    def __init__(self, config: Config, course: Course) -> None:
        self.config: OfflineLearner.Config = config
        self.course = course
        self.objective = course.objective
        self._scale: dict[str, float] = {}  # of a reward model: mean and std of its scores of the held-out responses
        self._score = 0.0  # the mean held-out score, or minus the training loss where nothing is held out
        self._scored: int | None = None  # the version that has this held-out score; None: nothing is held out

    @property
    def admission(self) -> Admission:
        """Return what a step learns."""
        return self.course.admission

    def check(self, say: Say) -> None:
        """Prepare the model and load the objective."""
        objective = load_objective(with_teacher(self.objective, self.course.model, say=say))
        check_training(
            self.config, self.course.model, "learner", num_steps=self.course.steps, say=say, head=objective.head
        )
        if teacher := objective.teacher_model:
            trusted = self.config.trust_remote_code
            check_loading(Path(teacher), "objective.teacher", "policy", trust_remote_code=trusted)
        check_masters(self.course.model, say)
        for line in objective.idle_settings(1):
            say(line)
        if objective.learns_from == "labelled responses" and self.course.examples_per_step < 2:
            what = "1 never holds both a good and a bad response"
            raise ConfigError("examples_per_step", what, "set it to 2 or more; 16 is usual")

    def _settings(self) -> TrainingConfig:
        head = load_objective(self.objective).head
        template = self.course.data.chat_template
        template = read_template(template) if template else ""
        model = str(prepare_model(self.course.model))
        return widen(TrainingConfig, self.config, model=model, head=head, chat_template=template)

    async def follow(self, context: Context) -> None:
        """Serve as a rank other than 0."""
        async with opened(context, self.config.engine, self._settings, self.course.steps) as engine:
            await context.compute(engine.follow)

    async def run(self, context: Context) -> None:
        """Train until the last step is done and saved, or the user asks to stop."""
        self.objective = await context.compute(with_teacher, self.objective, self.course.model)
        objective = load_objective(self.objective)
        async with opened(context, self.config.engine, self._settings, self.course.steps) as engine:
            context.version = 0
            if context.resume_from is not None:
                context.version = await context.compute(load_state, engine, context.resume_from / context.node)
            saved = context.version if context.resume_from else -1
            heldout = await self._take_heldout()
            if heldout:  # after a resume too: checkpoints are compared by the newest score
                await self._evaluate(context, engine, objective, heldout)
            while context.version < self.course.steps:
                batch = await take_step(self.examples, context, self.course.examples_per_step)
                if batch is None:
                    break
                await self._step(context, engine, objective, batch, heldout)
                if self.config.save_every and context.version % self.config.save_every == 0:
                    await self._save(context, engine, objective)
                    saved = context.version
            if saved != context.version:
                await self._save(context, engine, objective)

    async def _take_heldout(self) -> list[Example]:
        """Wait for every held-out example; returns them in the order of the data."""
        num_heldout = self.course.data.num_heldout
        if not self.heldout.is_connected or not num_heldout:
            return []
        found: dict[int, Example] = {}
        while len(found) < num_heldout:  # a source that was restarted sends some of them again
            example = await self.heldout.get()
            found[example.group_id] = example
            await self.heldout.done(example)
        return [found[group_id] for group_id in sorted(found)]

    async def _step(self, context: Context, engine: TrainingEngine, objective: Objective, batch: list[Example],
                    heldout: list[Example]) -> None:  # fmt: skip
        start_s, version = context.now(), context.version
        groups = await context.compute(step_groups, engine, objective, batch)
        metrics = await context.compute(engine.accumulate, groups, self.objective)
        metrics |= await context.compute(engine.apply)
        metrics["step_s"] = context.now() - start_s
        ids = [example.group_id for example in batch]
        context.version += 1
        context.done += len(batch)
        await self.examples.done(*batch, learned_in=version)
        await self.released.put(Credit(groups=ids))
        self._record_span(context, f"step {version}", start_s, ids)
        self._score = self._score if heldout else -metrics["loss"]
        if heldout and self._is_evaluated(context.version):
            metrics |= await self._evaluate(context, engine, objective, heldout)
        metrics |= counted(groups)
        context.recorder.record(
            Step(version=context.version, num_steps=self.course.steps, time_s=context.now(), metrics=metrics)
        )

    def _is_evaluated(self, version: int) -> bool:
        every = self.config.evaluate_every
        return version == self.course.steps or bool(every and version % every == 0)

    async def _evaluate(
        self, context: Context, engine: TrainingEngine, objective: Objective, heldout: list[Example]
    ) -> dict[str, float]:
        """Measure the held-out examples and record their scores; returns the figures under "heldout."."""
        start_s = context.now()
        groups = await context.compute(step_groups, engine, objective, heldout)
        divergences = None
        if objective.teacher_model:
            divergences = await context.compute(engine.compare, groups, self.objective)
        rows = await context.compute(engine.score, groups)
        metrics, scores = await context.compute(measure, objective, groups, rows, divergences)
        if objective.gives_score:
            self._scale = scale_of(rows)
        self._score, self._scored = sum(scores) / len(scores), context.version
        context.recorder.record(
            Evaluation(version=context.version, time_s=context.now(), scores=[[s] for s in scores], completions=[])
        )
        self._record_span(context, f"evaluate v{context.version}", start_s, [])
        return {f"heldout.{name}": value for name, value in metrics.items()}

    def _record_span(self, context: Context, name: str, start_s: float, groups: list[int]) -> None:
        context.span(name, start_s, groups=groups)

    async def _save(self, context: Context, engine: TrainingEngine, objective: Objective) -> None:
        card = CARD if objective.head == "policy" else VALUES_CARD
        keep = self.config.keep_checkpoints
        score = self._score if self._scored in (context.version, None) else None
        await save_checkpoint(context, engine, card=card, keep=keep, score=score, saving=self.saving, notes=self._scale)


def step_groups(engine: TrainingEngine, objective: Objective, examples: Sequence[Example]) -> list[TokenGroup]:
    """Return the token groups of a step, with what the objective needs to know of the whole of it."""
    groups = [example_group(example) for example in examples]
    if not objective.needs_mismatched:
        return groups
    point = objective.reference_point(mismatched_log_ratios(engine, examples))
    return [with_constant(group, "reference_point", point) for group in groups]


def mismatched_log_ratios(engine: TrainingEngine, examples: Sequence[Example]) -> list[float]:
    """Return log(pi / pi_ref) of each mismatched response under the model as it stands, summed over its tokens."""
    import numpy as np

    groups = [example_group(example, mismatched=True) for example in examples]
    return [
        float(np.where(mask.numpy() > 0, row - reference.numpy(), 0.0).sum(dtype=np.float64))
        for group, rows in zip(groups, engine.score(groups), strict=True)
        for row, reference, mask in zip(rows, group.columns["reference"], group.columns["mask"], strict=True)
    ]


def scale_of(rows: Sequence[Sequence[FloatArray]]) -> dict[str, float]:
    """Return mean and std of the scores, the last value of each response; none where they do not differ.

    Scores 1.0 and 3.0 give {"mean": 2.0, "std": 1.0}.
    """
    import numpy as np

    scores = np.array([row[-1] for rows_of_group in rows for row in rows_of_group], dtype=np.float64)
    return {"mean": float(scores.mean()), "std": float(scores.std())} if scores.std() > 0 else {}


def measure(
    objective: Objective,
    groups: Sequence[TokenGroup],
    rows: Sequence[Sequence[FloatArray]],
    divergences: list[list[FloatArray]] | None = None,
) -> tuple[dict[str, float], list[float]]:
    """Return the objective's metrics over all groups together and each group's own score; nothing is trained.

    `rows` are the groups as the engine scored them, `divergences` its comparison with the objective's teacher, where
    it has one.
    """
    from flowrl.engines.objective import Sums, add_loss, divide

    sums: Sums = {}
    scores: list[float] = []
    for place, (group, rows_of_group) in enumerate(zip(groups, rows, strict=True)):
        batch = group_batch(group, rows_of_group)
        if divergences is not None:
            batch = batch._replace(divergence_BT=padded(divergences[place])[0])
        loss = objective.loss(batch)
        add_loss(sums, loss)
        own: Sums = {}
        add_loss(own, loss)
        alone = divide([own])
        scores.append(alone[objective.score_metric] if objective.score_metric else -alone["loss"])
    return divide([sums]), scores


def counted(groups: Sequence[TokenGroup]) -> dict[str, float]:
    """Return how much a step has learned from: responses, and tokens under the mask."""
    masks = [mask.numpy() for group in groups for mask in group.columns["mask"]]
    return {"samples": float(len(masks)), "tokens": float(sum((mask > 0).sum() for mask in masks))}
