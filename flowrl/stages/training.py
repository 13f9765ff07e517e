"""Open and close a training engine around a stage's work."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from flowrl.engines.base import TrainingConfig, TrainingEngine, open_engine
from flowrl.telemetry.causes import Cause

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from flowrl.graph.stage import Context


@asynccontextmanager
async def opened(
    context: Context, engine_path: str, settings: Callable[[], TrainingConfig], steps: int
) -> AsyncIterator[TrainingEngine]:
    """Open the engine on this rank, with the run's number of steps as the schedule's length; close it at the end."""
    with context.clock.charge(Cause.START):
        config = await context.compute(settings)
        if config.schedule.total_steps == 0:
            schedule = msgspec.structs.replace(config.schedule, total_steps=steps)
            config = msgspec.structs.replace(config, schedule=schedule)
        engine: TrainingEngine = open_engine(
            engine_path,
            config=config,
            where=context.where,
            name=f"{context.run_dir.name}-{context.node}",
            num_receivers=context.num_readers,
            **config.engine_options,
        )
        await context.compute(engine.open, context.ranks)
    try:
        yield engine
    finally:
        await context.compute(engine.close)
