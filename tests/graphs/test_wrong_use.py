"""What the shipped graphs refuse of an algorithm, or warn of, before anything starts, and what they tell to do instead.

The checks of `flowrl check`, less those that read data or start a process.
"""

from __future__ import annotations

import json
import shutil
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.algorithms.grpo import GRPO
from flowrl.config import CALLED, _addresses
from flowrl.errors import ConfigError, FlowrlError
from flowrl.graph.program import load_program
from flowrl.stages.advantage import Advantage
from flowrl.stages.critic import Critic
from flowrl.stages.learner import Learner
from flowrl.stages.offline_learner import OfflineLearner
from flowrl.stages.reference import ExampleReference, Reference
from flowrl.stages.replay_buffer import ReplayBuffer
from flowrl.stages.reward import RewardModel
from tests.support.command import ROOT, tiny_settings

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

GIVEN = [  # as other libraries say it, and where it is here
    ("group_async", "learner.learning_rate", "learner.lr"),
    ("group_async", "train_batch_size", "groups_per_step"),
    ("sft", "learner.per_device_train_batch_size", "examples_per_step"),
    ("group_async", "sampling.max_new_tokens", "sampling.max_tokens"),
    ("group_async", "learner.cliprange", "algorithm.clip_low"),
    ("ppo_async", "critic_learning_rate", "critic.lr"),
    ("sft", "data.path", "data.source"),
    ("sft", "lora_rank", "learner.lora.rank"),
    ("sft", "learner.warmup_ratio", "learner.schedule.warmup_steps"),
    ("group_async", "generator.tp", "generator.tensor_parallel"),
]

CHECKED = (Advantage, Critic, ExampleReference, Learner, OfflineLearner, Reference, ReplayBuffer, RewardModel)
ALGORITHM = {name: f"flowrl.algorithms.{path}" for name, path in {
    "GRPO": "grpo:GRPO", "RLOO": "rloo:RLOO", "GSPO": "gspo:GSPO", "CISPO": "cispo:CISPO", "PPO": "ppo:PPO",
    "REINFORCE++": "reinforce_pp:ReinforcePP", "baseline": "reinforce_pp:ReinforcePPBaseline",
    "ReMax": "remax:ReMax", "teacher": "on_policy_distillation:OnPolicyDistillation",
}.items()}  # fmt: skip


def checked(graph: str, model: Path, settings: dict[str, Any]) -> list[str]:
    """Load a graph and check its stages; returns what they say."""
    path = ROOT / "graphs" / f"{graph}.py"
    given = [*tiny_settings(model, path)[1::2], *(f"{name}={value}" for name, value in settings.items())]
    said: list[str] = []
    for stage in load_program(path, overrides=given).graph.nodes.values():
        if isinstance(stage, CHECKED):
            stage.check(said.append)
    return said


ONE = {"generator.group_size": 1}
SMALL_GROUP = r"compares the samples of a group, but group_size is 1; set generator\.group_size .* to 2 or more"
CUT = r"top_p or top_k cuts the distribution .*; set top_p=1 and top_k=0, or algorithm\.correction\.kind=truncated"

WEIGHED = {"algorithm.correction.kind": "truncated", "learner.minibatches": 2}


@pytest.mark.parametrize(
    ("graph", "settings", "said"),
    [
        ("group_async", ONE, SMALL_GROUP),
        ("group_async", {**ONE, "algorithm": ALGORITHM["RLOO"]}, SMALL_GROUP),
        ("group_async", {**ONE, "algorithm": ALGORITHM["baseline"]}, SMALL_GROUP),
        ("group_async", {**ONE, "algorithm": ALGORITHM["REINFORCE++"], "algorithm.filter_groups": True}, SMALL_GROUP),
        ("agent_async", {"agent.group_size": 1}, SMALL_GROUP),
        ("group_async", {"algorithm": ALGORITHM["ReMax"]}, "likeliest response, which .* not sample; set greedy_base"),
        ("group_async", {"greedy_baseline": True}, "greedy_baseline: .*GRPO has no use .*; leave it false"),
        (
            "group_async",
            {"algorithm": ALGORITHM["GSPO"], "algorithm.normalisation": "token"},
            "GSPO's ratio is a sequence's; use sequence, or GRPO",
        ),
        ("ppo_async", {"sampling.top_p": 0.9}, CUT),
        ("group_async", {"sampling.top_k": 5, "algorithm.correction.kind": "sequence"}, CUT),
        ("agent_async", {"sampling.top_p": 0.9, "algorithm.correction.kind": "behaviour"}, CUT),
        ("group_async", {"algorithm": ALGORITHM["PPO"]}, "needs a critic.*; use graphs/ppo_async"),
        ("ppo_async", {"algorithm": ALGORITHM["GRPO"]}, "the critic of this graph nothing to learn; use graphs/group"),
        (
            "group_async",
            {"algorithm": ALGORITHM["teacher"], "algorithm.kl.coef": 0.1},
            "the reference is the teacher, whose KL is the whole loss; set 0",
        ),
        ("ppo_async", {"learner.router_aux_loss": 0.01}, "learner.router_aux_loss: .* no experts .*; leave it 0"),
        ("ppo_async", {"critic.router_aux_loss": 0.01}, "critic.router_aux_loss: .* no experts .*; leave it 0"),
        (
            "ppo_async",
            {"groups_per_step": 12, "critic.minibatches": 8},
            "critic.minibatches: 8 minibatches do not divide 12 groups_per_step; choose a divisor",
        ),
        ("ppo_async", {"learner.freeze_steps": 9, "steps": 9}, "9 of 9 steps, so that the policy would learn nothing"),
        (
            "group_async",
            {"learner.freeze_steps": 1, "steps": 9},
            "1 steps in which nothing would learn, for .*GRPO",
        ),
        (
            "ppo_async",
            {"learner.lora.rank": 600, "learner.lora.publish": "adapter"},
            "learner.lora.publish: is adapter, but vLLM takes ranks up to 512; set it to merged",
        ),
        ("ppo_async", {"reward.function": ""}, r"nothing scores the samples; give reward\.function"),
    ],
)
def test_wrong_use_is_refused_with_a_remedy(graph: str, settings: dict[str, Any], said: str, tiny: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        checked(graph, tiny, settings)


@pytest.mark.parametrize(
    ("graph", "settings"),
    [
        ("group_async", {"algorithm": ALGORITHM["REINFORCE++"], "generator.group_size": 1}),
        ("group_async", {"algorithm": ALGORITHM["CISPO"], "sampling.top_p": 0.9}),
        ("group_async", {"algorithm": ALGORITHM["ReMax"], "greedy_baseline": True, "generator.group_size": 1}),
        ("group_async", {"algorithm": ALGORITHM["teacher"], "generator.group_size": 1}),
        ("group_async", {"replay.ratio": 0.5}),
        ("ppo_async", {"sampling.top_p": 0.9, **WEIGHED}),
        ("ppo_async", {"groups_per_step": 3}),
        ("ppo_async", {"groups_per_step": 12, "critic.minibatches": 4}),
    ],
)
def test_what_is_near_to_wrong_use_but_right_is_taken_in_silence(
    graph: str, settings: dict[str, Any], tiny: Path
) -> None:
    assert [line for line in checked(graph, tiny, settings) if not line.startswith("no loss uses the reference")] == []


def test_a_clip_that_rewards_of_turns_do_not_have_is_said(tiny: Path) -> None:
    (line,) = checked("agent_async", tiny, {"algorithm.shaping.clip": 5})
    assert line.startswith("algorithm.shaping.clip, mean: no effect, for rewards of turns")


@pytest.mark.parametrize(
    ("graph", "given", "node", "lr"),
    [
        ("group_async", ["learner.lora.rank=8"], "learner", 1e-4),
        ("group_async", ["learner.lora.rank=8", "learner.lr=3e-5"], "learner", 3e-5),
        ("group_async", ["learner.lora.alpha=8"], "learner", 1e-5),
        ("group_async", ["learner={lora: {rank: 8}}"], "learner", 1e-4),
        ("ppo_async", ["learner.lora.rank=8"], "critic", 2e-5),
        ("ppo_async", ["critic.lora.rank=8", "groups_per_step=4"], "critic", 2e-4),
        ("preference", ["learner.lora.rank=8"], "learner", 1e-5),
        ("sft", ["learner.lora.rank=0"], "learner", 1e-5),
    ],
)
def test_an_adapter_has_ten_times_the_default_learning_rate(graph: str, given: list[str], node: str, lr: float) -> None:
    settings = load_program(ROOT / "graphs" / f"{graph}.py", overrides=given).settings
    assert getattr(settings, node).lr == lr


@pytest.mark.parametrize("setting", ["critic_model", "reference_model", "reward_models"])
def test_a_model_that_reads_other_tokens_than_the_policys_is_refused(setting: str, tiny: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    first, second = list(ids)[10:12]
    ids[first], ids[second] = ids[second], ids[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = f"[{other}]" if setting == "reward_models" else other
    with pytest.raises(
        FlowrlError, match=rf"{setting}: .* gives 2 of the policy's .* choose a model with the policy's"
    ):
        checked("ppo_async", tiny, {setting: given})


@pytest.mark.parametrize(
    ("graph", "setting"),
    [
        ("ppo_async", "critic_model"),
        ("ppo_async", "reference_model"),
        ("preference", "reference_model"),
        ("preference", "objective={{use: FullDistillation, teacher: {model}}}"),
    ],
)
def test_every_model_of_a_graph_is_read_whole_before_anything_starts(
    graph: str, setting: str, tiny: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    name, _, choice = setting.partition("=")
    with pytest.raises(FlowrlError, match=r"the weights in \S+/other lack \d+ that LlamaFor"):
        checked(graph, tiny, {name: choice.format(model=other) or other})


def test_ppo_without_any_kl_is_warned_of(tiny: Path) -> None:
    unused, said = checked("ppo_async", tiny, {"algorithm.kl.coef": 0})
    assert unused.startswith("no loss uses the reference: one group in 8 is scored, for the metric kl; ")
    assert said.startswith("warning: algorithm.kl.coef is 0: nothing keeps the policy near the reference")
    assert said.endswith("set algorithm.kl.coef=0.01")


@pytest.mark.parametrize(("graph", "theirs", "ours"), GIVEN)
def test_another_library_s_name_of_a_setting_is_answered_with_ours(graph: str, theirs: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=rf"has no setting '{theirs.rpartition('.')[2]}', did you mean {ours}\b"):
        load_program(ROOT / "graphs" / f"{graph}.py", overrides=[f"{theirs}=1"])


def test_what_others_names_are_answered_with_is_a_setting() -> None:
    kinds = [type(load_program(ROOT / "graphs" / f"{name}.py").settings) for name in ("ppo_async", "sft")]
    for ours in CALLED:
        section, _, inner = ours.partition(".")
        if section == "algorithm":
            attrgetter(inner)(GRPO())
        else:
            assert any(each for kind in kinds for each in _addresses(kind, section)), ours
