"""User code is found where its user stands, beside the graph and among what is installed; the same file everywhere."""

from __future__ import annotations

import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

from flowrl.config import Config, ImportPath, Select, resolve
from flowrl.errors import ConfigError
from flowrl.imports import classes_like, load_class, load_object, named_beside, path_of, pin
from flowrl.stages.agent import Agent
from flowrl.stages.critic import Critic
from flowrl.stages.evaluator import Evaluator
from flowrl.stages.learner import Learner
from flowrl.stages.offline_learner import OfflineLearner
from flowrl.stages.reference import Reference
from flowrl.stages.reward import RewardModel

GRPO = "flowrl.algorithms.grpo:GRPO"


class Node(Config):
    function: ImportPath = "flowrl.rewards.verify:exact_answer"
    second: ImportPath | None = None
    name: str = ""


class Settings(Config):
    algorithm: Select = Select(use=GRPO)
    reward: Node = Node()


class Mine(Node):
    function: str = "flowrl.rewards.verify:math_answer"  # another default, written as one would


class All(Settings):
    mine: Mine = Mine()
    critic: Critic.Config = Critic.Config()
    judge: RewardModel.Config = RewardModel.Config()
    learner: Learner.Config = Learner.Config()
    offline: OfflineLearner.Config = OfflineLearner.Config()
    reference: Reference.Config = Reference.Config()
    evaluation: Evaluator.Config = Evaluator.Config()
    agent: Agent.Config = Agent.Config()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "here").mkdir()
    (tmp_path / "graphs").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def places(here: Path) -> list[Path]:
    return [here / "here", here / "graphs"]


def test_a_module_is_looked_for_where_the_user_stands_and_then_beside_the_graph(here: Path):
    for folder in places(here):
        (folder / "my_score.py").write_text("def score(): return __file__\n")
    for path in ("my_score:score", "my_score.py:score", "./my_score.py:score", f"{here}/here/my_score.py:score"):
        assert pin(path, "reward.function", places(here)) == f"{here}/here/my_score.py:score"
    (here / "here" / "my_score.py").unlink()
    assert pin("my_score:score", "reward.function", places(here)) == f"{here}/graphs/my_score.py:score"


def test_a_file_of_ones_own_wins_over_an_installed_module_of_its_name(here: Path):
    (here / "here" / "colorsys.py").write_text("def score(): return 'mine'\n")
    assert load_object(pin("colorsys:score", "f", places(here)), "f")() == "mine"
    import colorsys

    assert not hasattr(colorsys, "score"), "the installed one is as it was"


def test_what_is_not_there_is_refused_with_where_was_looked(here: Path):
    both = rf"in {here}/here or {here}/graphs"
    with pytest.raises(ConfigError, match=rf"f: no module 'nowhere' is installed, and there is no nowhere.py {both}"):
        pin("nowhere:score", "f", places(here))
    with pytest.raises(ConfigError, match=rf"f: no file sub/nowhere.py {both}; check the path"):
        pin("sub/nowhere.py:score", "f", places(here))
    for path in ("nowhere", "nowhere.py", ":x", "json:"):
        with pytest.raises(ConfigError, match=r"is not of the form module:name; write e.g. my_rewards.py:exact_match"):
            load_object(pin(path, "f", places(here)), "f")


def test_a_file_loads_what_stands_beside_it_and_is_one_module_however_it_is_named(here: Path):
    (here / "graphs" / "of_mine.py").write_text("FACTOR = 3\n")
    (here / "graphs" / "scores_of_mine.py").write_text(
        "import of_mine\nclass Kept:\n  class Inner:\n    factor = of_mine.FACTOR\n"
    )
    path = pin("scores_of_mine:Kept", "f", places(here))
    kept = load_class(path, "f")
    assert kept.Inner.factor == 3
    import scores_of_mine  # pyright: ignore[reportMissingImports]

    assert scores_of_mine.Kept is kept
    assert load_class(f"{path}.Inner", "f") is kept.Inner


def test_two_files_of_one_name_are_two_modules_and_lead_back_to_their_files(here: Path):
    for folder in places(here):
        (folder / "twice_there.py").write_text(f"class Mine:\n  place = {folder.name!r}\n")
    kinds = [load_class(f"{folder}/twice_there.py:Mine", "f") for folder in places(here)]
    assert [kind.place for kind in kinds] == ["here", "graphs"]
    assert load_class(path_of(kinds[1]), "f") is kinds[1]
    assert path_of(kinds[1]) == f"{here}/graphs/twice_there.py:Mine"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "import not_there_at_all",
            r"raised ModuleNotFoundError at .*broken\.py:1: No module named 'not_there_at_all'",
        ),
        ("x = 1\n1 / 0", r"raised ZeroDivisionError at .*broken\.py:2: division by zero"),
        ("def f(:", r"raised SyntaxError at .*broken\.py:1"),
        ("from .mine import x", r"relative import with no known parent package; put an __init__\.py beside it"),
        ("raise SystemExit(3)", r"raised SystemExit at .*broken\.py:1"),
        ("def other(): ...", r"broken\.py has no 'f' \(known: other\)"),
    ],
)
def test_a_module_that_does_not_load_is_refused_with_its_line(text: str, said: str, here: Path):
    (here / "here" / "broken.py").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_object(pin("broken:f", "reward.function", places(here)), "reward.function")


def test_settings_are_pinned_wherever_they_name_user_code(here: Path):
    (here / "graphs" / "my_things.py").write_text("")
    overrides = [f"{name}=my_things:x" for name in ("algorithm", "reward.function", "reward.second", "reward.name")]
    found = resolve(Settings, overrides=[*overrides, "algorithm.beta=2"], places=places(here))
    pinned = f"{here}/graphs/my_things.py:x"
    assert found.algorithm == Select(use=pinned, options={"beta": 2})
    assert found.reward == Node(function=pinned, second=pinned, name="my_things:x")
    assert resolve(Settings, places=places(here)) == Settings()


def test_a_setting_that_names_code_does_so_in_every_node_that_has_it(here: Path):
    (here / "here" / "my_things.py").write_text("")
    names = ["mine.function", *(f"{node}.engine" for node in ("critic", "judge", "learner", "offline", "reference"))]
    found = resolve(All, overrides=[f"{name}=my_things:x" for name in names], places=places(here))
    assert {attrgetter(name)(found) for name in names} == {f"{here}/here/my_things.py:x"}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("grpo", GRPO),
        ("GRPO", GRPO),
        ("dr-grpo", "flowrl.algorithms.dr_grpo:DrGRPO"),
        ("Dr. GRPO", "flowrl.algorithms.dr_grpo:DrGRPO"),
        ("flowrl.algorithms.grpo", GRPO),
        ("flowrl.algorithms.rloo.RLOO", "flowrl.algorithms.rloo:RLOO"),
        ("REINFORCE++", "flowrl.algorithms.reinforce_pp:ReinforcePP"),
        ("on_policy_distillation", "flowrl.algorithms.on_policy_distillation:OnPolicyDistillation"),
    ],
)
def test_a_shipped_class_may_be_given_by_its_name(name: str, path: str, here: Path):
    assert named_beside(name, GRPO, "algorithm") == path
    assert resolve(Settings, overrides=[f"algorithm={name}"], places=places(here)).algorithm.use == path


def test_a_misspelt_name_is_answered_with_those_there_are():
    with pytest.raises(ConfigError) as caught:
        named_beside("rlo", GRPO, "algorithm")
    said = str(caught.value)
    assert said.startswith("algorithm: there is none of the name 'rlo'; did you mean RLOO? there are CISPO, DAPO, ")
    for absent in ("PolicyGradient", "KTO", "SFT", "Correction"):
        assert absent not in said


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("exact_answer", "flowrl.rewards.verify:exact_answer"),
        ("Math-Answer", "flowrl.rewards.math:math_answer"),
        ("flowrl.rewards.verify.reasoning_gym_score", "flowrl.rewards.verify:reasoning_gym_score"),
    ],
)
def test_a_shipped_function_may_be_given_by_its_name(name: str, path: str, here: Path):
    names = ("reward.function", "evaluation.function")
    found = resolve(All, overrides=[f"{setting}={name}" for setting in names], places=places(here))
    assert (found.reward.function, found.evaluation.function) == (path, path)
    assert resolve(All, overrides=["reward.function="], places=places(here)).reward.function == ""


@pytest.mark.slow
def test_a_shipped_environment_and_engine_may_be_given_by_their_names(here: Path):
    overrides = ["agent.environment=hinted_number", "learner.engine=TorchEngine"]
    found = resolve(All, overrides=overrides, places=places(here))
    assert found.agent.environment == "flowrl.rewards.hints:HintedNumber"
    assert found.learner.engine == "flowrl.engines.torch:TorchEngine"


def test_a_function_s_misspelt_name_is_answered_with_those_there_are(here: Path):
    said = r"did you mean exact_answer\? there are exact_answer, math_answer, reasoning_gym_score; your own: "
    with pytest.raises(ConfigError, match=rf"reward\.function: there is none of the name 'exact'; {said}"):
        resolve(All, overrides=["reward.function=exact"], places=places(here))


@pytest.mark.parametrize(
    ("given", "meant"),
    [("my_rewards.py", "my_rewards.py:name"), ("my_rewards.score", "my_rewards:score"), ("my.py.f", "my.py:f")],
)
def test_a_path_without_its_colon_is_answered_with_the_path(given: str, meant: str, here: Path):
    with pytest.raises(ConfigError, match=rf"name '{given}'; did you mean {meant}\? there are .*; your own: {meant}"):
        resolve(All, overrides=[f"reward.function={given}"], places=places(here))


def test_a_list_of_functions_is_none(here: Path):
    with pytest.raises(ConfigError, match=r"is not a name; write one function or class that calls the others"):
        resolve(All, overrides=["reward.function='[exact_answer, math_answer]'"], places=places(here))


def test_a_package_is_found_where_its_user_stands(here: Path):
    package = here / "here" / "of_rewards"
    (package / "inner").mkdir(parents=True)
    for file in ("__init__.py", "inner/__init__.py", "words.py"):
        (package / file).write_text("WORD = 'word'\ndef score(): return WORD\n")
    (package / "inner" / "rules.py").write_text("from ..words import WORD\ndef score(): return WORD + '!'\n")
    for path, file, result in (
        ("of_rewards:score", "__init__.py", "word"), ("of_rewards.words:score", "words.py", "word"),
        ("of_rewards.inner:score", "inner/__init__.py", "word"),
        ("of_rewards.inner.rules:score", "inner/rules.py", "word!"),
    ):  # fmt: skip
        pinned = pin(path, "f", places(here))
        assert pinned == f"{package}/{file}:score"
        assert load_object(pinned, "f")() == result
    assert pin("flowrl.rewards.math:math_answer", "f", [Path(__file__).parents[2]]) == "flowrl.rewards.math:math_answer"


@pytest.mark.slow
def test_each_kind_of_setting_knows_its_own_names():
    policies, objectives = classes_like(GRPO), classes_like("flowrl.algorithms.sft:SFT")
    assert {"PPO", "GRPO", "RLOO", "ReinforcePP", "DAPO", "GSPO", "CISPO", "DrGRPO"} <= policies.keys()
    assert {"SFT", "DPO", "IPO", "KTO", "Pairwise", "FullDistillation"} <= objectives.keys()
    assert not policies.keys() & objectives.keys()
    assert classes_like("flowrl.algorithms.dpo:DPO") == objectives
    assert all(load_class(path, "test").__name__ == name for name, path in {**policies, **objectives}.items())
    assert classes_like("collections:OrderedDict") == {}


@pytest.mark.slow
def test_another_process_in_another_directory_loads_the_same_file(here: Path):
    (here / "here" / "my_far_score.py").write_text("def score(): return __file__\n")
    path = pin("my_far_score:score", "f", places(here))
    code = f"from flowrl.imports import load_object; print(load_object({path!r}, 'f')())"
    found = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert found.stdout.strip() == f"{here}/here/my_far_score.py"
