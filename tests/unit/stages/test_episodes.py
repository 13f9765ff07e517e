"""Episodes by hand: which tokens are the policy's, where rewards lie, and where an episode is cut."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.data.turns import TurnFormat
from flowrl.errors import RewardError
from flowrl.messages import Buffer, Prompt, Sample, VersionSpan
from flowrl.rewards.environments import Observed
from flowrl.stages.agent import Limits, play
from flowrl.telemetry.records import token_versions
from tests.support.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

TOKENIZER = tiny_tokenizer()
END: Any = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
TURNS = TurnFormat(TOKENIZER, role="user")
PROMPT = Prompt(group_id=7, token_ids=Buffer.ints([9]), columns={"answer": "8"}, num_samples=2, seed=100)


def tokens(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


BETWEEN = len(TURNS.between([END], "no"))


@dataclass
class Scripted:
    """An environment and an engine that say what they are told to."""

    says: list[str]  # the policy's turns
    answers: list[tuple[str, float, bool]]
    first: Any = "go"
    asked: list[tuple[list[int], int, int]] = field(default_factory=list)  # prompt, seed, max_tokens
    heard: list[str] = field(default_factory=list)

    async def reset(self, task: dict[str, Any], seed: int) -> Observed:
        assert (task, seed) == (PROMPT.columns, PROMPT.seed)
        return Observed(messages=self.first) if isinstance(self.first, list) else Observed(observation=self.first)

    async def step(self, action: str) -> Observed:
        self.heard.append(action)
        observation, reward, done = self.answers[len(self.heard) - 1]
        return Observed(observation=observation, reward=reward, done=done)

    async def generate(self, prompt_ids: Sequence[int], *, seed: int, max_tokens: int) -> Sample:
        number = len(self.asked)
        self.asked.append((list(prompt_ids), seed, max_tokens))
        text = self.says[number]
        ids = [*tokens(text), END][:max_tokens]
        half = len(ids) // 2
        return Sample(
            token_ids=Buffer.ints(ids),
            logprobs=Buffer.floats([-1.0 - number] * len(ids)),
            versions=[VersionSpan(number, 0, half), VersionSpan(number + 1, half, len(ids))],
            finish="stop" if ids[-1] == END else "length",
            text=text[:max_tokens],
        )

    def play(self, **limits: Any) -> Any:
        bounds = {"max_turns": 9, "turn_tokens": 50, "total_tokens": 0, "context_tokens": 500, **limits}
        return asyncio.run(
            play(PROMPT, 1, episode=self, turns=TURNS, generate=self.generate, limits=Limits(**bounds), where="agent.0")  # type: ignore[arg-type]
        )


def test_an_episode_of_two_turns_by_hand():
    script = Scripted(["abc", "de"], [("no", 0.25, False), ("", 1.0, True)])
    played = script.play()
    between = tokens("\n<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\n")
    sample, n = played.sample, len(between)
    assert sample.token_ids.tolist() == [*tokens("abc"), END, *between, *tokens("de"), END]
    assert sample.mask is not None
    assert sample.mask.tolist() == [1] * 4 + [0] * n + [1] * 3
    assert sample.logprobs.tolist() == [-1] * 4 + [0] * n + [-2] * 3
    assert token_versions(sample) == [0, 0, 1, 1] + [-1] * n + [1, 2, 2]
    assert played.placed.tolist() == [0, 0, 0, 0.25] + [0] * n + [0, 0, 1]
    assert (played.reward, sample.finish, sample.num_sampled, sample.oldest_version) == (1.25, "stop", 7, 0)
    assert script.heard == ["abc", "de"]


def test_each_turn_goes_on_from_the_sampled_tokens_with_a_seed_of_its_own():
    script = Scripted(["a", "b", "c"], [("x", 0, False), ("y", 0, False), ("", 0, True)])
    played = script.play()
    whole = [*played.prompt_ids, *played.sample.token_ids.tolist()]
    assert whole[: len(played.prompt_ids)] == TURNS.first("go", where="")
    assert all(whole[: len(prompt)] == prompt for prompt, _, _ in script.asked)
    seeds = [seed for _, seed, _ in script.asked]
    assert seeds[0] == 101, "the first turn is drawn as a generator would"
    assert len(set(seeds)) == 3


def test_turns_are_limited():
    played = Scripted(["a"] * 5, [("more", 0.0, False)] * 5).play(max_turns=2)
    assert played.sample.finish == "length"
    assert played.sample.num_sampled == 4
    assert played.sample.token_ids.tolist()[-1] == END, "nothing of the environment's stands at the end"


def test_a_turn_has_its_own_budget_and_is_ended_for_it():
    played = Scripted(["abcdef", "g"], [("no", 0.0, False), ("", 1.0, True)]).play(turn_tokens=3)
    ids = played.sample.token_ids.tolist()
    assert ids[:4] == [*tokens("abc"), END]
    assert played.sample.mask.tolist()[:4] == [1, 1, 1, 0], "its end is not the policy's token"


@pytest.mark.parametrize(("room", "num_turns"), [(4, 1), (4 + BETWEEN, 1), (4 + BETWEEN + 1, 2), (500, 3)])
def test_an_episode_has_a_budget_in_all(room: int, num_turns: int):
    script = Scripted(["abc"] * 3, [("no", 0.5, False)] * 2 + [("", 0.5, True)])
    played = script.play(total_tokens=room)
    assert len(script.asked) == num_turns
    assert len(played.sample.token_ids) <= room
    assert played.reward == 0.5 * num_turns, "what was earned stays"
    assert played.sample.finish == ("stop" if num_turns == 3 else "length")


def test_the_context_bounds_prompt_and_episode_together():
    prompt = len(TURNS.first("go", where=""))
    script = Scripted(["abcdef"], [("no", 0.0, False)])
    assert len(script.play(context_tokens=prompt + 2).sample.token_ids) == 2
    with pytest.raises(RewardError, match=f"the first observation has {prompt} tokens, max_model_len is {prompt}"):
        script.play(context_tokens=prompt)


def test_a_conversation_that_cannot_be_rendered_is_the_environment_s_failure():
    bad = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "gone"}]
    with pytest.raises(RewardError, match="is the assistant's"):
        Scripted(["a"], [("", 0.0, True)], first=bad).play()
