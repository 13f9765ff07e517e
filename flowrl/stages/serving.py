"""What the stages that sample share: an engine that follows the newest weights, and prompts taken as there is room.

Invariants:
- nothing is served before the first published version, and a version is acknowledged only after the engine has proved
  it;
- at most `max_groups` groups of a port are in flight, and the next is taken only when one of them has been handed on.
  So a full edge downstream stops it (backpressure).

Called by Generator and Agent.

Tests: tests/unit/stages/test_agent.py
"""

from __future__ import annotations

import asyncio
import functools
import tempfile
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec

from flowrl.config import ImportPath, Meta, widen
from flowrl.data.model_process import run_in_process
from flowrl.data.models import inspect_model, prepare_model
from flowrl.engines.base import (
    GenerationConfig,
    GenerationEngine,
    Lora,
    Serving,
    check_engine,
    open_engine,
    try_engine,
)
from flowrl.errors import ChannelClosed, ConfigError
from flowrl.telemetry.events import Cause

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from flowrl.engines.base import UpdateReport
    from flowrl.graph.ports import In
    from flowrl.graph.stage import Context, Devices, Say
    from flowrl.messages import Prompt, Sample, Weights
    from flowrl.stages.sampler import Sampler

    Serve = Callable[[Prompt], Awaitable[None]]


class Served(Serving):
    """Settings of a node that has a generation engine, with the name of that engine."""

    engine: ImportPath = "flowrl.engines.vllm:VllmEngine"  # module:Class of the generation engine


class Generation(Served):
    """Settings of a node that samples groups."""

    group_size: Annotated[int, Meta(ge=1)] = 8  # samples of each prompt
    max_groups: Annotated[int, Meta(ge=1)] = 16  # prompt groups in flight in one replica


def check_context(config: Served, model: str, say: Say, *, where: str, sampler: Sampler | None = None) -> None:
    """Prepare the model; its context must hold `max_model_len` tokens, and the engine take its options and settings.

    Raises:
        UserError: one of them is not as it must be.
    """
    check_engine(config.engine, config.engine_options, where, needs=("open", "generate", "update_weights", "close"))
    directory = prepare_model(model, say=say)
    opened = _opened(config, directory, sampler)
    engine = open_engine(config.engine, config=opened, where=where, **config.engine_options)
    if getattr(engine, "is_untried", False):
        told = {"path": config.engine, "config": opened, "where": where, "options": config.engine_options}
        _try_apart(msgspec.json.encode(told), where)
    card = inspect_model(directory)
    if card.max_context and config.max_model_len > card.max_context:
        what = f"{config.max_model_len} tokens, but {model} has a context of {card.max_context}"
        raise ConfigError(f"{where}.max_model_len", what, f"lower it to {card.max_context} or less")


def _opened(config: Served, directory: Path, sampler: Sampler | None, *, is_sent: bool = True) -> GenerationConfig:
    """Return what an engine is opened with; `is_sent`: versions come to it."""
    adapter = sampler.travelling(directory) if sampler and is_sent else Lora()
    routing = sampler.routing if sampler else "own"
    return widen(GenerationConfig, config, model=str(directory), adapter=adapter, routing=routing)


@functools.cache
def _try_apart(request: bytes, where: str) -> None:
    """Have an engine try its options in a process of its own (`try_engine`), once for all nodes that have the same."""
    with tempfile.TemporaryDirectory(prefix="flowrl-options-") as aside:
        (Path(aside) / "request").write_bytes(request)
        run_in_process(try_engine, Path(aside) / "request", where=f"{where}.engine_options")


@asynccontextmanager
async def serving(
    context: Context, config: Served, weights: In[Weights], sampler: Sampler | None = None, *, model: str = ""
) -> AsyncIterator[GenerationEngine]:
    """Open an engine and have it serve every version that arrives; entered once it serves the first.

    Where no edge brings weights, it serves the model as it is: the sampler's, or `model` where nothing is sampled.
    """
    with context.clock.charge(Cause.START):
        directory = await context.compute(prepare_model, sampler.model if sampler else model)
        engine: GenerationEngine = open_engine(
            config.engine,
            config=_opened(config, directory, sampler, is_sent=weights.is_connected),
            where=context.where,
            receiver_index=context.replica,
            **config.engine_options,
        )
        async with nullcontext() if context.devices is None else context.devices.use():
            await engine.open()
        if context.devices is not None:
            engine = cast("GenerationEngine", TakingTurns(engine, context.devices))
        context.slots = getattr(engine, "slots", None)
    try:
        if not weights.is_connected:
            await engine.serve_loaded()
            context.version = 0
            yield engine
            return
        first = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            updates = tasks.create_task(_follow_weights(context, engine, weights, first))
            with context.clock.charge(Cause.START):
                await first.wait()
            yield engine
            updates.cancel()
    finally:
        if context.devices is not None:
            context.devices.leave()
        await engine.close()


class TakingTurns:
    """A generation engine that has its devices in turns: it asks for them whenever it is asked for something."""

    def __init__(self, engine: GenerationEngine, devices: Devices) -> None:
        self._engine = engine
        self._devices = devices
        devices.join(engine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, **request: Any) -> list[Sample]:
        """Sample once the devices are there."""
        async with self._devices.use():
            return await self._engine.generate(**request)

    async def score(self, *asked: Any) -> Any:
        """Score tokens once the devices are there."""
        async with self._devices.use():
            return await self._engine.score(*asked)  # pyright: ignore[reportAttributeAccessIssue]

    async def among(self, *asked: Any) -> Any:
        """Weigh tokens once the devices are there."""
        async with self._devices.use():
            return await self._engine.among(*asked)  # pyright: ignore[reportAttributeAccessIssue]

    async def complete(self, *asked: Any, **sampling: Any) -> Any:
        """Complete a text once the devices are there."""
        async with self._devices.use():
            return await self._engine.complete(*asked, **sampling)  # pyright: ignore[reportAttributeAccessIssue]

    async def serve_loaded(self) -> None:
        """Serve what `open` loaded."""
        async with self._devices.use():
            await self._engine.serve_loaded()

    async def update_weights(self, weights: Weights) -> UpdateReport:
        """Take a version in once the devices are there."""
        async with self._devices.use():
            return await self._engine.update_weights(weights)


async def _follow_weights(context: Context, engine: GenerationEngine, port: In[Weights], first: asyncio.Event) -> None:
    async for weights in port:
        start_s = context.now()
        report = await engine.update_weights(weights)
        context.version = weights.version
        await port.done(weights)
        first.set()
        figures = {
            "pause_s": report.pause_s,
            "transfer_s": report.transfer_s,
            "canary_mean_gap": report.mean_gap,
            "canary_max_gap": report.max_gap,
            "canary_allowed_gap": report.allowed_gap,
        }
        context.span(f"weight update v{weights.version}", start_s, args=figures)
        if report.note:
            context.notice(report.note)


async def serve_each(*lanes: tuple[In[Prompt], Serve], max_groups: int) -> None:
    """Serve the prompts of each connected port, at most `max_groups` of each at a time, until they are closed."""
    async with asyncio.TaskGroup() as tasks:
        for port, serve in lanes:
            if port.is_connected:
                tasks.create_task(_serve_lane(port, serve, max_groups))


async def _serve_lane(port: In[Prompt], serve: Serve, max_groups: int) -> None:
    slots = asyncio.Semaphore(max_groups)
    running: set[asyncio.Task[None]] = set()

    async def one(prompt: Prompt) -> None:
        try:
            await serve(prompt)
        finally:
            slots.release()

    async with asyncio.TaskGroup() as tasks:
        while True:
            await slots.acquire()
            try:
                prompt = await port.get()
            except ChannelClosed:
                break
            task = tasks.create_task(one(prompt))
            running.add(task)
            task.add_done_callback(running.discard)
        for task in running:  # the edges are closed: nobody waits for what is still in flight
            task.cancel()


def record_generation(context: Context, prompt: Prompt, samples: Sequence[Sample], start_s: float, name: str) -> None:
    """Record the timeline's span for a group that was sampled from `start_s` until now."""
    lengths = [sample.num_sampled for sample in samples]
    groups = [prompt.group_id] if name == "generate" else []  # held-out prompts have ids of their own
    told = {"samples": len(samples), "prompt_tokens": len(prompt.token_ids), "lengths": lengths, "tokens": sum(lengths)}
    context.span(name, start_s, groups=groups, args=told)
