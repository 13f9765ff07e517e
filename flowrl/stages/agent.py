"""Agent: plays episodes of several turns with an environment, in place of a generator and a reward function.

The episodes of many groups run at once, each turn a request of its own, so the engine batches whatever turns are open;
new weights arrive in the middle of episodes as they do in the middle of responses, and every token knows its version.

Invariants:
- a group leaves as complete episodes with the environment's score, or is rejected as failed with its task kept on disk;
- all samples of a group begin with the same observation.

User code runs in worker processes, never in the engine's. Held-out prompts are played alike. Replicas compete for
prompts.

In an episode the policy's tokens stand as the engine sampled them, with their log-probs and versions; the environment's
are under mask 0, log-prob 0 and in no version's span. It ends with the policy's last token, and a turn's reward lies on
its last token.

Tests: tests/unit/stages/test_agent.py
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Protocol

import msgspec

from flowrl.config import Count, ImportPath, Meta
from flowrl.data.models import prepare_model
from flowrl.data.prompts import load_tokenizer, rows_alike
from flowrl.data.turns import TurnFormat
from flowrl.engines.base import GenerationEngine, Sampling
from flowrl.errors import ConfigError, DataError, RewardError
from flowrl.graph.ports import In, Out
from flowrl.graph.stage import Stage
from flowrl.messages import Buffer, Prompt, Routes, Sample, Scored, VersionSpan, Weights, extend
from flowrl.rewards.environments import Reset, StepRequest
from flowrl.rewards.function import MADE
from flowrl.rewards.isolated import check_loads, untaken
from flowrl.rewards.sessions import IsolatedEnvironments, LocalEnvironments, Lost
from flowrl.rewards.worker import Playing
from flowrl.stages.reward import Failures
from flowrl.stages.sampler import Sampler
from flowrl.stages.serving import Generation, check_context, record_generation, serve_each, serving
from flowrl.telemetry.events import Cause

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.graph.stage import Context, Say
    from flowrl.rewards.sessions import Episode


# Added to a sample's seed from turn to turn: odd and large, so that turns meet no other sample's seeds.
TURN_STRIDE = 0x9E3779B97F4A7C15
SEEDS = 1 << 62  # seeds are below it


class Generate(Protocol):
    """Sample one turn of at most `max_tokens` tokens."""

    async def __call__(self, prompt_ids: Sequence[int], *, seed: int, max_tokens: int) -> Sample: ...


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Where an episode is cut."""

    max_turns: int
    turn_tokens: int  # sampled in one turn
    total_tokens: int  # behind the prompt, the environment's included; 0: only what the context leaves
    context_tokens: int  # prompt and episode together


class Played(NamedTuple):
    """An episode as it is learned."""

    prompt_ids: list[int]
    sample: Sample
    placed: Buffer  # float32, each turn's reward on its last token
    reward: float  # their sum


class Transcript:
    """What an episode adds to its prompt so far."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._mask: list[float] = []
        self._rewards: list[float] = []
        self._spans: list[VersionSpan] = []
        self._routes: Routes | None = None  # of the last turn, whose prompt was all before it

    def add_turn(self, turn: Sample, reward: float) -> None:
        """Add what the policy sampled and what it earned."""
        start = len(self.token_ids)
        self.token_ids += turn.token_ids.tolist()
        self._logprobs += turn.logprobs.tolist()
        self._mask += [1.0] * len(turn.token_ids)
        self._rewards += [*[0.0] * (len(turn.token_ids) - 1), reward]
        self._spans += [VersionSpan(span.version, start + span.start, start + span.end) for span in turn.versions]
        self._routes = turn.routes

    def add_environment(self, token_ids: Sequence[int]) -> None:
        """Add what stands between two turns."""
        self.token_ids += token_ids
        for column in (self._logprobs, self._mask, self._rewards):
            column += [0.0] * len(token_ids)

    def played(self, prompt_ids: list[int], *, finish: str, text: str) -> Played:
        """Return the episode."""
        sample = Sample(
            token_ids=Buffer.ints(self.token_ids),
            logprobs=Buffer.floats(self._logprobs),
            versions=self._spans,
            finish=finish,
            text=text,
            mask=Buffer.floats(self._mask),
            routes=self._routes,
        )
        return Played(prompt_ids, sample, Buffer.floats(self._rewards), sum(self._rewards))


async def play(
    prompt: Prompt, place: int, *, episode: Episode, turns: TurnFormat, generate: Generate, limits: Limits, where: str
) -> Played:
    """Play sample `place` of a prompt's group to its end.

    Raises:
        RewardError: the environment failed, or its first observation cannot be rendered or leaves no room.
    """
    observed = await episode.reset(prompt.columns, prompt.seed)
    try:
        prompt_ids = turns.first([*observed.messages] or observed.observation, where=where)
    except DataError as error:
        raise RewardError(where, f"reset: {error.what}", error.remedy) from error
    room = limits.context_tokens - len(prompt_ids)
    if room < 1:
        what = f"the first observation has {len(prompt_ids)} tokens, max_model_len is {limits.context_tokens}"
        raise RewardError(where, what, "shorten it or raise max_model_len")
    room = min(room, limits.total_tokens or room)
    transcript = Transcript()
    for number in range(limits.max_turns):
        left = room - len(transcript.token_ids)
        seed = (prompt.seed + place + number * TURN_STRIDE) % SEEDS
        turn = await generate([*prompt_ids, *transcript.token_ids], seed=seed, max_tokens=min(limits.turn_tokens, left))
        observed = await episode.step(turn.text)
        transcript.add_turn(turn, observed.reward)
        if observed.done:
            break
        between = turns.between(turn.token_ids.tolist(), observed.observation)
        if number + 1 == limits.max_turns or len(transcript.token_ids) + len(between) >= room:
            break
        transcript.add_environment(between)
    finish = "stop" if observed.done else "length"
    return transcript.played(prompt_ids, finish=finish, text=turns.text(transcript.token_ids))


class Agent(Stage):
    """Plays an environment with a generation engine."""

    class Config(Generation):
        """Settings of the agent node; `sampling.max_tokens` is what one turn may have."""

        environment: ImportPath = "flowrl.rewards.hints:HintedNumber"  # module:Class, see flowrl.rewards.environments
        environment_options: dict[str, Any] = {}  # of its constructor
        max_turns: Annotated[int, Meta(ge=1)] = 4  # turns of the policy in one episode
        max_tokens: Annotated[int, Meta(ge=0)] = 0  # of an episode, the environment's included; 0: what fits
        role: str = "user"  # of the messages that observations become
        turn_prefix: str = ""  # begins each turn of the policy; what is sampled continues it
        name: str = ""  # of the score; "" takes the environment's class name
        timeout_s: Annotated[float, Meta(gt=0)] = 60.0  # for one call of the environment
        retries: Annotated[int, Meta(ge=0)] = 1  # plays after the first that failed, for each episode
        on_error: Literal["skip", "stop"] = "skip"  # after the retries: quarantine the group, or end the run
        # In worker processes, which are killed when they take too long; or in this process, where they are not.
        isolation: Literal["process", "thread"] = "process"
        concurrency: Count = 2  # worker processes of one replica, each with many episodes
        memory_bytes: Annotated[int, Meta(ge=0)] = 0  # address space of each worker process; 0: no limit
        start_timeout_s: Annotated[float, Meta(gt=0)] = 120.0  # for a worker process to import the environment

        def __post_init__(self) -> None:
            if self.isolation == "thread" and self.memory_bytes:
                raise ConfigError("agent.memory_bytes", "limits a process", "set isolation=process, or memory_bytes=0")

    optional = frozenset({"heldout", "heldout_rollouts", "weights"})
    together = (frozenset({"heldout", "heldout_rollouts"}),)
    prompts: In[Prompt]
    rollouts: Out[Scored]
    heldout: In[Prompt]
    heldout_rollouts: Out[Scored]
    weights: In[Weights]

    def __init__(self, config: Config, sampler: Sampler) -> None:
        self.config: Agent.Config = config
        self.sampler = sampler

    def check(self, say: Say) -> None:
        """Prepare the model, try its chat template turn by turn, and the environment where it will run."""
        self.sampler.check_node(self.config, "agent")
        check_context(self.config, self.sampler.model, say, where="agent", sampler=self.sampler)
        self._turns()
        self._try(self._playing("agent.environment"))

    def _try(self, playing: Playing) -> None:
        """Load the environment, and begin an episode on a row of each kind and act in it once."""
        kinds = [rows for source in rows_alike(self.sampler.data) for rows in source]
        if self.config.isolation == "process":
            asked: list[tuple[str, Reset | StepRequest]] = []
            for number, rows in enumerate(kinds):
                begin = Reset(episode=number, name="check", task=rows.columns, seed=0)
                asked += [(str(rows), begin), (str(rows), StepRequest(episode=number, action=MADE[0]))]
            check_loads(playing, asked, timeout_s=self.config.start_timeout_s)
            return
        environments = LocalEnvironments(playing)

        async def played(task: dict[str, Any]) -> None:
            async with environments.episode("check") as episode:
                await episode.reset(task, 0)
                await episode.step(MADE[0])

        for rows in kinds:
            try:
                asyncio.run(played(rows.columns))
            except RewardError as error:
                raise untaken(playing.path, playing.where, str(rows), error.what, error.remedy) from error

    async def run(self, context: Context) -> None:
        """Play until the prompt edges close."""
        with context.clock.charge(Cause.START):
            turns = await context.compute(self._turns)
        failures = Failures(context, on_error=self.config.on_error)

        async def train(prompt: Prompt) -> None:
            try:
                scored = await group(prompt, "generate")
            except RewardError as error:
                await failures.give_up(self.prompts, prompt, error)
                return
            failures.forget()
            await self.rollouts.put(scored)
            context.done += 1

        async def evaluate(prompt: Prompt) -> None:
            await self.heldout_rollouts.put(await group(prompt, "evaluate"))

        async def group(prompt: Prompt, name: str) -> Scored:
            table = _Table(self.config, context, engine, environments, turns, self.sampler.sampling)
            return await table.play(prompt, name)

        async with (
            self._environments(context) as environments,
            serving(context, self.config, self.weights, self.sampler) as engine,
        ):
            await serve_each((self.prompts, train), (self.heldout, evaluate), max_groups=self.config.max_groups)

    def _turns(self) -> TurnFormat:
        data = self.sampler.data
        tokenizer = load_tokenizer(prepare_model(self.sampler.model))
        role, prefix = self.config.role, self.config.turn_prefix
        return TurnFormat(tokenizer, role=role, prefix=prefix, system_prompt=data.system_prompt, day=data.date)

    def _environments(self, context: Context) -> IsolatedEnvironments | LocalEnvironments:
        playing = self._playing(context.where)
        if self.config.isolation == "thread":
            return LocalEnvironments(playing)
        return IsolatedEnvironments(
            playing,
            num_workers=self.config.concurrency,
            log=context.run_dir / "logs" / f"{context.where}.environment.log",
            start_timeout_s=self.config.start_timeout_s,
        )

    def _playing(self, where: str) -> Playing:
        config = self.config
        limits: dict[str, Any] = {"timeout_s": config.timeout_s, "memory_bytes": config.memory_bytes}
        options = config.environment_options
        return Playing(environment=config.environment, where=where, options=options, **limits)


class _Table:
    """What it takes to play the groups of one kind."""

    def __init__(
        self,
        config: Agent.Config,
        context: Context,
        engine: GenerationEngine,
        environments: IsolatedEnvironments | LocalEnvironments,
        turns: TurnFormat,
        sampling: Sampling,
    ) -> None:
        self._config = config
        self._context = context
        self._engine = engine
        self._environments = environments
        self._turns = turns
        self._sampling = sampling
        self._limits = Limits(
            max_turns=config.max_turns,
            turn_tokens=sampling.max_tokens,
            total_tokens=config.max_tokens,
            context_tokens=config.max_model_len,
        )

    async def play(self, prompt: Prompt, name: str) -> Scored:
        """Play the samples of a group at once; once one has failed, none is begun again.

        Raises:
            RewardError: the environment failed in one of them after all retries, or they begin differently.
        """
        context, start_s = self._context, self._context.now()
        failures: list[RewardError] = []
        context.running += prompt.num_samples
        try:
            with context.clock.charge(Cause.COMPUTE):
                async with asyncio.TaskGroup() as tasks:
                    places = range(prompt.num_samples)
                    playing = [tasks.create_task(self._episode(prompt, place, failures)) for place in places]
        finally:
            context.running -= prompt.num_samples
        if failures:
            raise failures[0]
        played = [each for task in playing if (each := task.result()) is not None]
        return self._scored(prompt, played, start_s, name)

    async def _episode(self, prompt: Prompt, place: int, failures: list[RewardError]) -> Played | None:
        """Play one sample, or note why it cannot be played."""
        name = f"group {prompt.group_id}, sample {place}"
        where = f"{self._context.where} ({self._config.environment}), {name}"

        async def generate(prompt_ids: Sequence[int], *, seed: int, max_tokens: int) -> Sample:
            (sample,) = await self._engine.generate(
                request_id=f"{self._context.where}-{prompt.group_id}.{place}",
                prompt_ids=prompt_ids,
                num_samples=1,
                seed=seed,
                sampling=msgspec.structs.replace(self._sampling, max_tokens=max_tokens),
            )
            return sample

        num_failed = 0
        while not failures:
            try:
                async with self._environments.episode(name) as episode:
                    return await play(prompt, place, episode=episode, turns=self._turns, generate=generate,
                                      limits=self._limits, where=where)  # fmt: skip
            except Lost:
                continue
            except RewardError as error:
                num_failed += 1
                if num_failed > self._config.retries:
                    failures.append(error)
        return None

    def _scored(self, prompt: Prompt, played: list[Played], start_s: float, name: str) -> Scored:
        first = played[0].prompt_ids
        for place, each in enumerate(played):
            if each.prompt_ids != first:
                what = f"samples 0 and {place} of group {prompt.group_id} begin with different observations"
                remedy = "let reset draw from its seed alone"
                raise RewardError(f"{self._context.where} ({self._config.environment})", what, remedy)
        asked = msgspec.structs.replace(prompt, token_ids=Buffer.ints(first))
        samples = [each.sample for each in played]
        record_generation(self._context, asked, samples, start_s, name)
        score = self._config.name or self._config.environment.rpartition(":")[2]
        return extend(
            Scored,
            asked,
            samples=samples,
            generator=self._context.where,
            scores={score: [each.reward for each in played]},
            placed=[each.placed for each in played],
        )
