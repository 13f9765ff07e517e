"""Critic: values every sampled token, finds advantages with them, and trains on the returns it computed.

Invariants:
- every group is valued by the critic as it stood before any group of its own step was trained on;
- the critic learns each `groups_per_step` groups together, in the order in which they leave its input queue, the order
  the learner sees;
- in as many minibatches and epochs as the policy unless told otherwise;
- running ahead of the learner, it adds its state to a checkpoint of version v at its first step boundary c >= v;
- after a resume it trains on none of the steps up to c again. It has a model of its own, which may differ from the
  policy in size and architecture but not in vocabulary.

Uses generalised advantage estimation (Schulman 2015) through the algorithm's `advantages`. The figures of its own step
v reach the learner with the groups of step v + 1, which that step's critic has valued.

Tests: tests/unit/stages/test_estimation.py
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import msgspec

from flowrl.algorithms.return_scale import ReturnScale
from flowrl.config import AUTO, ImportPath, Meta, Select, widen
from flowrl.data.models import inspect_model, prepare_model
from flowrl.data.vocabulary import check_same_vocabulary
from flowrl.engines.base import TokenGroup, Training, TrainingConfig, TrainingEngine
from flowrl.engines.checkpoint import checkpoint_version
from flowrl.errors import ChannelClosed, ConfigError, DataError
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import Itself
from flowrl.graph.stage import Stage
from flowrl.messages import Buffer, Referenced, Samples, extend
from flowrl.model_files import is_classifier
from flowrl.stages.estimation import (
    Estimation,
    group_fields,
    is_cut,
    keeps_group,
    load_algorithm,
    settled,
)
from flowrl.stages.learner import Learner
from flowrl.stages.sampler import Learning, Sampler
from flowrl.stages.step import check_divides, learned_group, mean_metrics, minibatches, with_reference_or_without
from flowrl.stages.tokens import token_group
from flowrl.stages.training import (
    check_training,
    load_state,
    opened,
    save_state,
)
from flowrl.stages.trial import try_algorithm, try_objective
from flowrl.telemetry.files import UNREADABLE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from flowrl.algorithms.base import Algorithm
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say
    from flowrl.messages import FloatArray

CARD = "Value model of version {version}, trained with flowrl. The value before a token is read at the one before it"
SCALE = "return_scale.json"  # beside the critic's state, and in a model that it saves


def sampled(groups: Sequence[TokenGroup], name: str) -> NDArray[np.float64]:
    """Return a column's numbers at the sampled tokens of a step, one after the other."""
    import numpy as np

    rows = [column for group in groups for column in group.columns[name]]
    masks = [mask for group in groups for mask in group.columns.get("mask") or [None] * len(group.responses)]
    kept = [
        row.numpy() if mask is None else row.numpy()[mask.numpy() > 0] for row, mask in zip(rows, masks, strict=True)
    ]
    return np.concatenate(kept).astype(np.float64)


def explained_variance(groups: Sequence[TokenGroup]) -> dict[str, float]:
    """Return 1 - Var(R - V) / Var(R) over a step's sampled tokens, V as they were valued before the step learned them.

    Nothing where all returns are equal. Var(R - V) = 1 where Var(R) = 4: critic.explained_variance is 0.75.
    """
    returns, values = sampled(groups, "returns"), sampled(groups, "values")
    if not returns.size or returns.var() == 0.0:
        return {}
    return {"critic.explained_variance": float(1.0 - (returns - values).var() / returns.var())}


def in_units(group: TokenGroup, before: ReturnScale, now: ReturnScale) -> TokenGroup:
    """Return a group as the network learns it: its values as it gave them under `before`, the returns under `now`."""
    scales = {"values": before, "returns": now}
    columns = {
        name: [Buffer.floats((row.numpy() - scale.mean) / scale.unit) for row in group.columns[name]]
        for name, scale in scales.items()
    }
    return msgspec.structs.replace(group, columns=group.columns | columns)


def begun(algorithm: Algorithm, group: Referenced, earned: list[float]) -> ReturnScale:
    """Return the scale of a group of the first step, of which no returns are known: about what a sample has earned.

    `earned` are the scores of the groups before it, to which its own is added. About 0 the one-step differences of
    lam < 1 would take a reward of 100 for something that late tokens do. Of turns' rewards less and less is to come.
    """
    import numpy as np

    if group.placed is None and not algorithm.is_blank:
        zeros = [np.zeros(len(sample.token_ids), dtype=np.float32) for sample in group.samples]
        figures = group_fields(algorithm, group, zeros, [0.0] * len(zeros))["metrics"]
        earned.append(figures.get("reward.shaped", fmean(group.rewards)))
    return ReturnScale(mean=fmean(earned)) if earned else ReturnScale()


def check_behind(longest: int, num_positions: int) -> None:
    """Insist that a critic has a position for one token more than a prompt and a cut answer have; 0 is any number.

    Raises:
        ConfigError: it has not.
    """
    if 0 < num_positions <= longest:
        what = f"reads a token behind answers of {longest} tokens with their prompts, the critic has {num_positions} "
        raise ConfigError(
            "algorithm.bootstrap_cut", f"{what}positions", "lower sampling.max_tokens or max_model_len by 1"
        )


def longer(group: Referenced) -> TokenGroup:
    """Return a group's tokens with one more behind each cut answer, before which the value behind the answer is read.

    What it is does not matter: it is the answer's last token again.
    """
    responses = [
        Buffer.ints([*(tokens := sample.token_ids.tolist()), tokens[-1]]) if is_cut(sample) else sample.token_ids
        for sample in group.samples
    ]
    return TokenGroup(prompt_ids=group.token_ids, responses=responses)


def split_after(group: Referenced, rows: list[FloatArray]) -> tuple[list[FloatArray], list[float]]:
    """Return the values of each response's own tokens, and those behind cut answers, 0 behind the others."""
    cut = [is_cut(sample) for sample in group.samples]
    after = [float(row[-1]) if was_cut else 0.0 for row, was_cut in zip(rows, cut, strict=True)]
    return [row[:-1] if was_cut else row for row, was_cut in zip(rows, cut, strict=True)], after


def read_scale(directory: Path) -> ReturnScale:
    """Return the scale that lies beside a critic's state or model; where there is none, that of the beginning.

    Raises:
        DataError: it cannot be read.
    """
    path = directory / SCALE
    try:
        return msgspec.json.decode(path.read_bytes(), type=ReturnScale) if path.is_file() else ReturnScale()
    except UNREADABLE as error:
        raise DataError(str(path), f"is not a scale of returns ({error})", "restore it, or remove it") from error


class Critic(Stage):
    """Values, estimates advantages and trains."""

    class Config(Training):
        """Settings of the critic node."""

        lr: float = 9e-6  # OpenRLHF paper, section 3.3: larger than the policy's
        engine: ImportPath = "flowrl.engines.deepspeed:DeepSpeedEngine"
        objective: Select = Select(use="flowrl.algorithms.value:ValueLoss")
        minibatches: Annotated[int, Meta(ge=0)] = 0  # optimizer steps in one pass over a step's groups; 0: the policy's
        epochs: Annotated[int, Meta(ge=0)] = 0  # passes; 0: the policy's
        # learn returns by their running mean and deviation, so that a reward's size does not matter; auto: unless the
        # critic begins as a model that scores already, a reward model or another run's critic without its scale
        scale_returns: Annotated[bool | None, AUTO] = None
        # valued together when ready; above 1 the last bits depend on timing
        batch_groups: Annotated[int, Meta(ge=1)] = 1
        save_model: bool = False  # with each checkpoint, for `flowrl export --node critic` or a later run's critic

    ordered = frozenset({"referenced"})
    is_stateful = True
    referenced: In[Referenced]  # in the learner's order
    samples: Out[Samples]

    def __init__(
        self, config: Config, sampler: Sampler, learning: Learning, policy: Learner.Config, *, model: str = ""
    ) -> None:
        # what is 0 follows the policy, and whoever reads the settings (estimate, plan, profile) reads what is done
        self.config: Critic.Config = msgspec.structs.replace(
            config, minibatches=config.minibatches or policy.minibatches, epochs=config.epochs or policy.epochs
        )
        self.sampler = sampler
        self.learning = learning
        self.model = model or sampler.model  # "": it begins as the policy does
        self.algorithm = learning.algorithm
        check_divides(self.config.minibatches, learning.groups_per_step, "critic.minibatches")

    def check(self, say: Say) -> None:
        """Prepare the model, which must read the policy's tokens; load the algorithm and try it on a made-up group."""
        steps, saves = self.num_optimizer_steps, self.config.save_model
        directory = check_training(
            self.config, self.model, "critic", num_steps=steps, say=say, head="value", saves=saves
        )
        if self.model != self.sampler.model:
            check_same_vocabulary(
                prepare_model(self.sampler.model, say=say), directory, "critic_model", longest=self.sampler.longest
            )
        algorithm, sampler = self._load(), self.sampler
        try_algorithm(algorithm, self.algorithm.use, sampler.group_size, has_turns=sampler.max_turns > 1)
        objective = self.config.objective.load("critic.objective")
        try_objective(objective, f"critic.objective: {self.config.objective.use}", sampler.group_size)
        if algorithm.needs_after:
            check_behind(self.sampler.longest, inspect_model(directory).max_context)
        if self.config.minibatches * self.config.epochs == 1 and getattr(objective, "clip", 0.0):
            what = "with one optimizer step a version no value has moved yet when it is clipped"
            say(f"critic.objective.clip: no effect, for {what}; set critic.minibatches or critic.epochs to 2 or more")

    def _load(self) -> Algorithm:
        self.algorithm = settled(self.algorithm, self.sampler.max_response)
        return load_algorithm(self.algorithm, group_size=self.sampler.group_size, has_critic=True)

    def _settings(self) -> TrainingConfig:
        return widen(TrainingConfig, self.config, model=str(prepare_model(self.model)), head="value")

    @property
    def num_optimizer_steps(self) -> int:
        """Return how many optimizer steps the whole run takes, the length of its schedule."""
        return self.learning.steps * self.config.epochs * self.config.minibatches

    async def follow(self, context: Context) -> None:
        """Serve as a rank other than 0."""
        async with opened(context, self.config.engine, self._settings, self.num_optimizer_steps) as engine:
            await context.compute(engine.follow)

    def simulated(self, costs: Costs) -> Itself:
        """Value with zeros and train nothing."""
        shared = {"sampler": costs.sampler(self.sampler), "learning": costs.learning(self.learning)}
        return Itself({"config": costs.training(self.config), "model": "", **shared})

    async def run(self, context: Context) -> None:
        """Value, estimate and train until the edge closes."""
        async with opened(context, self.config.engine, self._settings, self.num_optimizer_steps) as engine:
            version = trained = 0
            directory = prepare_model(self.model)
            self._scale = begun = read_scale(directory)
            if context.resume_from is not None:
                trained = await context.compute(load_state, engine, context.resume_from / context.node)
                version = checkpoint_version(context.resume_from)
            algorithm = self._load()
            estimation = Estimation(self.algorithm, algorithm, version=version)
            if context.resume_from is not None:
                await context.compute(estimation.load, context.resume_from / context.node)
                self._scale = read_scale(context.resume_from / context.node)
            self._is_scaled = self.config.scale_returns
            if self._is_scaled is None:
                self._is_scaled = begun != ReturnScale() or not is_classifier(directory)

            def save(directory: Path, version: int) -> None:
                save_state(engine, directory, context.version)
                (directory / SCALE).write_bytes(msgspec.json.encode(self._scale))
                if self.config.save_model:
                    is_plain = (self._scale.mean, self._scale.unit) == (0.0, 1.0)
                    units = "" if is_plain else f", as (V - {self._scale.mean:.6g}) / {self._scale.unit:.6g}"
                    engine.save_model(directory / "model", card=f"{CARD.format(version=version)}{units}.\n")
                    (directory / "model" / SCALE).write_bytes(msgspec.json.encode(self._scale))
                estimation.save(directory, version)

            self._save = save
            context.version = version
            await self._value(context, engine, estimation, trained)

    def save(self, directory: Path, version: int) -> None:
        """Write the engine's state as it is, and what the advantages of step `version` are found with."""
        self._save(directory, version)

    async def _value(self, context: Context, engine: TrainingEngine, estimation: Estimation, trained: int) -> None:
        """Value and estimate until the edge closes; train at the end of each step after the first `trained`."""
        step: list[tuple[TokenGroup, ReturnScale]] = []  # and what it was valued with
        earned: list[float] = []
        per_step = self.learning.groups_per_step
        while True:
            try:
                groups = await self.referenced.get_some(min(self.config.batch_groups, per_step - len(step)))
            except ChannelClosed:
                return
            start_s = context.now()
            groups = [group for group in groups if await self._keeps(estimation, group)]
            if not groups:
                continue
            looks_behind = estimation.algorithm.needs_after
            values = await context.compute(
                engine.score, [longer(group) if looks_behind else token_group(group) for group in groups]
            )
            for group, said in zip(groups, values, strict=True):
                scale = self._scale
                if self._is_scaled and not scale.weight:
                    scale = begun(estimation.algorithm, group, earned)
                rows, after = [scale.mean + scale.unit * row for row in said], None
                if looks_behind:
                    rows, after = split_after(group, rows)
                samples = extend(Samples, group, **estimation.advantages(group, rows, after))
                step.append((learned_group(estimation.algorithm, samples), scale))
                await self.samples.put(samples)
                context.done += 1
            context.span("value", start_s, groups=[group.group_id for group in groups])
            if len(step) == per_step:
                async with context.stepping():
                    if context.version >= trained:
                        estimation.figures = await self._train(context, engine, step)
                    estimation.end_step()
                step = []

    async def _keeps(self, estimation: Estimation, group: Referenced) -> bool:
        """Return whether the algorithm wants to learn a group; one that it does not is rejected as filtered."""
        if keeps_group(estimation.algorithm, group):
            return True
        reason = f"{self.algorithm.use} learns nothing from rewards {group.rewards}"
        await self.referenced.reject(group, kind="filtered", reason=reason)
        return False

    async def _train(
        self, context: Context, engine: TrainingEngine, valued: list[tuple[TokenGroup, ReturnScale]]
    ) -> dict[str, float]:
        """Take a step's optimizer steps and return its figures."""
        start_s = context.now()
        updates: list[dict[str, float]] = []
        num_parts, epochs = self.config.minibatches, self.config.epochs
        step = with_reference_or_without([group for group, _ in valued])
        is_guess = self._is_scaled and not self._scale.weight  # then values say what was earned, not what is seen
        explained = {} if is_guess else explained_variance(step)
        if self._is_scaled:
            self._scale = self._scale.seen(sampled(step, "returns").tolist())
        step = [in_units(group, before, self._scale) for group, (_, before) in zip(step, valued, strict=True)]
        for places in minibatches(len(step), num_parts, epochs, seed=(self.config.seed, context.version)):
            metrics = await context.compute(engine.accumulate, [step[place] for place in places], self.config.objective)
            updates.append(metrics | await context.compute(engine.apply))
        context.span(f"critic step {context.version + 1}", start_s)
        figures = {f"critic.{name}": value for name, value in mean_metrics(updates).items()}
        if self.config.minibatches * self.config.epochs == 1:
            figures.pop("critic.value_clip_frac", None)  # before the only update no value has moved
        return figures | explained
