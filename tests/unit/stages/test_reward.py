"""The reward stages by themselves: weights, names, retries, what happens to groups that cannot be scored."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.data.prompts import PromptData
from flowrl.errors import ConfigError, LastingError, ModelError, RewardError
from flowrl.simulation.stand_ins import stand_in_model
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.model_scores import read_normalisation
from flowrl.stages.reward import Reward, RewardModel
from flowrl.stages.sampler import Sampler
from flowrl.telemetry.events import Notice, Span
from tests.support.one_stage import rollouts, run_alone
from tests.support.tiny import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.engines.base import TokenGroup
    from flowrl.rewards.signatures import Adapter

HERE = __name__
calls: list[int] = []


async def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


async def partly(completions: list[str]) -> list[float | None]:
    return [None, 2.0]


async def second_time(completions: list[str]) -> list[float]:
    calls.append(1)
    if len(calls) % 2:
        raise OSError("busy")
    return [1.0] * len(completions)


async def fails_on_bad(completions: list[str]) -> list[float]:
    calls.append(1)
    if "bad" in completions:
        raise ValueError("a bad one")
    return [1.0] * len(completions)


async def fails_on_made(completions: list[str]) -> list[float]:
    raise ValueError("a made one")


async def one_too_few(completions: list[str]) -> list[float]:
    return [0.0]


async def needs_gold(completions: list[str], gold: list[str]) -> list[float]:
    return [0.0] * len(completions)


def reward(function: str, **settings: Any) -> Reward:
    calls.clear()
    return Reward(Reward.Config(function=f"{HERE}:{function}", isolation="thread", **settings))


def test_scores_are_weighted_and_named_after_the_function(tmp_path: Path):
    alone = run_alone(reward("length", weight=0.5), [rollouts("one", "three")], tmp_path)
    assert [group.scores for group in alone.put] == [{"length": [1.5, 2.5]}]
    assert [event.groups for event in alone.events if isinstance(event, Span)] == [[7]]


def test_none_counts_nothing(tmp_path: Path):
    alone = run_alone(reward("partly", name="taste"), [rollouts("one", "three")], tmp_path)
    assert alone.put[0].scores == {"taste": [0.0, 2.0]}
    assert alone.put[0].rewards == [0.0, 2.0]


def test_nodes_in_a_row_add_their_scores(tmp_path: Path):
    first = run_alone(reward("length"), [rollouts("one", "three")], tmp_path)
    second = run_alone(reward("length", name="again", weight=-2.0), first.put, tmp_path)
    assert second.put[0].scores == {"length": [3.0, 5.0], "again": [-6.0, -10.0]}
    assert second.put[0].rewards == [-3.0, -5.0]


def test_two_nodes_with_one_name_are_refused(tmp_path: Path):
    first = run_alone(reward("length"), [rollouts("one", "three")], tmp_path)
    with pytest.raises(ExceptionGroup) as caught:
        run_alone(reward("length"), first.put, tmp_path)
    assert caught.group_contains(ConfigError, match="score 'length': two nodes in a row give it; set the name")


def test_a_failed_call_is_tried_again(tmp_path: Path):
    alone = run_alone(reward("second_time", retries=1, concurrency=1), [rollouts("one")], tmp_path)
    assert alone.put[0].scores == {"second_time": [1.0]}
    assert not alone.rejected


def test_a_group_that_fails_every_time_is_kept_and_rejected_and_the_others_go_on(tmp_path: Path):
    groups = [rollouts("bad" if k == 1 else "good", group_id=k) for k in range(3)]
    alone = run_alone(reward("fails_on_bad", retries=2), groups, tmp_path)
    assert sorted(group.group_id for group in alone.put) == [0, 2]
    assert alone.rejected[0][:2] == (1, "failed")
    assert "raised ValueError: a bad one" in alone.rejected[0][2]
    assert len(calls) == 2 + 3
    kept = json.loads((tmp_path / "quarantine" / "group-1.json").read_text())
    assert kept["input"]["samples"][0]["text"] == "bad"
    notice = next(event for event in alone.events if isinstance(event, Notice))
    assert (notice.level, notice.where) == ("warning", "reward.0")
    assert "group-1.json" in notice.text


def test_a_failure_ends_the_run_where_that_is_set(tmp_path: Path):
    with pytest.raises(ExceptionGroup) as caught:
        run_alone(reward("fails_on_bad", on_error="stop"), [rollouts("bad")], tmp_path)
    assert caught.group_contains(RewardError, match="a bad one")
    assert (tmp_path / "quarantine" / "group-7.json").is_file()


def test_a_function_that_fails_group_after_group_ends_the_run_with_the_reason(tmp_path: Path):
    groups = [rollouts("bad", group_id=k) for k in range(40)]
    with pytest.raises(ExceptionGroup) as caught:
        run_alone(reward("fails_on_bad", retries=0, concurrency=1), groups, tmp_path)
    said = "8 groups have failed one after the other, the last with: raised ValueError: a bad one; mend the reward"
    assert caught.group_contains(LastingError, match=said)
    assert len(list((tmp_path / "quarantine").iterdir())) == 8


def test_a_function_that_fails_often_but_not_always_is_gone_on_with(tmp_path: Path):
    groups = [rollouts("good" if k % 8 == 7 else "bad", group_id=k) for k in range(40)]
    alone = run_alone(reward("fails_on_bad", retries=0, concurrency=1), groups, tmp_path)
    assert (len(alone.put), len(alone.rejected)) == (5, 35)


ON_DATA = Sampler(model="m", data=PromptData(source="rows.jsonl"))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("fails_on_made", "raised ValueError: a made one; mend the reward function"),
        ("one_too_few", "returned 1 scores for 2 completions; return a list of 2"),
        ("needs_gold", "needs a column 'gold' that the data lacks; it has answer, compl"),
    ],
)
def test_a_function_is_tried_on_a_row_of_the_data_before_a_run(
    function: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "count", "answer": "1"}\n' * 3)
    config = Reward.Config(function=f"{HERE}:{function}", isolation="thread")
    row = r"was tried on a row of the data \(rows.jsonl:1, one of 3 like it\) and"
    with pytest.raises(ConfigError, match=f"^reward.function: {HERE}:{function} {row} {said}"):
        Reward(config, ON_DATA).check(lambda line: None)
    Reward(config).check(lambda line: None)  # where the data are not known, it is loaded only


def test_a_function_is_tried_on_every_kind_of_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "count", "answer": "1"}] * 2 + [{"prompt": "count", "answer": None}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Reward.Config(function="flowrl.rewards.verify:exact_answer", isolation="thread")
    with pytest.raises(
        ConfigError, match=r"\(rows.jsonl:3, one of 3 like it\) and raised ValueError: a row of the data"
    ):
        Reward(config, ON_DATA).check(lambda line: None)
    said: list[str] = []
    lenient = msgspec.structs.replace(ON_DATA, data=PromptData(source="rows.jsonl", on_bad="skip"))
    Reward(msgspec.structs.replace(config, label_column="gold"), lenient).check(said.append)
    assert said[0].startswith("reward.label_column: no effect")
    assert said[1].startswith(
        "warning: reward.function: flowrl.rewards.verify:exact_answer was tried on a row of the da"
    )
    assert said[1].endswith("has no answer; the groups of such rows will fail")


def test_a_function_that_fails_once_passes_with_its_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "count"}\n')
    Reward(reward("second_time", retries=1).config, ON_DATA).check(lambda line: None)
    with pytest.raises(ConfigError, match="raised OSError: busy"):
        Reward(reward("second_time", retries=0).config, ON_DATA).check(lambda line: None)


@pytest.mark.parametrize(
    ("function", "reward_function", "found"),
    [(None, "mine:score", "mine:score"), ("its:own", "mine:score", "its:own"), ("", "mine:score", None),
     ("its:own", "", "its:own"), (None, "", None)],
)  # fmt: skip
def test_held_out_samples_are_scored_as_the_policys_are_unless_it_is_said_otherwise(
    function: str | None, reward_function: str, found: str | None
):
    reward = Reward.Config(function=reward_function, label_column="gold")
    config = Evaluator.Config(function=function)
    scoring = Evaluator(config, ON_DATA, reward=reward)._scoring()
    assert (scoring.function, scoring.label_column) == (found, "gold") if scoring else found is None


def test_held_out_prompts_that_nothing_scores_are_refused():
    evaluator = Evaluator(Evaluator.Config(), ON_DATA, reward=Reward.Config(function=""))
    with pytest.raises(ConfigError, match="nothing scores the 64 held-out prompts; name a function, or set data"):
        evaluator.check(lambda line: None)
    Evaluator(Evaluator.Config(), ON_DATA).check(lambda line: None)  # an agent's bring theirs


@pytest.mark.parametrize(("adapter", "memory_bytes"), [("verifiers", 0), ("trl", 1 << 30)])
def test_what_needs_a_process_is_refused_in_a_thread(adapter: Adapter, memory_bytes: int):
    with pytest.raises(ConfigError, match="set isolation=process"):
        reward("length", adapter=adapter, memory_bytes=memory_bytes)


class FakeScores:
    """A reward model that scores a sample by its last token id."""

    def __init__(self, *, config: Any, where: str, scale: float = 1.0) -> None:
        self.scale = scale

    def open(self) -> None: ...

    def score_groups(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        calls.append(len(groups))
        return [[self.scale * float(each.tolist()[-1]) for each in group.responses] for group in groups]

    def close(self) -> None: ...


def model_with(tmp_path: Path, **settings: Any) -> str:
    directory = tmp_path / "model"
    shutil.copytree(stand_in_model(), directory)
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForSequenceClassification"], **settings})
    )
    return str(directory)


def run_model(tmp_path: Path, model: str, groups: list[Any], *, node: str = "judge", **settings: Any) -> Any:
    stage = RewardModel(RewardModel.Config(engine=f"{HERE}:FakeScores", **settings), Sampler(model=model))
    return run_alone(stage, groups, tmp_path, node=node).put[0]


def test_a_reward_models_scores_are_clipped_weighted_and_named_after_the_node(tmp_path: Path):
    scored = run_model(tmp_path, stand_in_model(), [rollouts("a", "b", "c")], clip=1.5, weight=2.0)
    assert scored.scores == {"judge": [0.0, 2.0, 3.0]}


def test_a_reward_model_scores_the_groups_together_that_are_ready(tmp_path: Path):
    calls.clear()
    config = RewardModel.Config(engine=f"{HERE}:FakeScores", batch_groups=2)
    stage = RewardModel(config, Sampler(model=stand_in_model()))
    groups = [rollouts("a"), rollouts("a", "b", "c"), rollouts("a", "b")]
    found = run_alone(stage, groups, tmp_path, node="judge").put
    assert [scored.scores["judge"] for scored in found] == [[0.0], [0.0, 1.0, 2.0], [0.0, 1.0]]
    assert calls == [2, 1]


def test_two_reward_models_in_a_row_add_up(tmp_path: Path):
    first = run_model(tmp_path, stand_in_model(), [rollouts("a", "b")], node="helpful")
    second = run_model(tmp_path, stand_in_model(), [first], node="harmless", weight=-0.5)
    assert second.scores == {"helpful": [0.0, 1.0], "harmless": [0.0, -0.5]}
    assert second.rewards == [0.0, 0.5]


@pytest.mark.parametrize(("judge_s_end", "num_lines"), [("<|im_end|>", 0), ("<|endoftext|>", 1)])
def test_a_judge_that_takes_another_token_for_an_answer_s_end_says_so(judge_s_end: str, num_lines: int, tmp_path: Path):
    for name, end in (("policy", "<|im_end|>"), ("judge", judge_s_end)):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template, tokenizer.eos_token = None, end
        shutil.copytree(stand_in_model(), tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        config = {"vocab_size": 320, "architectures": ["LlamaForSequenceClassification"]}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    said: list[str] = []
    stage = RewardModel(RewardModel.Config(), Sampler(model=str(tmp_path / "policy")), model=str(tmp_path / "judge"))
    stage.check(said.append)
    found = [line for line in said if "which is <|endoftext|> to it and <|im_end|> to the policy" in line]
    assert len(found) == num_lines


@pytest.mark.parametrize(("normalise", "scores"), [(True, [-2.0, 2.0, 5.0]), (False, [0.0, 1.0, 2.0])])
def test_scores_are_normalised_by_what_the_models_config_states(normalise: bool, scores: list[float], tmp_path: Path):
    model = model_with(tmp_path, mean=0.5, std=0.25)
    scored = run_model(tmp_path, model, [rollouts("a", "b", "c")], normalise=normalise, clip=5.0)
    assert scored.scores == {"judge": scores}


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, -1.0), ("a", 1.0), (0.0, None)])
def test_unusable_normalisation_is_refused(mean: Any, std: Any, tmp_path: Path):
    stage = RewardModel(RewardModel.Config(), Sampler(model=model_with(tmp_path, mean=mean, std=std)))
    with pytest.raises(ModelError, match="set normalise=false"):
        stage.check(print)


def test_a_model_without_normalisation_is_left_as_it_is(tmp_path: Path):
    model_with(tmp_path)
    assert read_normalisation(tmp_path / "model") == (0.0, 1.0)


def test_a_score_that_is_no_number_ends_the_run(tmp_path: Path):
    with pytest.raises(RewardError, match="scored a sample of group 7 nan"):
        run_model(tmp_path, stand_in_model(), [rollouts("a", "b")], engine_options={"scale": float("nan")})


@pytest.mark.slow  # a tokenizer is read
def test_a_further_held_out_set_is_read_whole_and_one_that_cannot_be_is_refused_by_its_name(tmp_path: Path) -> None:
    rows = tmp_path / "hard.jsonl"
    rows.write_text("".join(f'{{"prompt": "What is {k} + 1?", "answer": "{k + 1}"}}\n' for k in range(5)))
    sampler = Sampler(model=str(tiny_model(tmp_path / "model")), data=PromptData(source=str(rows), num_heldout=2))
    found = Evaluator(Evaluator.Config(sets={"hard": str(rows)}), sampler)._load_sets()
    assert sorted(row.columns["answer"] for row in found["hard"]) == ["1", "2", "3", "4", "5"]
    with pytest.raises(ConfigError, match=r"^evaluation\.sets\.harder: .*none\.jsonl"):
        Evaluator(Evaluator.Config(sets={"harder": str(tmp_path / "none.jsonl")}), sampler).check(lambda line: None)
