"""Every figure that a run can write into metrics.jsonl is explained in docs/reference/metrics.md.

Objectives are asked on a batch that has every column; what stages write beside them is read off their source.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import flowrl.algorithms
from flowrl.algorithms.base import Algorithm, Objective
from flowrl.algorithms.corrections import Correction
from flowrl.algorithms.policy import KL, PolicyGradient
from flowrl.algorithms.ppo import PPO
from flowrl.algorithms.shaping import Shaping
from flowrl.algorithms.value import ValueLoss
from flowrl.messages import Scored
from flowrl.stages.step import derived, step_metrics
from tests.support.one_stage import rollouts
from tests.unit.algorithms.cases import advantage_batch, loss_batch

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "metrics.md"
IN_SOURCE = re.compile(r'"([a-z_]+(?:\.[a-z_]+)+)": |(?:figures|metrics|found)\["([a-z_.]+)"\] = ')


def explained() -> set[str]:
    return set(re.findall(r"`([a-z_.]+)`", PAGE.read_text()))


def test_every_figure_of_an_algorithm_is_explained():
    found = figures_of_objectives()
    assert {"reward.clipped", "clip_frac_low", "corrected_frac", "critic.value_loss", "accuracy"} <= found
    assert sorted(found - explained()) == []


def test_every_figure_of_a_stage_is_explained():
    sources = [path.read_text() for part in ("stages", "engines") for path in (ROOT / "flowrl" / part).glob("*.py")]
    in_source = {one or two for source in sources for one, two in IN_SOURCE.findall(source)}
    group = rollouts("a", "b")
    known = {name: getattr(group, name) for name in group.__struct_fields__}
    figures = step_metrics([Scored(**known, scores={"exact": [0.0, 1.0]})], [0])
    found = in_source | {*derived({**figures, "is_weight": 1.0, "is_weight_sq": 1.0})} - {"score.exact"}
    assert {"reward.mean", "ess", "critic.explained_variance", "replay.age.max", "router_loss"} <= found
    assert sorted(found - explained()) == []


def figures_of_objectives() -> set[str]:
    options = {"shaping": Shaping(clip=1.0, running=True), "constant_tokens": 7}
    every = [kind(**options) if issubclass(kind, PolicyGradient) else kind() for kind in objectives()]
    found: set[str] = set()
    for objective in [*every, PPO(kl=KL(coef=0.1, target=1.0), correction=Correction(kind="truncated"))]:
        prefix = "critic." if isinstance(objective, ValueLoss) else ""
        found |= {prefix + name for name in ("loss", *objective.loss(every_column()).metrics)}
        if isinstance(objective, Algorithm):
            found |= {*objective.advantages(advantage_batch(0)).metrics, *objective.adapting}
    return found


def every_column():
    batch = loss_batch(0)
    further = {
        name: torch.ones_like(batch.mask_BT) for name in ("drift_limit", "label", "step_label", "reference_point")
    }
    return batch._replace(
        columns={**batch.columns, **further},
        group_B=torch.tensor([0, 0, 1, 1]),
        sample_B=torch.tensor([0, 1, 0, 1]),
        divergence_BT=torch.zeros_like(batch.mask_BT),
    )


def objectives() -> Iterator[type[Objective]]:
    for each in pkgutil.iter_modules(flowrl.algorithms.__path__):
        module = importlib.import_module(f"flowrl.algorithms.{each.name}")
        for kind in vars(module).values():
            if not (isinstance(kind, type) and kind.__module__ == module.__name__ and issubclass(kind, Objective)):
                continue
            if kind.loss is not Objective.loss and getattr(kind, "advantages", None) is not Algorithm.advantages:
                yield kind
