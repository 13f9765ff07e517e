"""Settings without sense are refused in one sentence; setting a part of a nested one keeps the rest."""

from __future__ import annotations

import pytest

from flowrl.algorithms.grpo import GRPO
from flowrl.algorithms.policy import KL
from flowrl.config import Select
from flowrl.errors import ConfigError


@pytest.mark.parametrize(
    ("use", "options", "sentence"),
    [
        ("ppo:PPO", {"dual_clip": 0.5}, "dual_clip 0.5 must be 0 (off) or above 1"),
        ("ppo:PPO", {"kl": {"placement": "loss"}}, "kl.estimator k1 has no useful gradient in the loss"),
        ("ppo:PPO", {"correction": {"cap": 0.5}}, "expected a number >= 1.0"),
        ("ppo:PPO", {"lam": 1.5}, "expected a number <= 1.0"),
        ("gspo:GSPO", {"normalisation": "token"}, "GSPO's ratio is a sequence's; use sequence"),
        ("cispo:CISPO", {"dual_clip": 3.0}, "CISPO clips weights, not the surrogate"),
        ("reinforce_pp:ReinforcePPBaseline", {"gamma": 0.9}, "is defined for gamma 1"),
        ("gmpo:GMPO", {"normalisation": "token"}, "GMPO's mean is a sequence's; use sequence"),
        ("remax:ReMax", {"filter_groups": True, "mean_range": (0, 1)}, "not with its group; leave it out"),
        ("gspo:GSPO", {"correction": {"kind": "divergence"}}, "take the place of GSPO's own bound"),
        ("ppo:PPO", {"kl": {"is_weighted": True}}, "kl.is_weighted weighs the term of the loss"),
        ("dapo:DAPO", {"shaping": {"overlong_buffer": 8, "max_tokens": 4}}, "longer than max_tokens 4"),
    ],
)
def test_settings_without_sense_are_refused(use: str, options: dict[str, object], sentence: str):
    with pytest.raises(ConfigError) as caught:
        Select(use=f"flowrl.algorithms.{use}", options=options).load("algorithm")
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("algorithm")


def test_setting_the_coefficient_alone_keeps_the_algorithms_own_penalty():
    chosen = Select(use="flowrl.algorithms.grpo:GRPO", options={"kl": {"coef": 0.1}})
    assert chosen.load("algorithm") == GRPO(kl=KL(coef=0.1, placement="loss", estimator="k3"))
