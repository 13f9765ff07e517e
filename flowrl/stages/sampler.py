"""What the nodes of a run agree on: whose samples are drawn and how, and what a learner makes of them.

Each is made once, in `build`, and given to every node that needs a part of it. `Graph.check` refuses a graph in which
two nodes were given different ones, and a node that samples otherwise than its `Sampler` says refuses itself. So the
numbers that a law depends on exist once.

Tests: tests/unit/stages/test_reward.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from flowrl.config import Meta, Select
from flowrl.data.examples import ExampleData
from flowrl.data.prompts import PromptData
from flowrl.engines.base import Lora, RoutingKind, Sampling, travelling
from flowrl.errors import GraphError
from flowrl.graph.stage import Agreement
from flowrl.graph.staleness import Admission

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.engines.base import Serving


# Of a Sampler: what the node that samples has among its own settings, too.
OF_THE_NODE = ("group_size", "max_model_len", "max_turns", "engine")


class Sampler(Agreement):
    """The policy whose samples are drawn, the prompts it answers, and how."""

    model: str  # Hugging Face id, local directory or a run's
    data: PromptData = PromptData()
    sampling: Sampling = Sampling()
    group_size: Annotated[int, Meta(ge=1)] = 1  # samples of each prompt
    greedy: bool = False  # besides, of each prompt, the likeliest response
    max_model_len: Annotated[int, Meta(ge=1)] = 512  # prompt plus response, tokens
    max_turns: Annotated[int, Meta(ge=1)] = 1  # of the policy in one response
    seed: int = 0
    engine: str = ""  # of the nodes that sample, module:Class
    adapter: Lora = Lora()  # that its learner trains; rank 0: the whole model, or nothing
    routing: RoutingKind = "own"  # replay: samples bring the experts that their tokens were sent to

    def travelling(self, model: Path) -> Lora:
        """Return the adapter that versions bring as it is, or none where they bring merged weights (engines.base)."""
        return travelling(self.adapter, engine=self.engine, model=model, where="learner")

    def check_node(self, config: Serving, where: str) -> None:
        """Insist that the node which samples has the numbers that all the others were told.

        Raises:
            GraphError: it has others.
        """
        for name in OF_THE_NODE:
            told, here = getattr(self, name), getattr(config, name, None)
            if here is not None and told not in (here, ""):
                what = f"is {here}, but the graph's Sampler has {told}"
                raise GraphError(f"{where}.{name}", what, "make the Sampler of this node's settings")

    @property
    def max_response(self) -> int:
        """Return the tokens that the policy samples for the longest response."""
        return self.max_turns * self.sampling.max_tokens

    @property
    def room(self) -> int:
        """Return the tokens that a prompt may have, so that a response still fits."""
        return self.max_model_len - self.sampling.max_tokens

    @property
    def longest(self) -> int:
        """Return the tokens that a prompt and a response may have together."""
        both = self.data.max_prompt_tokens + self.sampling.max_tokens
        return self.max_model_len if self.max_turns > 1 else min(self.max_model_len, both)


class Learning(Agreement):
    """What is learned from the samples, and in which steps."""

    algorithm: Select  # an Algorithm, or an offline Objective where samples are selected
    steps: Annotated[int, Meta(ge=1)]  # policy versions to publish
    groups_per_step: Annotated[int, Meta(ge=1)]  # prompt groups learned per policy version
    max_staleness: Annotated[int, Meta(ge=0)]  # policy versions between sampling and learning

    @property
    def admission(self) -> Admission:
        """Return these numbers as the staleness bound takes them."""
        return Admission(self.groups_per_step, self.steps, self.max_staleness)


class Course(Agreement):
    """What is learned from given examples, and in which steps."""

    model: str
    data: ExampleData
    objective: Select
    steps: Annotated[int, Meta(ge=1)]  # optimizer steps
    examples_per_step: Annotated[int, Meta(ge=1)]

    @property
    def admission(self) -> Admission:
        """Return what a step learns; two of them are out at a time, so that reading hides behind training."""
        return Admission(self.examples_per_step, self.steps)
