"""What graphs of offline training have in common: their settings. Imports no heavy library.

Tests: tests/graphs/test_offline.py
"""

from __future__ import annotations

from typing import Annotated

from flowrl.config import Meta, Select
from flowrl.data.examples import ExampleData
from flowrl.graph.graph import RunSettings
from flowrl.stages.examples import Examples, HeldoutExamples
from flowrl.stages.offline_learner import OfflineLearner
from flowrl.stages.sampler import Course


class OfflineSettings(RunSettings):
    """Settings of a graph in which a model learns from given examples."""

    elsewhere = {"algorithm": "objective"}

    model: str = "SmolLM2-135M-Instruct"  # Hugging Face id or local directory
    steps: Annotated[int, Meta(ge=1)] = 100  # optimizer steps
    examples_per_step: Annotated[int, Meta(ge=1)] = 16  # examples learned in one optimizer step
    objective: Select = Select(use="flowrl.algorithms.sft:SFT")
    data: ExampleData = ExampleData()
    examples: Examples.Config = Examples.Config()
    heldout: HeldoutExamples.Config = HeldoutExamples.Config()
    learner: OfflineLearner.Config = OfflineLearner.Config(cpus=1, lr=1e-5)

    def course(self) -> Course:
        """Return what the nodes agree on."""
        return Course(
            model=self.model,
            data=self.data,
            objective=self.objective,
            steps=self.steps,
            examples_per_step=self.examples_per_step,
        )
