"""Critique and revision: which turn is asked for what, and by which principle."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from flowrl.errors import ConfigError
from flowrl.rewards.revision import Revision

if TYPE_CHECKING:
    from pathlib import Path


def test_an_answer_is_criticised_then_revised_and_only_the_revision_earns():
    game = Revision()
    messages = [{"role": "user", "content": "Why?"}]
    assert game.reset({"prompt": messages}, seed=3) == messages
    critique, first, is_done = game.step("Because.")
    assert "falls short" in critique
    assert not is_done
    revision, second, is_done = game.step("It is curt.")
    assert "anew" in revision
    assert not is_done
    assert game.step("Because of the weather.") == ("", 1.0, True)
    assert first == second == 0.0


def test_principles_are_drawn_by_weight_and_seed(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("- {text: Be short., weight: 3}\n- Be kind.\n")
    game = Revision(constitution=str(tmp_path / "c.yaml"))

    def asked(seed: int) -> str:
        game.reset({"prompt": "Why?"}, seed)
        return game.step("Because.")[0]

    counts = Counter("Be short" in asked(seed) for seed in range(400))
    assert 270 <= counts[True] <= 330  # three in four
    assert asked(5) == asked(5)


def test_each_round_has_a_critique_and_a_revision():
    game = Revision(rounds=2)
    game.reset({"prompt": "Why?"}, 0)
    assert [game.step("x")[1:] for _ in range(5)] == [(0.0, False)] * 4 + [(1.0, True)]


def test_what_cannot_be_played_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="rounds is 0"):
        Revision(rounds=0)
    (tmp_path / "c.yaml").write_text("[]")
    with pytest.raises(ConfigError, match="holds no principles"):
        Revision(constitution=str(tmp_path / "c.yaml"))
