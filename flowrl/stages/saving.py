"""Checkpoints as learners write them: the model, their own state, every other node's part, where the flow stood.

Invariants: all parts are of one version, between the same two steps; a checkpoint is whole or not there; while the
disk is full the run waits for room and says so, unless the user has asked to stop. Called by Learner, OfflineLearner
and Writer; the other stateful nodes answer with `add_state`.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.engines.checkpoint import CheckpointWriter
from flowrl.errors import ResourceError, RunError
from flowrl.messages import Save
from flowrl.stages.training import save_state
from flowrl.telemetry.events import Notice, Span
from flowrl.telemetry.files import forget_replaced

if TYPE_CHECKING:
    from collections.abc import Callable

    from flowrl.engines.base import TrainingEngine
    from flowrl.graph.ports import In, Out
    from flowrl.graph.stage import Context


async def save_checkpoint(
    context: Context,
    engine: TrainingEngine,
    *,
    card: str,
    keep: int,
    score: float,
    saves: Out[Save] | None = None,
    notes: dict[str, float] | None = None,
) -> None:
    """Write the checkpoint of `context.version`, with the part of every node that `saves` leads to.

    `card` is the model card's text with {name} and {version} open, `notes` go into the model's config.json; for the
    rest see `save_parts`.
    """
    filled = card.format(name=context.run_dir.name, version=context.version)
    write_own = partial(_write_own, engine, context.node, context.version, filled, notes or {})
    await save_parts(context, write_own, keep=keep, score=score, saves=saves)


async def save_parts(
    context: Context, write_own: Callable[[Path], None], *, keep: int, score: float, saves: Out[Save] | None = None
) -> None:
    """Write the checkpoint of `context.version`: what `write_own` puts into it, and every other node's part.

    `score` is what the best checkpoint goes by. Waits for the nodes that `saves` leads to, and for room on a full disk.

    Raises:
        ResourceError: the disk is full and the user asked to stop.
    """
    writer = CheckpointWriter(context.run_dir / "checkpoints", keep=keep)
    while True:
        try:
            path = await _write(context, write_own, writer, score=score, saves=saves)
            break
        except ResourceError as error:
            if context.stopping.is_set():
                raise
            await context.wait_for_room(str(error))
    await context.background(forget_replaced, context.run_dir)
    text = f"version {context.version} saved in {path}"
    context.recorder.record(Notice(level="info", where=context.where, text=text, time_s=context.now()))


async def _write(context: Context, write_own: Callable[[Path], None], writer: CheckpointWriter, *, score: float,
                 saves: Out[Save] | None) -> Path:  # fmt: skip
    start_s, version = context.now(), context.version
    aside = await context.compute(writer.begin, version)
    try:
        async with asyncio.TaskGroup() as parts:
            if saves is not None and saves.is_connected:
                parts.create_task(saves.put(Save(version=version, directory=str(aside))))
            await context.compute(write_own, aside)
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


async def add_state(
    saves: In[Save], context: Context, boundary: asyncio.Condition, write: Callable[[Path, int], None]
) -> None:
    """Add this node's part to every checkpoint until the edge closes, once it has come as far as the learner.

    `boundary` is held while `write(directory, version)` runs, and is notified whenever `context.version` has grown.
    """
    if not saves.is_connected:
        return
    async for save in saves:
        async with boundary:
            await boundary.wait_for(lambda version=save.version: context.version >= version)
            await context.compute(write, Path(save.directory) / context.node, save.version)
        await saves.done(save)


def _write_own(
    engine: TrainingEngine, node: str, version: int, card: str, notes: dict[str, float], aside: Path
) -> None:
    engine.save_model(aside / "model", card=card)
    settings = aside / "model" / "config.json"
    if notes and settings.is_file():
        settings.write_text(json.dumps(json.loads(settings.read_text()) | notes, indent=2) + "\n")
    save_state(engine, aside / node, version)
