"""Reference: adds the frozen reference policy's log-probs of the sampled tokens. Replicas compete for groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from flowrl.config import Meta, widen
from flowrl.data.models import prepare_model
from flowrl.engines.base import Training, TrainingConfig, TrainingEngine, open_engine
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage
from flowrl.messages import Buffer, Referenced, Scored, extend
from flowrl.stages.tokens import token_group
from flowrl.telemetry.causes import Cause
from flowrl.telemetry.events import Span

if TYPE_CHECKING:
    from flowrl.graph.stage import Context, Say


class Reference(Stage):
    """Scores sampled tokens with a frozen copy of the model."""

    class Config(Training):
        """Settings of the reference node; nothing is trained, so the learning rate and schedule are not used."""

        engine: str = "flowrl.engines.torch:TorchEngine"
        batch_groups: Annotated[int, Meta(ge=1)] = (
            1  # scored together when ready; above 1 the last bits depend on timing
        )

    scored: In[Scored]
    referenced: Out[Referenced]

    def __init__(self, config: Config, *, model: str, temperature: float) -> None:
        self.config: Reference.Config = config
        self.model = model
        self.temperature = temperature

    def check(self, say: Say) -> None:
        """Prepare the model."""
        prepare_model(self.model, say=say)

    async def run(self, context: Context) -> None:
        """Score groups until the edge closes."""
        with context.clock.charge(Cause.START):
            directory = await context.compute(prepare_model, self.model)
            settings = widen(TrainingConfig, self.config, model=str(directory), temperature=self.temperature)
            engine: TrainingEngine = open_engine(
                self.config.engine,
                where=context.where,
                config=settings,
                name=context.where,
                **self.config.engine_options,
            )
            await context.compute(engine.open, context.ranks)
        try:
            while True:
                groups = await self.scored.get_some(self.config.batch_groups)
                start_s = context.now()
                logprobs = await context.compute(engine.score, [token_group(group) for group in groups])
                ids = [group.group_id for group in groups]
                context.recorder.record(
                    Span(node=context.node, replica=context.replica, name="reference", start_s=start_s,
                         end_s=context.now(), groups=ids)
                )  # fmt: skip
                for group, rows in zip(groups, logprobs, strict=True):
                    buffers = [Buffer.floats(row) for row in rows]
                    await self.referenced.put(extend(Referenced, group, ref_logprobs=buffers))
                    context.done += 1
        finally:
            await context.compute(engine.close)
