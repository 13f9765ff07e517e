"""An example environment: questions with a number for an answer, and a hint after each wrong try.

    flowrl run graphs/agent_async.py --set agent.environment=flowrl.rewards.hints:HintedNumber

The policy answers; where it is wrong it hears whether the answer is higher or lower, and tries again. Right at the
first try earns 1, and `factor` times as much with each further one.

Invariant: nothing is drawn, so an episode follows from the task and the actions.

Played by the agent stage.

Tests: tests/unit/rewards/test_environments.py
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from flowrl.rewards.verify import accepted

_NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+(?!\d)|\d{1,18})(\.\d{1,18})?")


class HintedNumber:
    """Asks the column `prompt`, whose answer is the number in the column `answer`."""

    def __init__(self, factor: float = 0.5, tries: int = 3) -> None:
        self._factor = factor
        self._tries = tries  # after which the episode is over

    def reset(self, task: dict[str, Any], seed: int) -> str:
        """Ask the question.

        Raises:
            ValueError: its answer is no number.
        """
        (answer,) = accepted(task["answer"])
        found = _NUMBER.fullmatch(answer)
        if found is None:
            raise ValueError(f"the data's answer {answer!r} is no number")
        self._answer = _value(found)
        self._num_tries = 0
        return str(task["prompt"])

    def step(self, action: str) -> tuple[str, float, bool]:
        """Judge the first number in the action."""
        self._num_tries += 1
        is_last = self._num_tries == self._tries
        found = _NUMBER.search(action)
        if found is None:
            return "That is not a number. Try again.", 0.0, is_last
        if (said := _value(found)) == self._answer:
            return "", self._factor ** (self._num_tries - 1), True
        direction = "higher" if self._answer > said else "lower"
        return f"No, the answer is {direction} than {found[0]}. Try again.", 0.0, is_last


def _value(found: re.Match[str]) -> Decimal:
    return Decimal(found[0].replace(",", ""))
