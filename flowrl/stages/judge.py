"""Judges: a named score for every sample from a language model's verdicts (RLAIF), asked by URL or run here.

`Judge` asks an OpenAI-compatible server, `ModelJudge` a model of its own on a generation engine, whose verdict need not
be written: it is read off its probabilities. By what they judge, in which way and what a score then is stands in
flowrl.rewards.judging. In the row of scorers a judge gives any graph AI feedback:
the reward of PPO and GRPO, the pairs of iterative DPO, the data that graphs/generate.py writes.

Invariants:
- as for `Reward`, a group leaves with exactly one more named score per sample, or is rejected as failed with its input
  on disk;
- an unreadable verdict is counted and is never a score;
- what a server has said stands in the run's directory (`verdicts/`), and a resumed run pays for it once.

What the judge cannot be trusted in is said: verdicts that follow the order, scores that follow the length or contradict
the other scorers or a second judge.

Tests: tests/contracts/test_judges.py
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from flowrl.config import ImportPath, Meta, idle, load_class, widen
from flowrl.data.formats import NormalRow
from flowrl.data.models import prepare_model
from flowrl.data.prompts import load_tokenizer
from flowrl.data.rendering import Renderer
from flowrl.engines.base import GenerationConfig, GenerationEngine, Sampling, open_engine
from flowrl.errors import ConfigError, LastingError, RewardError, number_of
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import PassesOn
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Rollouts, Scored, Weights
from flowrl.rewards.chat import ChatServer, chatting, check_chat
from flowrl.rewards.http import see_listening
from flowrl.rewards.judging import Asked, Judgement, Rubric, correlated, weighed
from flowrl.rewards.verdicts import Verdicts
from flowrl.stages.generator import ANSWERING_VLLM
from flowrl.stages.reward import Failures, add_scores
from flowrl.stages.serving import Served, check_context, serving
from flowrl.telemetry.events import Cause

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say
    from flowrl.rewards.judging import Messages, Tally

VERDICTS = "verdicts"  # directory of a run
REPORT_EVERY = 32  # groups between two lines of what the judge can be trusted in
FEW = 20  # groups, pairs or verdicts that say nothing yet
FOLLOWS_LENGTH = 0.5  # mean correlation of score and length within a group
FOLLOWS_ORDER = 0.3  # share of pairs whose verdict turns with their order
UNREADABLE = 0.05  # share of verdicts
SECOND_AGREES = 0.2  # mean correlation with a second judge


class _Judging(Stage):
    """What judges have in common, whatever their voice is."""

    config: Any
    rollouts: In[Rollouts]
    scored: Out[Scored]
    _second: Judgement | None = None

    def simulated(self, costs: Costs) -> PassesOn:
        """Take the judge's time."""
        return PassesOn("score", lanes=self.config.in_flight)

    async def _score(self, context: Context, judgement: Judgement) -> None:
        """Judge groups until the edge closes."""
        failures = Failures(context, on_error=self.config.on_error)
        watch = _Watch(context, judgement.tally)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.config.in_flight):
                tasks.create_task(self._lane(context, judgement, failures, watch))
        watch.report()

    async def _lane(self, context: Context, judgement: Judgement, failures: Failures, watch: _Watch) -> None:
        name = self.config.name or context.node
        async for group in self.rollouts:
            start_s = context.now()
            try:
                with context.clock.charge(Cause.COMPUTE):
                    scores = await judgement(asked_of(group, self.config.rubric))
            except RewardError as error:
                await failures.give_up(self.rollouts, group, error)
                continue
            failures.forget()
            watch.note(group, scores)
            if self._second is not None and group.group_id % self.config.second_every == 0:
                await watch.ask_second(self._second, asked_of(group, self.config.rubric), scores)
            await self.scored.put(add_scores(group, name, [self.config.weight * score for score in scores]))
            context.done += 1
            context.span("score", start_s, groups=[group.group_id])


class Judge(_Judging):
    """Scores by asking a server that speaks OpenAI's chat completions."""

    simulated = _Judging.simulated

    class Config(StageConfig):
        """Settings of a judge behind a URL."""

        server: ChatServer = ChatServer()
        rubric: Rubric = Rubric()
        name: str = ""  # of the score; "" takes the node's name
        weight: float = 1.0  # the score is multiplied by it
        in_flight: Annotated[int, Meta(ge=1)] = 8  # groups judged at a time
        second: ChatServer = ChatServer()  # another judge, whose agreement with this one is watched; url="": none
        second_every: Annotated[int, Meta(ge=1)] = 16  # groups, of which the second judges one
        on_error: Literal["skip", "stop"] = "stop"  # quarantine a group that cannot be judged, or end the run

    def __init__(self, config: Config) -> None:
        self.config: Judge.Config = config

    def check(self, say: Say) -> None:
        """Check the address and read the principles; asks nothing."""
        check_chat(self.config.server, "judge.server", say)
        if self.config.second.url:
            check_chat(self.config.second, "judge.second", say)
        self.config.rubric.principles("judge.rubric.constitution")
        for line in self.config.rubric.idle_settings():
            say(f"judge.{line}")
        alone = () if self.config.second.url else ("second_every",)
        for line in idle(self.config, alone, "judge", "without judge.second.url"):
            say(line)

    async def run(self, context: Context) -> None:
        """Judge groups until the edge closes."""
        server, second, rubric = self.config.server, self.config.second, self.config.rubric
        async with AsyncExitStack() as stack:
            with context.clock.charge(Cause.START):
                opening = partial(Verdicts, context.run_dir / VERDICTS, context.where, tell=context.notice)
                verdicts = await context.write(opening)
                stack.callback(verdicts.close)
                open_chat = chatting(
                    server, context.where, now=context.now, seed=context.replica, paid=verdicts.paid
                )  # fmt: skip
                chat = await stack.enter_async_context(open_chat)
                await see_listening(server, context.where)
                if second.url:
                    other = chatting(second, f"{context.where}, second", now=context.now)
                    self._second = Judgement(await stack.enter_async_context(other), rubric, context.where)
            who = f"{server.model} {server.max_tokens} {server.temperature}"  # its address may change
            await self._score(context, Judgement(chat, rubric, context.where, verdicts=verdicts, who=who))
            context.notice(f"the judge: {chat.said()}", level="info")


class ModelJudge(_Judging):
    """Scores by a model of its own, which is served as it is."""

    class Config(Served):
        """Settings of a judge that runs here."""

        model: str = ""  # Hugging Face id, local directory or a run's
        rubric: Rubric = Rubric()
        # expected: read off how likely each that may stand is to the model, which writes nothing, so that small models
        # judge, too; written: off what it writes, for models that explain or think first
        verdict: Literal["expected", "written"] = "expected"
        max_tokens: Annotated[int, Meta(ge=1)] = 256  # verdict=written: of one answer of the judge
        name: str = ""  # of the score; "" takes the node's name
        weight: float = 1.0  # the score is multiplied by it
        in_flight: Annotated[int, Meta(ge=1)] = 8  # groups judged at a time
        on_error: Literal["skip", "stop"] = "skip"  # quarantine a group that cannot be judged, or end the run
        engine: ImportPath = ANSWERING_VLLM  # module:Class of the generation engine; verdict=expected: with `among`

    optional = frozenset({"weights"})
    simulated = _Judging.simulated
    weights: In[Weights]

    def __init__(self, config: Config) -> None:
        self.config: ModelJudge.Config = config

    def check(self, say: Say) -> None:
        """Prepare the model, whose template must take a question, and read the principles."""
        check_context(self.config, self.config.model, say, where="model_judge")
        written = self.config.verdict == "written"
        if not written and not hasattr(load_class(self.config.engine, "model_judge.engine"), "among"):
            what = f"is expected, but {self.config.engine} does not say how likely tokens are"
            raise ConfigError("model_judge.verdict", what, "set it to written, or leave out model_judge.engine")
        if written and self.config.max_tokens >= self.config.max_model_len:
            what = (
                f"{self.config.max_tokens} leaves no room for a question in max_model_len={self.config.max_model_len}"
            )
            raise ConfigError("model_judge.max_tokens", what, "lower it, or raise model_judge.max_model_len")
        ModelVoice(self.config, None).prompt_ids([{"role": "user", "content": "?"}])
        self.config.rubric.principles("model_judge.rubric.constitution")
        for line in self.config.rubric.idle_settings():
            say(f"model_judge.{line}")
        unread = () if written else ("max_tokens",)
        for line in idle(self.config, unread, "model_judge", "with verdict=expected, which writes nothing"):
            say(line)

    async def run(self, context: Context) -> None:
        """Judge groups until the edge closes."""
        async with serving(context, self.config, self.weights, model=self.config.model) as engine:
            voice = await context.compute(ModelVoice, self.config, engine)
            weigh = voice.weigh if self.config.verdict == "expected" else None
            await self._score(context, Judgement(voice, self.config.rubric, context.where, weigh=weigh))


@asynccontextmanager
async def model_voice(config: ModelJudge.Config, where: str) -> AsyncIterator[ModelVoice]:
    """Yield a model as a judge's voice outside of a graph; it is closed with the block."""
    served = widen(GenerationConfig, config, model=str(prepare_model(config.model)))
    engine: GenerationEngine = open_engine(config.engine, config=served, where=where, **config.engine_options)
    await engine.open()
    try:
        await engine.serve_loaded()
        yield ModelVoice(config, engine)
    finally:
        await engine.close()


class ModelVoice:
    """A served model as a voice: the likeliest answer to what it is asked, or how likely each of a few is."""

    def __init__(self, config: ModelJudge.Config, engine: Any) -> None:
        self._engine = engine
        self._context = config.max_model_len
        self._sampling = Sampling(max_tokens=config.max_tokens, top_k=1)
        self._tokenizer = load_tokenizer(prepare_model(config.model))
        self._renderer = Renderer(self._tokenizer)
        self._num_asked = 0

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Return a conversation's tokens, with the judge's turn opened."""
        text = self._renderer.prompt_text(NormalRow(place="judge", prompt=[*messages]))
        return self._renderer.prompt_ids(text, is_rendered=True)

    async def __call__(self, messages: Messages) -> str:
        """Return what the model answers.

        Raises:
            RewardError: the question does not fit.
        """
        prompt_ids = self._fitting(messages, self._sampling.max_tokens)
        self._num_asked += 1
        (sample,) = await self._engine.generate(
            request_id=f"judge-{self._num_asked}", prompt_ids=prompt_ids, num_samples=1, seed=0, sampling=self._sampling
        )
        return sample.text

    async def weigh(self, messages: Messages, texts: list[str]) -> list[float]:
        """Return how likely each of the texts is to be said, were it one of them.

        Raises:
            RewardError: the question does not fit.
        """
        said = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        prompt_ids = self._fitting(messages, max(map(len, said)))
        return await weighed(said, lambda before, tokens: self._engine.among([*prompt_ids, *before], tokens))

    def _fitting(self, messages: Messages, num_said: int) -> list[int]:
        prompt_ids, room = self.prompt_ids(messages), self._context - num_said
        if len(prompt_ids) > room:
            what = f"a question of {len(prompt_ids)} tokens, but there is room for {room}"
            raise RewardError("judge", what, "raise max_model_len, or lower rubric.max_chars")
        return prompt_ids


def asked_of(group: Rollouts, rubric: Rubric) -> Asked:
    """Return a group as a judge sees it.

    Raises:
        RewardError: the data has no such `reference_column`.
    """
    reference = ""
    if name := rubric.reference_column:
        if name not in group.columns:
            what = f"the data has no column {name!r}; it has {', '.join(sorted(group.columns)) or 'none'}"
            raise RewardError("judge", what, "name one in rubric.reference_column")
        reference = str(group.columns[name])
    return Asked(text_of(group.columns.get("prompt", "")), [sample.text for sample in group.samples], reference)


def text_of(text: Any) -> str:
    """Return what was asked or answered as one text; of a conversation each message under its role."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return str(text[0].get("content") or "")
    return "\n\n".join(f"[{each.get('role', '')}]\n{each.get('content') or ''}" for each in text)


class _Watch:
    """Says from time to time what a judge can be trusted in, and each fault of its kind once."""

    def __init__(self, context: Context, tally: Tally) -> None:
        self._context = context
        self._tally = tally
        self._num_groups = 0
        self._agreements: list[float] = []  # with the scorers before, by group
        self._seconds: list[float] = []  # with the second judge, by group
        self._num_silent = 0  # groups that the second could not judge
        self._told: set[str] = set()

    def note(self, group: Rollouts, scores: list[float]) -> None:
        """Take note of a group's scores."""
        self._num_groups += 1
        if isinstance(group, Scored):
            agreement = correlated(scores, group.rewards)
            self._agreements = self._agreements[-999:] + ([] if agreement is None else [agreement])
        self._warn()
        if self._num_groups % REPORT_EVERY == 0:
            self.report()

    async def ask_second(self, second: Judgement, asked: Asked, scores: list[float]) -> None:
        """Take note of what another judge says of the same answers; that it fails is counted and no more."""
        try:
            agreement = correlated(scores, await second(asked))
        except (RewardError, LastingError):
            self._num_silent += 1
            return
        self._seconds = self._seconds[-999:] + ([] if agreement is None else [agreement])

    def report(self) -> None:
        """Say how it stands."""
        if self._num_groups:
            agreed = f", agreement with the other scores {_mean(self._agreements):+.2f}" if self._agreements else ""
            agreed += f", with a second judge {_mean(self._seconds):+.2f}" if self._seconds else ""
            agreed += f", which could not judge {number_of(self._num_silent, 'group')}" if self._num_silent else ""
            self._say("info", f"{number_of(self._num_groups, 'group')} judged: {self._tally.said()}{agreed}")

    def _warn(self) -> None:
        tally = self._tally
        if len(tally.longer) >= FEW and (mean := _mean(tally.longer)) > FOLLOWS_LENGTH:
            what = f"scores follow the length of answers (correlation {mean:+.2f} within a group)"
            self._warn_once(f"{what}; say in a principle that length does not count, or add a penalty")
        if tally.pairs >= FEW and (share := tally.flipped / tally.pairs) > FOLLOWS_ORDER:
            what = f"{share:.0%} of the pairs turn with their order, and say little or nothing"
            self._warn_once(f"{what}; take a stronger judge, or rubric.way=points")
        if tally.verdicts >= FEW and tally.unreadable / tally.verdicts > UNREADABLE:
            what = f"{tally.unreadable} of {tally.verdicts} verdicts cannot be read"
            self._warn_once(f"{what}; raise max_tokens, or take a stronger judge")
        if len(self._agreements) >= FEW and (mean := _mean(self._agreements)) < 0:
            what = f"the judge contradicts the other scores (correlation {mean:+.2f} within a group)"
            self._warn_once(f"{what}; one of them is being gamed, or they measure different things")

        if len(self._seconds) >= FEW and (mean := _mean(self._seconds)) < SECOND_AGREES:
            what = f"a second judge orders the answers otherwise (correlation {mean:+.2f} within a group)"
            self._warn_once(f"{what}; the policy may please this judge alone: read samples, or let the two take turns")

    def _warn_once(self, text: str) -> None:
        kind = text.rpartition(";")[2]
        if kind not in self._told:
            self._told.add(kind)
            self._say("warning", text)

    def _say(self, level: str, text: str) -> None:
        context = self._context
        context.notice(text, level=level)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
