"""Generator: samples responses, many groups at a time, under the newest weights it has proved.

Invariants:
- every token carries the version that sampled it;
- what serving.py says of weights and backpressure.

Held-out prompts take the same path to their own port. Replicas compete for prompts.

Tests: tests/contracts/test_synchronous.py
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from flowrl.config import Meta, load_class
from flowrl.engines.base import GenerationEngine
from flowrl.errors import ConfigError
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import Itself
from flowrl.graph.stage import Stage
from flowrl.messages import Buffer, Inquiry, Prompt, Rollouts, Sample, VersionSpan, Weights, extend
from flowrl.stages.asking import LIKELIEST
from flowrl.stages.sampler import Sampler
from flowrl.stages.serving import Generation, check_context, record_generation, serve_each, serving
from flowrl.telemetry.events import Cause

if TYPE_CHECKING:
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say

VLLM = "flowrl.engines.vllm:VllmEngine"
ANSWERING_VLLM = "flowrl.engines.vllm_answers:AnsweringVllm"


class Generator(Stage):
    """Samples responses with a generation engine."""

    class Config(Generation):
        """Settings of the generator node."""

        # samples of each prompt that are begun besides; the slowest are given up once group_size have ended, which
        # favours short answers
        spare_samples: Annotated[int, Meta(ge=0)] = 0

    optional = frozenset({"heldout", "heldout_rollouts", "weights"})
    together = (frozenset({"heldout", "heldout_rollouts"}),)
    prompts: In[Prompt]
    rollouts: Out[Rollouts]
    heldout: In[Prompt]
    heldout_rollouts: Out[Rollouts]
    weights: In[Weights]

    def __init__(self, config: Config, sampler: Sampler) -> None:
        self.config: Generator.Config = config
        self.sampler = sampler

    @property
    def served(self) -> Generation:
        """Return the settings with the engine that is opened."""
        return self.config

    def check(self, say: Say) -> None:
        """Prepare the model; its context must hold `max_model_len` tokens."""
        self.sampler.check_node(self.config, "generator")
        if num_spare := self.config.spare_samples:
            self._check_spare()
            drawn = f"the {num_spare} slowest of {self.config.group_size + num_spare} answers"
            say(f"generator.spare_samples: {drawn} to a prompt are given up, which favours short ones")
        check_context(self.served, self.sampler.model, say, where="generator", sampler=self.sampler)

    def _check_spare(self) -> None:
        """Insist that the engine takes spare samples."""
        path = self.config.engine
        if "num_spare" not in inspect.signature(load_class(path, "generator.engine").generate).parameters:
            raise ConfigError(
                "generator.spare_samples", f"{path} draws none", "set it to 0, or take num_spare in `generate`"
            )

    def simulated(self, costs: Costs) -> Itself:
        """Sample zeros."""
        return Itself({"config": costs.generating(self.config), "sampler": costs.sampler(self.sampler)})

    async def run(self, context: Context) -> None:
        """Serve until the prompt edges close."""

        async def train(prompt: Prompt) -> None:
            rollouts = await self._sample(context, engine, prompt, "generate", num_spare=self.config.spare_samples)
            if self.sampler.greedy:
                rollouts = await self._with_greedy(context, engine, rollouts)
            await self.rollouts.put(rollouts)
            context.done += 1

        async def evaluate(prompt: Prompt) -> None:
            await self.heldout_rollouts.put(await self._examine(context, engine, prompt))

        async with serving(context, self.served, self.weights, self.sampler) as engine:
            lanes = (self.prompts, train), (self.heldout, evaluate)
            await serve_each(*lanes, max_groups=self.config.max_groups)

    async def _examine(self, context: Context, engine: GenerationEngine, prompt: Prompt) -> Rollouts:
        return await self._sample(context, engine, prompt, "evaluate")

    async def _with_greedy(self, context: Context, engine: GenerationEngine, rollouts: Rollouts) -> Rollouts:
        """Return the group with the likeliest response behind its samples."""
        with context.clock.charge(Cause.COMPUTE):
            greedy = await engine.generate(
                request_id=f"{context.where}-{rollouts.group_id}-greedy",
                prompt_ids=rollouts.token_ids.tolist(),
                num_samples=1,
                seed=rollouts.seed,
                sampling=msgspec.structs.replace(self.sampler.sampling, top_k=1, top_p=1.0),
            )
        return msgspec.structs.replace(rollouts, samples=[*rollouts.samples, *greedy], num_greedy=1)

    async def _sample(
        self, context: Context, engine: GenerationEngine, prompt: Prompt, name: str, *, num_spare: int = 0
    ) -> Rollouts:
        start_s, drawn = context.now(), prompt.num_samples + num_spare
        spare = {"num_spare": num_spare} if num_spare else {}
        context.running += drawn
        try:
            with context.clock.charge(Cause.COMPUTE):
                samples = await engine.generate(
                    request_id=f"{context.where}-{prompt.group_id}",
                    prompt_ids=prompt.token_ids.tolist(),
                    num_samples=prompt.num_samples,
                    seed=prompt.seed,
                    sampling=self.sampler.sampling,
                    **spare,
                )
        finally:
            context.running -= drawn
        record_generation(context, prompt, samples, start_s, name)
        return extend(Rollouts, prompt, samples=samples, num_given_up=num_spare, generator=context.where)


class Examiner(Generator):
    """A generator that samples held-out prompts alone, under the version that it was sent last.

    Where benchmarks are asked (`answers`), its engine scores tokens and completes texts besides (vllm_answers.py).
    """

    optional = frozenset({"prompts", "rollouts", "weights"})
    simulated = Generator.simulated

    def __init__(self, config: Generator.Config, sampler: Sampler, *, answers: bool = False) -> None:
        super().__init__(config, sampler)
        self.answers = answers

    @property
    def served(self) -> Generation:
        """Return the settings with an engine that answers, where it has to and may be exchanged."""
        is_exchanged = self.answers and self.config.engine == VLLM
        return msgspec.structs.replace(self.config, engine=ANSWERING_VLLM) if is_exchanged else self.config

    def check(self, say: Say) -> None:
        """Prepare the model, and insist on an engine that answers what is asked."""
        super().check(say)
        engine = load_class(self.served.engine, "generator.engine")
        if self.answers and not (hasattr(engine, "score") and hasattr(engine, "complete")):
            what = f"needs an engine that scores tokens, and {self.config.engine} does not"
            raise ConfigError("evaluation.tasks", what, f"leave generator.engine to {VLLM}")

    async def _examine(self, context: Context, engine: GenerationEngine, prompt: Prompt) -> Rollouts:
        if not isinstance(prompt, Inquiry):
            return await super()._examine(context, engine, prompt)
        answering: Any = engine
        before, token_ids = context.version, prompt.token_ids.tolist()
        found: dict[str, Any]
        with context.clock.charge(Cause.COMPUTE):
            if prompt.is_scored:
                logprobs, likeliest = await answering.score(token_ids)
                columns = {LIKELIEST: Buffer.floats([float(each) for each in likeliest])}
                found = {"token_ids": prompt.token_ids, "logprobs": Buffer.floats(logprobs), "columns": columns}
            else:
                said = await answering.complete(token_ids, until=prompt.until, **prompt.sampling)
                found = {"token_ids": Buffer.ints(said), "logprobs": Buffer.floats([])}
        spans = [VersionSpan(version, 0, 0) for version in sorted({before, context.version})]
        sample = Sample(versions=spans, finish="stop", text="", **found)
        known = {name: getattr(prompt, name) for name in Prompt.__struct_fields__}
        return Rollouts(**known, samples=[sample], generator=context.where)
