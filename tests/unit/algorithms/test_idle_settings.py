"""What is said to have no effect on what is learned has none, and what is not said has one, tried on made-up groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowrl.algorithms.base import AdvantageBatch, StepFigures
from flowrl.algorithms.functional import whiten
from flowrl.algorithms.policy import PolicyGradient
from flowrl.config import Select
from flowrl.engines.base import Lora, Schedule, Training

ALGORITHMS = (  # one of each way to make an advantage of a score
    "ppo:PPO", "grpo:GRPO", "rloo:RLOO", "remax:ReMax", "reinforce_pp:ReinforcePP", "reinforce_pp:ReinforcePPBaseline",
    "on_policy_distillation:OnPolicyDistillation",
)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "shaping.mean": 0.3, "shaping.std": 3.0, "shaping.running": True, "shaping.num_scores": 5, "shaping.clip": 0.4,
    "shaping.cut_factor": 0.5, "shaping.cut_penalty": 0.7, "shaping.max_tokens": 10, "shaping.overlong_buffer": 4,
    "shaping.overlong_factor": 2.0, "mean_range": (0.1, 0.6),
}  # fmt: skip
RANGED = {"kl.coef": 0.0, "filter_groups": True, "mean_range": (0.1, 0.6)}
BESIDE: tuple[dict[str, Any], ...] = (
    {"kl.coef": 0.0},
    {"kl.coef": 0.0, "mask_cut": True},
    RANGED,
    {"shaping.running": True, "shaping.num_scores": 5, "kl.coef": 0.2, "kl.placement": "reward", "kl.estimator": "k1"},
    {"kl.coef": 0.0, "shaping.overlong_buffer": 4, "shaping.max_tokens": 12},
)
WIDTH = 12


def group(number: int) -> AdvantageBatch:
    generator = torch.Generator().manual_seed(number)
    lengths = torch.tensor([WIDTH, 9, 5, 11 + number])
    mask_BT = (torch.arange(WIDTH) < lengths[:, None]).float()
    behaviour_BT = -1.5 + 0.5 * torch.randn(4, WIDTH, generator=generator)
    rewards_B = 0.3 * number + torch.randn(4, generator=generator)
    greedy = AdvantageBatch(torch.tensor([0.25]), mask_BT[:1], behaviour_BT[:1], cut_B=torch.ones(1))
    return AdvantageBatch(
        rewards_B, mask_BT, behaviour_BT, behaviour_BT + 0.4 * torch.randn(4, WIDTH, generator=generator) - 0.1,
        0.5 * torch.randn(4, WIDTH, generator=generator), cut_B=torch.tensor([1.0, 0.0, 0.0, number % 2]),
        greedy=greedy,
    )  # fmt: skip


def learned(choice: Select) -> torch.Tensor:
    """Return what two steps of two groups give to learn, at the tokens that are learned."""
    found: list[torch.Tensor] = []
    for step in range(2):
        algorithm = choice.load("algorithm")
        assert isinstance(algorithm, PolicyGradient)
        groups = [group(2 * step), group(2 * step + 1)]
        masks = [
            each.mask_BT * (1 - each.cut_B[:, None]) if algorithm.mask_cut and each.cut_B is not None else each.mask_BT
            for each in groups
        ]
        given = [algorithm.advantages(each) for each in groups]
        rows = [each.advantages_BT for each in given]
        rows = whiten(rows, masks) if algorithm.whitens else rows
        kept = [float(algorithm.keeps(each)) for each in groups]
        values = [each.returns_BT for each in given if each.returns_BT is not None]
        for row, mask, is_kept in zip((*rows, *values), masks * 2, kept * 2, strict=False):
            found.append(row * mask * is_kept)
        rewards_B = torch.cat([each.rewards_B for each in groups])
        choice = choice.changed(algorithm.adapted(StepFigures(rewards_B, 1.0)))
    return torch.cat(found)


# Where a score is not compared with others, a range acts only if something moves the group's mean out of it.
CASES = [(use, each) for use in ALGORITHMS for each in BESIDE if each is not RANGED or use.endswith(("PPO", "RLOO"))]


@pytest.mark.parametrize(("use", "beside"), CASES)
def test_settings_of_the_score_are_said_to_be_idle_where_they_are(use: str, beside: dict[str, Any]) -> None:
    if use.startswith("on_policy"):
        beside = {name: value for name, value in beside.items() if not name.startswith("kl.")}
    chosen = Select(use=f"flowrl.algorithms.{use}").changed(beside)
    plain = learned(chosen)
    for name, value in SETTINGS.items():
        if name in beside or (name == "mean_range" and "filter_groups" not in beside):
            continue
        tried = chosen.changed({name: value, **({"shaping.max_tokens": WIDTH} if "buffer" in name else {})})
        lines = [line for line in tried.load("algorithm").idle_settings(2) if name in line.split(": no effect")[0]]
        changed = learned(tried)
        acts = bool((changed - plain).abs().max() > 2e-4 * max(float(changed.abs().max()), float(plain.abs().max())))
        assert acts != bool(lines), (name, lines)


def test_a_penalty_that_is_not_taken_says_so_of_what_was_changed_alone() -> None:
    def lines(use: str, **kl: Any) -> list[str]:
        return Select(use=f"flowrl.algorithms.{use}", options={"kl": kl}).load("algorithm").idle_settings(2)

    assert lines("grpo:GRPO", coef=0.0) == []
    weighted = lines("ppo:PPO", coef=0.0, placement="loss", estimator="k3", is_weighted=True)
    assert weighted == ["algorithm.kl.placement, kl.estimator, kl.is_weighted: no effect while kl.coef is 0"]


@pytest.mark.parametrize(
    ("use", "options", "said"),
    [
        ("process:Process", {"threshold": 0.5}, "objective.threshold: no effect with labels=soft"),
        ("process:Process", {"threshold": 0.5, "labels": "hard"}, ""),
        ("full_distillation:FullDistillation", {"share": 0.2}, "objective.share: no effect with direction=forward"),
        ("full_distillation:FullDistillation", {"share": 0.2, "direction": "jsd"}, ""),
        ("distillation:Distillation", {"max_weight": 2.0}, "objective.max_weight: no effect where the teacher's own"),
        ("distillation:Distillation", {"max_weight": 2.0, "drawn_by": "student"}, ""),
        ("distillation:Distillation", {"mix": 0.0, "drawn_by": "student"}, "objective.drawn_by: no effect with mix=0"),
        ("dpo:DPO", {"label_smoothing": 0.1}, ""),
    ],
)
def test_objectives_say_what_they_do_not_look_at(use: str, options: dict[str, Any], said: str) -> None:
    lines = Select(use=f"flowrl.algorithms.{use}", options=options).load("objective").idle_settings(1)
    assert [line.startswith(said) for line in lines] == [True] * bool(said)


def test_a_node_that_trains_says_what_it_does_not_look_at() -> None:
    changed = {"lora": Lora(alpha=64), "checkpoint_every": 2, "schedule": Schedule(final_ratio=0.5, decay_ratio=0.2)}
    assert Training(**changed).idle_settings() == [
        "schedule.decay_ratio: no effect with schedule.kind=cosine",
        "lora.alpha: no effect while lora.rank is 0",
        "checkpoint_every: no effect without gradient_checkpointing=true",
    ]
    constant = Training(schedule=Schedule(kind="constant", warmup_steps=2, final_ratio=0.5))
    assert constant.idle_settings() == ["schedule.final_ratio: no effect with schedule.kind=constant"]
    assert Training(schedule=Schedule(kind="wsd", decay_ratio=0.2), lora=Lora(rank=4, alpha=64)).idle_settings() == []


def test_fresh_samples_learned_in_one_step_are_clipped_by_nothing() -> None:
    def lines(num_updates: int, *, is_fresh: bool, kind: str = "behaviour") -> list[str]:
        choice = Select(use="flowrl.algorithms.ppo:PPO").changed({"correction.kind": kind})
        return choice.load("algorithm").idle_settings(num_updates, is_fresh=is_fresh)

    (line,) = lines(1, is_fresh=True)
    assert line.startswith("algorithm.clip_low, clip_high: no effect but on what engines round")
    assert lines(2, is_fresh=True) == lines(1, is_fresh=False) == []
    assert len(lines(1, is_fresh=True, kind="truncated")) == 1
