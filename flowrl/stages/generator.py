"""Generator: samples responses, many groups at a time, under the newest weights it has proved.

Invariants: it serves nothing before the first published version; it acknowledges a version only after the engine has
proved it; every token carries the version that sampled it. At most `max_groups` groups are in flight, and the next is
taken only when one of them has been handed on, so a full edge downstream stops it (backpressure). Held-out prompts
take the same path to their own port. Replicas compete for prompts.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

from flowrl.config import Meta, widen
from flowrl.data.models import inspect_model, prepare_model
from flowrl.engines.base import GenerationConfig, GenerationEngine, Sampling, Serving, open_engine
from flowrl.errors import ChannelClosed, ConfigError
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage
from flowrl.messages import Prompt, Rollouts, Weights, extend
from flowrl.telemetry.causes import Cause
from flowrl.telemetry.events import Span

if TYPE_CHECKING:
    from flowrl.graph.stage import Context, Say


class Generator(Stage):
    """Samples responses with a generation engine."""

    class Config(Serving):
        """Settings of the generator node."""

        group_size: Annotated[int, Meta(ge=1)] = 8  # samples of each prompt
        max_groups: Annotated[int, Meta(ge=1)] = 16  # prompt groups in flight in one replica
        engine: str = "flowrl.engines.vllm:VllmEngine"

    optional = frozenset({"heldout", "heldout_rollouts"})
    prompts: In[Prompt]
    rollouts: Out[Rollouts]
    heldout: In[Prompt]
    heldout_rollouts: Out[Rollouts]
    weights: In[Weights]

    def __init__(self, config: Config, *, model: str, sampling: Sampling, heldout_sampling: Sampling) -> None:
        self.config: Generator.Config = config
        self.model = model
        self.sampling = sampling
        self.heldout_sampling = heldout_sampling

    def check(self, say: Say) -> None:
        """Prepare the model; its context must hold `max_model_len` tokens."""
        card = inspect_model(prepare_model(self.model, say=say))
        if card.max_context and self.config.max_model_len > card.max_context:
            what = f"{self.config.max_model_len} tokens, but {self.model} has a context of {card.max_context}"
            raise ConfigError("generator.max_model_len", what, f"lower it to {card.max_context} or less")

    async def run(self, context: Context) -> None:
        """Serve until the prompt edges close."""
        with context.clock.charge(Cause.START):
            directory = await context.compute(prepare_model, self.model)
            engine: GenerationEngine = open_engine(
                self.config.engine,
                config=widen(GenerationConfig, self.config, model=str(directory)),
                where=context.where,
                receiver_index=context.replica,
                **self.config.engine_options,
            )
            await engine.open()
        try:
            await self._serve(context, engine)
        finally:
            await engine.close()

    async def _serve(self, context: Context, engine: GenerationEngine) -> None:
        first = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            updates = tasks.create_task(self._follow_weights(context, engine, first))
            with context.clock.charge(Cause.START):
                await first.wait()
            lanes = [tasks.create_task(self._serve_prompts(context, engine, tasks))]
            if self.heldout.is_connected:
                lanes.append(tasks.create_task(self._serve_heldout(context, engine)))
            await asyncio.gather(*lanes)
            updates.cancel()

    async def _follow_weights(self, context: Context, engine: GenerationEngine, first: asyncio.Event) -> None:
        async for weights in self.weights:
            start_s = context.now()
            report = await engine.update_weights(weights)
            context.version = weights.version
            await self.weights.done(weights)
            first.set()
            context.recorder.record(
                Span(
                    node=context.node,
                    replica=context.replica,
                    name=f"weight update v{weights.version}",
                    start_s=start_s,
                    end_s=context.now(),
                    args={
                        "pause_s": report.pause_s,
                        "transfer_s": report.transfer_s,
                        "canary_mean_gap": report.mean_gap,
                        "canary_max_gap": report.max_gap,
                    },
                )
            )

    async def _serve_prompts(self, context: Context, engine: GenerationEngine, tasks: asyncio.TaskGroup) -> None:
        slots = asyncio.Semaphore(self.config.max_groups)

        async def one(prompt: Prompt) -> None:
            try:
                rollouts = await self._sample(context, engine, prompt, self.sampling, "generate")
                await self.rollouts.put(rollouts)
                context.done += 1
            finally:
                slots.release()

        running: set[asyncio.Task[None]] = set()
        while True:
            await slots.acquire()
            try:
                prompt = await self.prompts.get()
            except ChannelClosed:
                break
            task = tasks.create_task(one(prompt))
            running.add(task)
            task.add_done_callback(running.discard)
        for task in running:  # the edges are closed: nobody waits for what is still in flight
            task.cancel()

    async def _serve_heldout(self, context: Context, engine: GenerationEngine) -> None:
        async with asyncio.TaskGroup() as tasks:
            slots = asyncio.Semaphore(self.config.max_groups)

            async def one(prompt: Prompt) -> None:
                try:
                    sampling = self.heldout_sampling
                    await self.heldout_rollouts.put(await self._sample(context, engine, prompt, sampling, "evaluate"))
                finally:
                    slots.release()

            while True:
                await slots.acquire()
                try:
                    prompt = await self.heldout.get()
                except ChannelClosed:
                    return
                tasks.create_task(one(prompt))

    async def _sample(
        self, context: Context, engine: GenerationEngine, prompt: Prompt, sampling: Sampling, name: str
    ) -> Rollouts:
        start_s = context.now()
        context.running += prompt.num_samples
        try:
            with context.clock.charge(Cause.COMPUTE):
                samples = await engine.generate(
                    request_id=f"{context.where}-{prompt.group_id}",
                    prompt_ids=prompt.token_ids.tolist(),
                    num_samples=prompt.num_samples,
                    seed=prompt.seed,
                    sampling=sampling,
                )
        finally:
            context.running -= prompt.num_samples
        lengths = [len(sample.token_ids) for sample in samples]
        context.recorder.record(
            Span(
                node=context.node,
                replica=context.replica,
                name=name,
                start_s=start_s,
                end_s=context.now(),
                groups=[prompt.group_id] if name == "generate" else [],  # held-out prompts have ids of their own
                args={
                    "tokens": sum(lengths),
                    "samples": len(samples),
                    "prompt_tokens": len(prompt.token_ids),
                    "lengths": lengths,
                },
            )
        )
        return extend(Rollouts, prompt, samples=samples, generator=context.where)
