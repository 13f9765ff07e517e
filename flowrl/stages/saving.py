"""Checkpoints as learners write them: the model, their own state, every other node's part, where the flow stood.

Invariants:
- all parts are of one version, between the same two steps;
- a checkpoint is whole or not there;
- while the disk is full the run waits for room and says so, unless the user has asked to stop.

Called by Learner, OfflineLearner and Writer; the runtime has the other stateful nodes add theirs (`Stage.save`).

Tests: tests/unit/stages/test_writer.py
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import TYPE_CHECKING

from flowrl.engines.checkpoint import CheckpointWriter
from flowrl.errors import ResourceError, RunError
from flowrl.messages import Save
from flowrl.stages.training import save_state
from flowrl.telemetry.files import forget_replaced

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flowrl.engines.base import TrainingEngine
    from flowrl.graph.ports import Out
    from flowrl.graph.stage import Context


async def save_checkpoint(
    context: Context,
    engine: TrainingEngine,
    *,
    card: str,
    keep: int,
    score: float | None,
    saving: Out[Save],
    notes: dict[str, float] | None = None,
    awaited: frozenset[int] = frozenset(),
) -> None:
    """Write the checkpoint of `context.version`, with the part of every node that `saving` leads to.

    `card` is the model card's text with {name} and {version} open, `notes` go into the model's config.json; for the
    rest see `save_parts`.
    """
    filled = card.format(name=context.run_dir.name, version=context.version)
    write_own = partial(_write_own, engine, context.node, context.version, filled, notes or {})
    await save_parts(context, write_own, keep=keep, score=score, saving=saving, awaited=awaited)


async def save_parts(
    context: Context, write_own: Callable[[Path], None], *, keep: int, score: float | None, saving: Out[Save],
    awaited: frozenset[int] = frozenset(),
) -> None:  # fmt: skip
    """Write the checkpoint of `context.version`: what `write_own` puts into it, and every other node's part.

    `score` is what the best checkpoint goes by, None where evaluations say that later; those of the versions in
    `awaited` stay until then. Waits for the nodes that `saving` leads to, and for a full disk's room.

    Raises:
        ResourceError: the disk is full and the user asked to stop.
    """
    writer = CheckpointWriter(context.run_dir / "checkpoints", keep=keep, awaited=awaited)
    while True:
        try:
            path = await _write(context, write_own, writer, score=score, saving=saving)
            break
        except ResourceError as error:
            if context.stopping.is_set():
                raise
            await context.wait_for_room(str(error))
    await context.background(forget_replaced, context.run_dir)
    text = f"version {context.version} saved in {path}"
    context.notice(text, level="info")


async def _write(
    context: Context, write_own: Callable[[Path], None], writer: CheckpointWriter, *, score: float | None,
    saving: Out[Save],
) -> Path:  # fmt: skip
    start_s, version = context.now(), context.version
    aside = await context.compute(writer.begin, version)
    try:
        async with asyncio.TaskGroup() as parts:
            if saving.is_connected:
                parts.create_task(saving.put(Save(version=version, directory=str(aside))))
            await context.compute(write_own, aside)
    except ExceptionGroup as errors:
        failed, others = errors.split((OSError, RuntimeError, RunError))
        if failed is None or others is not None:
            raise
        raise await context.compute(writer.failure, aside, version, failed.exceptions[0]) from errors
    cut = await context.cut(version)
    path = await context.compute(partial(writer.commit, aside, version=version, cut=cut, score=score))
    context.span(f"checkpoint {version}", start_s)
    return path


def _write_own(
    engine: TrainingEngine, node: str, version: int, card: str, notes: dict[str, float], aside: Path
) -> None:
    engine.save_model(aside / "model", card=card)
    settings = aside / "model" / "config.json"
    if notes and settings.is_file():
        settings.write_text(json.dumps(json.loads(settings.read_text()) | notes, indent=2) + "\n")
    save_state(engine, aside / node, version)
