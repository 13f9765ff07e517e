"""Process rewards: where steps end, what each earns, and that it lands on the token that ends it."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from flowrl.config import Select
from flowrl.data.steps import StepFinder
from flowrl.errors import RewardError
from flowrl.messages import Buffer, Referenced, Rollouts, Sample, VersionSpan, extend
from flowrl.simulation.stand_ins import stand_in_model
from flowrl.stages.estimation import group_fields, load_algorithm
from flowrl.stages.reward import RewardModel
from flowrl.stages.sampler import Sampler
from tests.support.one_stage import rollouts, run_alone
from tests.support.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.engines.base import TokenGroup

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def tokens(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("ab\ncd\n", [2, 5]),  # each at its separator
        ("ab\ncd", [2, 4]),  # the last at its last token of text
        ("ab\ncd \n", [2, 6]),
        ("\n\nab\n\n\ncd\n", [4, 9]),  # what says nothing is no step
        ("ab", [1]),
        (" \n ", [2]),  # one there must be
    ],
)
def test_a_step_ends_where_its_separator_does(text: str, ends: list[int]):
    ids = tokens(text)
    assert StepFinder(TOKENIZER, "\n").ends(ids, [1.0] * len(ids)) == ends


def test_the_end_of_turn_is_no_step_of_its_own():
    ids = [*tokens("ab\ncd"), END]
    assert StepFinder(TOKENIZER, "\n").ends(ids, [1.0] * len(ids)) == [2, 4]
    ids = [*tokens("ab\n"), END]
    assert StepFinder(TOKENIZER, "\n").ends(ids, [1.0] * len(ids)) == [2]


def test_a_separator_may_span_tokens():
    ids = tokens("a\nb\n\nc\n\n")
    assert StepFinder(TOKENIZER, "\n\n").ends(ids, [1.0] * len(ids)) == [4, 7]


@pytest.mark.parametrize(
    ("text", "separator", "num_steps"),
    [
        ("第一步。第二步。第三步", "。", 3),
        ("ab ки\ncd ки\n", "ки", 2),
        ("a<|im_start|>b<|im_start|>", "<|im_start|>", 2),
    ],
)
def test_a_separator_may_be_several_bytes_or_a_special_token(text: str, separator: str, num_steps: int):
    ids = [*tokens(text), END]
    ends = StepFinder(TOKENIZER, separator).ends(ids, [1.0] * len(ids))
    assert len(ends) == num_steps
    assert [cast("str", TOKENIZER.decode(ids[: end + 1])).endswith(separator) for end in ends[:-1]] == [True] * (
        num_steps - 1
    )


def test_bytes_that_are_no_character_hide_no_separator():
    ids = [*tokens("第")[:1], *tokens("a\nb\n"), END]
    assert StepFinder(TOKENIZER, "\n").ends(ids, [1.0] * len(ids)) == [2, 4]


def test_only_the_policy_s_tokens_end_a_step_and_each_turn_ends_one():
    ids = [*tokens("ab"), END, *tokens("no\nno\n"), *tokens("c\nd"), END]
    mask = [1.0] * 3 + [0.0] * 6 + [1.0] * 4
    assert StepFinder(TOKENIZER, "\n").ends(ids, mask) == [1, 10, 11]


class FakeValues:
    """A process reward model whose value after token t is `scale` times t."""

    def __init__(self, *, config: Any, where: str, scale: float = 1.0) -> None:
        self.scale = scale

    def open(self) -> None: ...

    def score(self, groups: list[TokenGroup]) -> list[list[Any]]:
        rows = [[np.arange(len(response), dtype=np.float32) for response in group.responses] for group in groups]
        return [[self.scale * row for row in group] for group in rows]

    def close(self) -> None: ...


def group(*texts: str) -> Rollouts:
    given = rollouts(*texts)
    samples = [
        Sample(token_ids=Buffer.ints(tokens(text)), logprobs=Buffer.floats([-1.0] * len(tokens(text))),
               versions=[VersionSpan(0, 0, len(tokens(text)))], finish="stop", text=text)
        for text in texts
    ]  # fmt: skip
    return extend(Rollouts, given, samples=samples)


def scored(tmp_path: Path, given: Any, *, node: str = "judge", scale: float = 1.0, **settings: Any) -> Any:
    model = tmp_path / "model"
    if not model.exists():
        shutil.copytree(stand_in_model(), model)
        TOKENIZER.save_pretrained(model)
    config = RewardModel.Config(
        engine=f"{__name__}:FakeValues", engine_options={"scale": scale}, level="step", **settings
    )
    return run_alone(RewardModel(config, Sampler(model=str(model))), [given], tmp_path, node=node).put[0]


def p(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def test_each_step_earns_its_probability_at_its_last_token(tmp_path: Path):
    found = scored(tmp_path, group("ab\nc\n", "d\n"), weight=2.0, step_total="sum")
    assert found.scores["judge"] == pytest.approx([2 * p(2) + 2 * p(4), 2 * p(1)])
    assert found.placed[0].tolist() == pytest.approx([0, 0, 2 * p(2), 0, 2 * p(4)])
    assert found.placed[1].tolist() == pytest.approx([0, 2 * p(1)])


def test_with_the_mean_more_steps_earn_no_more(tmp_path: Path):
    found = scored(tmp_path, group("a\nb\nc\n", "d\n"), scale=0.0)
    assert found.scores["judge"] == pytest.approx([0.5, 0.5])
    assert found.placed[0].tolist() == pytest.approx([0, 0.5 / 3, 0, 0.5 / 3, 0, 0.5 / 3])


def test_two_process_models_in_a_row_place_both_their_rewards(tmp_path: Path):
    first = scored(tmp_path, group("a\nb\n"), scale=0.0, step_total="sum")
    second = scored(tmp_path, first, node="strict", scale=0.0, step_total="sum", weight=-0.5)
    assert second.rewards == pytest.approx([0.5])
    assert second.placed[0].tolist() == pytest.approx([0.0, 0.25, 0.0, 0.25])


def test_ppo_sees_each_step_s_reward_where_it_was_earned(tmp_path: Path):
    """lam 0 and gamma 1: A_t = r_t + V_next - V_t, so with values of 0 the advantages are the rewards themselves."""
    found = scored(tmp_path, group("a\nb", "c\n"), scale=0.0, step_total="sum")
    logprobs = [sample.logprobs for sample in found.samples]
    referenced = extend(Referenced, found, ref_logprobs=logprobs)
    algorithm = load_algorithm(
        Select(use="flowrl.algorithms.ppo:PPO", options={"lam": 0.0}), group_size=2, has_critic=True
    )
    values = [np.zeros(len(row), dtype=np.float32) for row in logprobs]
    credited = group_fields(algorithm, referenced, values)
    assert [row.tolist() for row in credited["advantages"]] == [[0.0, 0.5, 0.5], [0.0, 0.5]]
    assert [row.tolist() for row in credited["returns"]] == [[0.0, 0.5, 0.5], [0.0, 0.5]]


def test_a_step_that_scores_no_number_ends_the_run(tmp_path: Path):
    with pytest.raises(RewardError, match="scored a sample of group 7 nan"):
        scored(tmp_path, group("a\n"), scale=float("nan"))


@pytest.mark.slow
def test_the_values_are_those_after_each_token(tmp_path: Path):
    """A real classifier, its value at each step's end against transformers' own on the sequence cut there."""
    import torch
    from transformers import LlamaForSequenceClassification

    from tests.contracts.test_reward_models import tiny_reward_model

    directory = tiny_reward_model(tmp_path / "process", 3)
    given = group("ab\ncd\n")
    config = RewardModel.Config(dtype="float32", level="step", step_total="sum")
    found = run_alone(RewardModel(config, Sampler(model=str(directory))), [given], tmp_path, node="judge").put[0]
    model = LlamaForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    ids = given.token_ids.tolist() + given.samples[0].token_ids.tolist()
    with torch.no_grad():
        expected = [p(float(model(input_ids=torch.tensor([ids[: 2 + end + 1]])).logits)) for end in (2, 5)]
    assert [value for value in found.placed[0].tolist() if value] == pytest.approx(expected, abs=1e-5)
