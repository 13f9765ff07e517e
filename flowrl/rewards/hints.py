"""An example environment: questions with a number for an answer, and a hint after each wrong try.

    flowrl run graphs/agent_async.py --set agent.environment=flowrl.rewards.hints:HintedNumber

The policy answers; where it is wrong it hears whether the answer is higher or lower, and tries again. Right at the
first try earns 1, and `factor` times as much with each further one. Invariant: nothing is drawn, so an episode follows
from the task and the actions. Played by the agent stage.
"""

from __future__ import annotations

import re
from typing import Any

_WHOLE = re.compile(r"[-+]?\d{1,18}")


class HintedNumber:
    """Asks the column `prompt`, whose answer is the whole number in the column `answer`."""

    def __init__(self, factor: float = 0.5, tries: int = 3) -> None:
        self._factor = factor
        self._tries = tries  # after which the episode is over

    def reset(self, task: dict[str, Any], seed: int) -> str:
        """Ask the question."""
        self._answer = int(task["answer"])
        self._num_tries = 0
        return str(task["prompt"])

    def step(self, action: str) -> tuple[str, float, bool]:
        """Judge the first whole number in the action."""
        self._num_tries += 1
        is_last = self._num_tries == self._tries
        found = _WHOLE.search(action)
        if found is None:
            return "That is not a number. Try again.", 0.0, is_last
        if (said := int(found[0])) == self._answer:
            return "", self._factor ** (self._num_tries - 1), True
        direction = "higher" if self._answer > said else "lower"
        return f"No, the answer is {direction} than {said}. Try again.", 0.0, is_last
