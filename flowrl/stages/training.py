"""What training stages share: an engine opened and closed around their work, its state, and the wait for a step.

Tests: tests/unit/stages/test_step.py
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.config import load_class
from flowrl.data.models import inspect_model, prepare_model, tensors_in
from flowrl.engines.base import Scoring, Training, TrainingConfig, TrainingEngine, check_engine, open_engine
from flowrl.engines.checkpoint import read_version, write_version
from flowrl.errors import ConfigError
from flowrl.model_files import check_plain, read_config
from flowrl.telemetry.events import Cause

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator

    from flowrl.algorithms.base import Head
    from flowrl.graph.ports import In
    from flowrl.graph.stage import Context, Say
    from flowrl.messages import M


def check_engine_of(settings: Scoring | Training, where: str, model: str) -> None:
    """Insist on a node's engine, its options and whole groups of ranks, and on what attention and adapter need here.

    Raises:
        ConfigError: its settings ask for what is not here.
    """
    check_engine(settings.engine, settings.engine_options, where, needs=("open", "score", "close"))
    import torch

    has_gpu = settings.gpus > 0 or bool(settings.share) or torch.cuda.is_available()
    check_settings = getattr(load_class(settings.engine, f"{where}.engine"), "check_settings", None)
    if check_settings is not None:  # what this engine cannot do, or would not look at
        check_settings(settings, where, has_gpu=has_gpu)
    lora = settings.lora
    if lora.start and not (Path(lora.start) / "adapter_config.json").is_file():
        what = f"{lora.start} has no adapter_config.json"
        raise ConfigError(f"{where}.lora.start", what, "give the directory of an adapter in peft's format")
    if settings.sequence_parallel > 1 or settings.tensor_parallel > 1:
        from flowrl.engines.sequence import check_split
        from flowrl.engines.tensor import check_parts

        for check in (check_split, check_parts):
            check(settings, prepare_model(model), where, num_ranks=settings.ranks)
    if lora.bits:
        from flowrl.engines.quantization import check_quantization

        check_quantization(lora, where, has_gpu=has_gpu)


def check_training(
    settings: Training, model: str, where: str, *, num_steps: int, say: Say, head: Head = "policy", saves: bool = True
) -> Path:
    """Insist on all that a node that trains needs: its engine, schedule, model, and a checkpoint that can be written.

    Prepares the model and returns its directory; `num_steps` is how many optimizer steps the run takes.

    Raises:
        UserError: one of them is not what its settings ask for.
    """
    check_engine_of(settings, where, model)
    check_schedule(settings, num_steps, where, say)
    for line in settings.idle_settings():
        say(f"{where}.{line}")
    directory = prepare_model(model, say=say)
    trusted = settings.trust_remote_code
    is_model = check_loading(directory, where, head, trust_remote_code=trusted)
    check_model(settings, directory, where, head)
    if is_model and saves:
        from flowrl.engines.publishing import try_saving

        try_saving(directory, where, trust_remote_code=trusted)
    return directory


def check_model(settings: Training, model: Path, where: str, head: Head = "policy") -> None:
    """Insist that a node's model has the parameters, layers and experts that its settings speak of.

    Raises:
        ConfigError: it has not.
    """
    if settings.freeze or settings.gradient_checkpointing:
        from flowrl.engines.models import outline
        from flowrl.engines.savings import check_savings

        check_savings(settings, outline(model, head, where, trust_remote_code=settings.trust_remote_code), where)
    if settings.router_aux_loss:
        from transformers import AutoConfig

        from flowrl.engines.router import check_router

        check_router(AutoConfig.from_pretrained(model, trust_remote_code=settings.trust_remote_code), where)


def check_routing(settings: Training, model: Path, where: str) -> int:
    """Insist that a node's model has experts to choose from; returns the bytes of a token's routes.

    Raises:
        ConfigError: it has none.
    """
    from transformers import AutoConfig

    from flowrl.engines.routes import experts_of

    config = AutoConfig.from_pretrained(model, trust_remote_code=settings.trust_remote_code)
    num_experts, top_k = experts_of(config, where)
    return int(config.get_text_config().num_hidden_layers) * top_k * (1 if num_experts <= 256 else 2)


def check_masters(model: str, say: Say) -> None:
    """Say it where a model is another run's, whose float32 weights were rounded when it was saved."""
    directory = prepare_model(model)
    if not (directory.parent / "manifest.json").is_file():
        return
    dtype = inspect_model(directory).dtype
    if dtype != "float32":
        what = f"{model} is saved in {dtype}: what its run had learned in float32 beyond that is not in it"
        say(f"{what}; flowrl run --resume goes on from the float32 weights")


def check_loading(model: Path, where: str, head: Head, *, trust_remote_code: bool) -> bool:
    """Insist that a node's model can be loaded whole, by its files' headers; False for a stand-in of simulations.

    Raises:
        ModelError: weights are not there, or quantized.
    """
    if "model_type" not in read_config(model):
        return False
    if trust_remote_code:
        check_plain(model, where)
    else:
        from flowrl.engines.models import check_weights

        check_weights(model, head, where, tensors_in(model, where))
    return True


def check_schedule(settings: Training, num_steps: int, where: str, say: Say) -> None:
    """Insist that the learning rate reaches its peak in a run of so many optimizer steps; say it where that is 0.

    Raises:
        ConfigError: the warm-up is longer than the run.
    """
    if not settings.lr:
        say(f"warning: {where}.lr is 0, so that it learns nothing")
    warmup, total = settings.schedule.warmup_steps, settings.schedule.total_steps or num_steps
    if warmup > min(total, num_steps):
        what = f"{warmup} optimizer steps, but the run takes {min(total, num_steps)}: lr would never reach its peak"
        raise ConfigError(f"{where}.schedule.warmup_steps", what, "lower it, or give the run more steps")


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
            say=context.notice,
            **config.engine_options,
        )
        await context.compute(engine.open, context.ranks)
    try:
        with sleeping(context, engine):
            yield engine
    finally:
        await context.compute(engine.close)


@contextmanager
def sleeping(context: Context, engine: Any) -> Generator[None]:
    """Have an engine sleep while others have its devices, where it has them in turns."""
    if context.devices is None:
        yield
        return
    context.devices.join(engine)
    try:
        yield
    finally:
        context.devices.leave()


def save_state(engine: TrainingEngine, directory: Path, version: int) -> None:
    """Write an engine's state, as it stands at a policy version; blocking."""
    engine.save_state(directory)
    write_version(directory, version)


def load_state(engine: TrainingEngine, directory: Path) -> int:
    """Read an engine's state back and return the policy version it was saved at; blocking."""
    engine.load_state(directory)
    return read_version(directory)


async def take_step(port: In[M], context: Context, size: int) -> list[M] | None:
    """Wait for a full step of messages, or return None once the user asked to stop and fewer than a step are out."""

    async def drained() -> None:
        await context.stopping.wait()
        await context.fewer_out(size)

    taking = asyncio.ensure_future(port.take(size))
    draining = asyncio.ensure_future(drained())
    try:
        await asyncio.wait([taking, draining], return_when=asyncio.FIRST_COMPLETED)
        return taking.result() if taking.done() else None
    finally:
        for waiting in (taking, draining):
            waiting.cancel()
        await asyncio.gather(taking, draining, return_exceptions=True)
