"""Checkpoints as learners write them: the model, their own state, every other node's part, where the flow stood.

Invariants: all parts are of one version, between the same two steps; a checkpoint is whole or not there; while the
disk is full the run waits for room and says so, unless the user has asked to stop. Called by Learner and
OfflineLearner.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from flowrl.engines.checkpoint import CheckpointWriter
from flowrl.errors import ResourceError, RunError
from flowrl.messages import Save
from flowrl.stages.training import save_state
from flowrl.telemetry.events import Notice, Span

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.engines.base import TrainingEngine
    from flowrl.graph.ports import Out
    from flowrl.graph.stage import Context

ROOM_RETRY_S = 30.0  # between two looks at a full disk


async def save_checkpoint(
    context: Context, engine: TrainingEngine, *, card: str, keep: int, score: float, saves: Out[Save] | None = None
) -> None:
    """Write the checkpoint of `context.version`, with the part of every node that `saves` leads to.

    `card` is the model card's text with {name} and {version} open; `score` is what the best checkpoint goes by. Waits
    for those nodes, and for room on a full disk.

    Raises:
        ResourceError: the disk is full and the user asked to stop.
    """
    writer = CheckpointWriter(context.run_dir / "checkpoints", keep=keep)
    while True:
        try:
            path = await _write(context, engine, writer, card=card, score=score, saves=saves)
            break
        except ResourceError as error:
            if context.stopping.is_set():
                raise
            text = f"{error}; trying again every {ROOM_RETRY_S:.0f} s"
            context.recorder.record(Notice(level="warning", where=context.where, text=text, time_s=context.now()))
            await asyncio.sleep(ROOM_RETRY_S)
    text = f"version {context.version} saved in {path}"
    context.recorder.record(Notice(level="info", where=context.where, text=text, time_s=context.now()))


async def _write(context: Context, engine: TrainingEngine, writer: CheckpointWriter, *, card: str, score: float,
                 saves: Out[Save] | None) -> Path:  # fmt: skip
    start_s, version = context.now(), context.version
    aside = await context.compute(writer.begin, version)
    try:
        async with asyncio.TaskGroup() as parts:
            if saves is not None and saves.is_connected:
                parts.create_task(saves.put(Save(version=version, directory=str(aside))))
            filled = card.format(name=context.run_dir.name, version=version)
            await context.compute(_write_own, engine, aside, context.node, version, filled)
    except ExceptionGroup as errors:
        failed, others = errors.split((OSError, RuntimeError, RunError))
        if failed is None or others is not None:
            raise
        raise await context.compute(writer.failure, aside, version, failed.exceptions[0]) from errors
    cut = await context.cut(version)
    path = await context.compute(partial(writer.commit, aside, version=version, cut=cut, score=score))
    context.recorder.record(
        Span(node=context.node, replica=context.replica, name=f"checkpoint {version}", start_s=start_s,
             end_s=context.now())
    )  # fmt: skip
    return path


def _write_own(engine: TrainingEngine, aside: Path, node: str, version: int, card: str) -> None:
    engine.save_model(aside / "model", card=card)
    save_state(engine, aside / node, version)
