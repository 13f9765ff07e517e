"""Episodes: one policy and one environment in turn, token by token, until the environment or a limit ends it.

Invariants: the policy's tokens stand in the episode as the engine sampled them, with their log-probs and versions; the
environment's are under mask 0, log-prob 0 and in no version's span; an episode ends with the policy's last token; a
turn's reward lies on its last token. Called by the agent stage.

Tests: tests/unit/stages/test_episodes.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from flowrl.errors import DataError, RewardError
from flowrl.messages import Buffer, Sample, VersionSpan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.data.turns import TurnFormat
    from flowrl.messages import Prompt
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

    def add_turn(self, turn: Sample, reward: float) -> None:
        """Add what the policy sampled and what it earned."""
        start = len(self.token_ids)
        self.token_ids += turn.token_ids.tolist()
        self._logprobs += turn.logprobs.tolist()
        self._mask += [1.0] * len(turn.token_ids)
        self._rewards += [*[0.0] * (len(turn.token_ids) - 1), reward]
        self._spans += [VersionSpan(span.version, start + span.start, start + span.end) for span in turn.versions]

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
