"""How a stage says what it does in a simulation, where there is no model, no data and nothing of the user's runs.

`Stage.simulated(costs)` returns one of three words, or None: then no graph that needs the stage is predicted. The words
are read by flowrl/simulation/stand_ins.py, which also makes the `costs`; they load nothing.

Tests: tests/unit/simulation/test_timed_run.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

C = TypeVar("C")


@dataclass(frozen=True)
class Admits:
    """It admits a prompt of `num_samples` samples against every credit."""

    num_samples: int


@dataclass(frozen=True)
class PassesOn:
    """It takes a message from its one input and, after the time of a call, puts it to its one output.

    What the message lacks of the output's is filled with zeros.
    """

    call: str = ""  # of the node's costs; "": it takes `seconds`
    seconds: float = 0.0  # where no call says how long it takes: people's time, which no run measures for another
    lanes: int = 1  # messages that one replica works on at once
    num_samples: int | None = None  # of a group that go on, the first ones; None: all
    filters: bool = False  # as many groups as were not learned in the profile's run


@dataclass(frozen=True)
class Itself:
    """It runs as it is, with these of its constructor's arguments exchanged: for code that calls none of the user's."""

    arguments: dict[str, Any]
    without: tuple[str, ...] = ()  # ports that stay unconnected, for what they carry costs nothing


Simulated = Admits | PassesOn | Itself


class Costs(Protocol):
    """What is known of a node's costs, and what stands in for whatever takes time or belongs to the user."""

    def heldout(self, num: int) -> list[int]:
        """Return the tokens of each prompt of an evaluation: as many as in the profile's run, else `num`."""
        ...

    def sampler(self, sampler: C) -> C:
        """Return what the nodes agree on, with a directory that passes for the model's."""
        ...

    def learning(self, learning: C, *, is_objective: bool = False) -> C:
        """Return what the learning nodes agree on, of as many steps as are simulated.

        Its algorithm, or the objective in its place, neither finds advantages nor minimises anything.
        """
        ...

    def generating(self, config: C) -> C:
        """Return a generator's settings with an engine that only takes time.

        Raises:
            ConfigError: nobody knows how much.
        """
        ...

    def training(self, config: C, call: str = "score") -> C:
        """Return a training or scoring node's settings with such an engine; `call` must be known of the node.

        Raises:
            ConfigError: it is not.
        """
        ...
