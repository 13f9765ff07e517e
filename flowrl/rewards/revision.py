"""Critique and revision (Constitutional AI, Bai et al. 2022, 2212.08073, section 3.1) as an environment of three turns.

The policy answers; it is asked where its answer falls short of a principle; it is asked to write the answer again. The
principle is drawn from a constitution (flowrl.rewards.judging) by weight and by the group's seed; with `rounds` above 1
the revision is criticised by another one. An episode earns 1 once its last revision is written, so that whoever keeps
its last turn keeps no answer that was never revised. Played by the agent stage; see graphs/critique.py.

Invariant: an episode follows from the task, the seed and the actions.

Tests: tests/unit/rewards/test_revision.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from flowrl.rewards.judging import HELPFUL, read_constitution


class Revision:
    """Asks the column `prompt`, then for a critique of the answer, then for a better one."""

    def __init__(self, constitution: str = "", rounds: int = 1) -> None:
        """Read the principles.

        Raises:
            ConfigError: as `read_constitution`.
            ValueError: there is to be no round.
        """
        if rounds < 1:
            raise ValueError(f"rounds is {rounds}; give 1 or more")
        path = Path(constitution)
        self._principles = read_constitution(path, "environment_options.constitution") if constitution else [HELPFUL]
        self._rounds = rounds

    def reset(self, task: dict[str, Any], seed: int) -> Any:
        """Ask the question."""
        self._draw = random.Random(seed)
        self._num_turns = 0
        return task["prompt"]

    def step(self, action: str) -> tuple[str, float, bool]:
        """Ask for a critique after an answer, and for a revision after a critique."""
        self._num_turns += 1
        if self._num_turns == 1 + 2 * self._rounds:
            return "", 1.0, True
        if self._num_turns % 2:
            weights = [each.weight for each in self._principles]
            (self._principle,) = self._draw.choices(self._principles, weights)
            asked = f"Name, in a few sentences, where your last answer falls short of this: {self._principle.text}"
        else:
            asked = "Now write your answer anew so that none of that is true of it. Write the answer alone."
        return asked, 0.0, False
