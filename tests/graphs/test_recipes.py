"""Every recipe names its graph, loads, and passes the checks that `flowrl check` makes of its stages.

Models that are not here stand in by their published configurations; devices are not looked at.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from flowrl.algorithms.base import Algorithm
from flowrl.algorithms.pairs import PairObjective
from flowrl.algorithms.ppo import PPO
from flowrl.config import load_object
from flowrl.graph.program import Program, load_program
from flowrl.runtime.placement import places
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.generator import Generator
from flowrl.stages.reward import Reward
from tests.support.command import ROOT
from tests.support.published import PUBLISHED, published_model
from tests.support.shipped_algorithms import defined

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

pytestmark = pytest.mark.slow

RECIPES = sorted((ROOT / "graphs" / "recipes").glob("*.yaml"))
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
COMMAND = re.compile(r"flowrl run (graphs/\w+\.py) --config (\S+?)[,\s]")


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def comment_of(recipe: Path) -> str:
    lines = [line.removeprefix("# ") for line in recipe.read_text().splitlines() if line.startswith("# ")]
    return " ".join(lines) + " "


def loaded(recipe: Path, overrides: Mapping[str, Any] | None = None) -> Program:
    found = COMMAND.search(comment_of(recipe))
    assert found is not None, "its comment gives the command"
    assert ROOT / found[2] == recipe
    settings = [f"{name}={json.dumps(value)}" for name, value in (overrides or {}).items()]
    return load_program(ROOT / found[1], config=recipe, overrides=settings)


def is_of_hub(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith(".")


def stand_ins(recipe: Path, tiny: Path, tmp_path: Path) -> dict[str, Any]:
    """What a recipe names that is not here, and what stands for it."""
    given = yaml.safe_load(recipe.read_text())

    def model(name: str) -> str:
        return str(published_model(name, tmp_path) if name in PUBLISHED else tiny)

    found: dict[str, Any] = {"model": model(given["model"])}
    if given.get("critic_model"):
        found["critic_model"] = model(given["critic_model"])
    if "teacher" in given.get("objective", {}):  # a run to be made before
        found["objective.teacher"] = str(tiny)
    if "reward_models" in given:
        found["reward_models"] = [model(name) for name in given["reward_models"]]
    if "model_judge" in given:
        found["model_judge.model"] = model(given["model_judge"]["model"])
    source = given.get("data", {}).get("source", "")
    if "prompt_column" not in given.get("data", {}) and (source.startswith("./runs/") or is_of_hub(source)):
        pairs = any(graph in comment_of(recipe) for graph in ("reward_model.py", "preference.py"))
        found["data.source"] = f"reasoning-gym:{'preference' if pairs else 'prompt-completion'}"
    if "prompt_column" in given.get("data", {}):  # of a data set that is not here
        rows = [json.dumps({given["data"]["prompt_column"]: f"What is {k}?", "answer": str(k)}) for k in range(600)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
        found |= {"data.source": str(tmp_path / "prompts.jsonl"), "data.subset": ""}
    if "subset" in given.get("texts", {}).get("data", {}):
        texts = str(ROOT / "graphs" / "recipes" / "texts.jsonl")
        found |= {"texts.data.source": texts, "texts.data.subset": "", "texts.data.num_train": 0}
    return found


@every_recipe
def test_a_recipe_loads_and_every_stage_passes_its_check(recipe: Path, tiny: Path, tmp_path: Path) -> None:
    program = loaded(recipe, stand_ins(recipe, tiny, tmp_path))
    said: list[str] = []
    for stage in program.graph.nodes.values():
        if isinstance(stage, Reward | Evaluator):  # their checks start a process; the import is what a recipe can miss
            if stage.config.function:
                load_object(stage.config.function, "function")
        else:
            stage.check(said.append)
    assert not [line for line in said if line.startswith("warning")]


@every_recipe
def test_a_recipe_that_needs_more_than_this_machine_says_that_it_was_not_run(recipe: Path) -> None:
    needs_gpus = any(place.gpus for place in places(loaded(recipe).graph))
    assert ("NOT RUN HERE" in comment_of(recipe)) == needs_gpus
    assert ("Runs on two cores" in comment_of(recipe)) != needs_gpus


@every_recipe
def test_tensor_parallel_ranks_divide_the_published_heads_and_fit_the_generators_gpus(recipe: Path) -> None:
    published = PUBLISHED.get(yaml.safe_load(recipe.read_text())["model"])
    for stage in loaded(recipe).graph.nodes.values():
        if published is not None and isinstance(stage, Generator):
            assert published["num_attention_heads"] % stage.config.tensor_parallel == 0
            assert published["num_key_value_heads"] % stage.config.tensor_parallel == 0
            if not stage.config.turns:  # else it lies on the learner's
                assert stage.config.gpus == stage.config.tensor_parallel


def test_the_paper_recipe_has_the_papers_numbers_and_gpus() -> None:
    recipe = ROOT / "graphs" / "recipes" / "llama3-8b-ppo.yaml"
    program = loaded(recipe)
    s = program.settings
    assert (s.learner.lr, s.critic.lr, s.learner.epochs) == (5e-7, 9e-6, 1)
    assert s.groups_per_step * s.generator.group_size == 1024
    assert s.groups_per_step * s.generator.group_size / s.learner.minibatches == 128
    assert program.graph.nodes["critic"].config.minibatches == 8  # pyright: ignore[reportAttributeAccessIssue]  # as the policy
    assert (s.algorithm.load("algorithm").clip_low, s.algorithm.load("algorithm").clip_high) == (0.2, 0.2)
    gpus: dict[str, float] = {}
    for place in places(program.graph):
        gpus[place.node] = gpus.get(place.node, 0.0) + place.gpus
    placed = {"learner": 4, "critic": 4, "reference": 2, "reward_model_0": 2, "generator": 4}
    assert {node: count for node, count in gpus.items() if count} == placed


def test_every_method_has_a_recipe() -> None:
    """Each online algorithm and each objective over pairs is the algorithm of a recipe."""
    parts = [part for recipe in RECIPES for part in yaml.safe_load(recipe.read_text()).values()]
    used = {load_object(part["use"], "use") for part in parts if isinstance(part, dict) and "use" in part}
    kinds = {kind for kind in defined(Algorithm) if kind.advantages is not Algorithm.advantages}
    kinds |= {kind for kind in defined(PairObjective) if kind.loss is not PairObjective.loss}
    # A reward model's objective is its graph's default; distillation on-policy is a recipe of the whole vocabulary.
    assert {kind.__name__ for kind in kinds - used} == {"OnPolicyDistillation", "Pairwise"}


def test_every_trick_of_the_paper_is_on_in_the_ppo_recipe() -> None:
    s = loaded(ROOT / "graphs" / "recipes" / "smollm2-ppo.yaml").settings
    algorithm = s.algorithm.load("algorithm")
    assert isinstance(algorithm, PPO)
    assert algorithm.normalisation == "token"
    assert algorithm.kl.coef > 0
    assert algorithm.shaping.running
    assert algorithm.whitens
    assert 0 < algorithm.lam < 1
    assert s.texts.per_step > 0
    assert s.learner.schedule.kind == s.critic.schedule.kind == "cosine"
    assert s.learner.schedule.warmup_steps > 0
    assert s.learner.lr < s.critic.lr
    assert s.learner.freeze_steps > 0
