"""Settings come from defaults, a YAML file and --set; whatever is wrong is refused by its path and value."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import pytest

from flowrl import config
from flowrl.config import Config, Meta, Select, load_class, load_object, redacted, resolve, to_tree, widen
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


class Clip(Config):
    """An algorithm's options, as far as these tests need one."""

    clip_low: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    epochs: int = 1


class Other(Config):
    beta: float = 0.1
    whitens: bool = True
    clip: Literal["on", "off"] = "on"


class Item(Config):
    name: str = "one"
    weight: float = 1.0


class Optimizer(Config):
    lr: Annotated[float, Meta(ge=0)] = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["cosine", "constant", "off"] = "cosine"


class Node(Config):
    optimizer: Optimizer = Optimizer()
    replicas: Annotated[int, Meta(ge=1)] = 1
    share: str | None = None
    engine_options: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.share is not None and self.replicas > 1:
            raise ValueError(f"{self.replicas} replicas cannot share {self.share}; set replicas=1")


class Settings(Config):
    elsewhere = {"learner.rate": "learner.optimizer.lr", "learner": "model"}
    model: str = "tiny"
    steps: Annotated[int, Meta(ge=1)] = 30
    keep: bool = True
    algorithm: Select = Select(use=f"{__name__}:Clip", options={"epochs": 2})
    learner: Node = Node()
    critic: Node | None = None
    names: dict[str, str] = {}
    items: list[Item] = msgspec.field(default_factory=lambda: [Item()])


def set_to(*overrides: str) -> Settings:
    return resolve(Settings, overrides=overrides)


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        set_to(*overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_stand_without_a_file_or_overrides():
    assert resolve(Settings) == Settings()


def test_an_override_reaches_a_nested_field_and_leaves_the_rest():
    found = set_to("learner.optimizer.lr=1e-4")
    assert found.learner.optimizer.lr == 1e-4
    assert found.learner.optimizer.betas == (0.9, 0.95)
    assert found.steps == 30


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("steps=7", lambda s: s.steps == 7),
        ("keep=false", lambda s: s.keep is False),
        ("learner.optimizer.lr=1", lambda s: s.learner.optimizer.lr == 1.0),
        ("learner.optimizer.betas=[0.8, 0.99]", lambda s: s.learner.optimizer.betas == (0.8, 0.99)),
        ("learner.optimizer.kind=constant", lambda s: s.learner.optimizer.kind == "constant"),
        ("learner.optimizer={lr: 0.5, kind: constant}", lambda s: s.learner.optimizer.lr == 0.5),
        ("learner.share=critic", lambda s: s.learner.share == "critic"),
        ("learner.engine_options.level=3", lambda s: s.learner.engine_options == {"level": 3}),
        ("learner.engine_options.a.b=x", lambda s: s.learner.engine_options == {"a": {"b": "x"}}),
        ("learner.engine_options={a: {b: 1}}", lambda s: s.learner.engine_options == {"a": {"b": 1}}),
        ("critic.replicas=2", lambda s: s.critic == Node(replicas=2)),
        ("items=[{name: two}, {weight: 3}]", lambda s: s.items == [Item(name="two"), Item(weight=3.0)]),
        ("model=", lambda s: s.model == ""),
        ("model=a=b", lambda s: s.model == "a=b"),
        (" steps =7", lambda s: s.steps == 7),
    ],
)
def test_an_override_is_read_as_the_type_of_its_field(override, read):
    assert read(set_to(override))


@pytest.mark.parametrize("text", ["010", "1:30", "0o17", "08.5.1"])
def test_what_is_a_number_in_old_yaml_alone_is_none(text: str, tmp_path: Path):
    file = tmp_path / "a.yaml"
    file.write_text(f"model: {text}\n")
    assert resolve(Settings, config=file).model == text
    file.write_text(f"steps: {text}\n")
    with pytest.raises(ConfigError, match=f"steps: expected an integer, got '{text}'"):
        resolve(Settings, config=file)


@pytest.mark.parametrize("text", ["no", "007", "1e3", "null", "2026-01-02", "[1", "a: b", "{x}", " ", "say # it"])
def test_a_text_setting_keeps_what_was_typed(text):
    assert set_to(f"model={text}").model == text


@pytest.mark.parametrize(
    ("path", "text", "read"),
    [
        ("learner.optimizer.kind", "off", lambda s: s.learner.optimizer.kind == "off"),
        ("learner.share", "no", lambda s: s.learner.share == "no"),
        ("model", "On", lambda s: s.model == "On"),
        ("keep", "off", lambda s: s.keep is False),
        ("keep", "yes", lambda s: s.keep is True),
        ("names", "{no: off, on: x}", lambda s: s.names == {"no": "off", "on": "x"}),
        ("learner.engine_options", "{compile: off, rate: 1e-6}",
         lambda s: s.learner.engine_options == {"compile": False, "rate": 1e-6}),
        ("algorithm", "{use: tests.unit.test_config:Other, options: {whitens: no, clip: off}}",
         lambda s: s.algorithm.load("algorithm") == Other(whitens=False, clip="off")),
    ],
)  # fmt: skip
def test_words_mean_what_their_field_takes(tmp_path: Path, path, text, read):
    assert read(set_to(f"{path}={text}"))
    (tmp_path / "run.yaml").write_bytes(f"\ufeff{path}: {text}\n".encode())
    assert read(resolve(Settings, config=tmp_path / "run.yaml"))


def test_few_lines_that_stand_for_more_than_any_memory_holds_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(config, "MOST_VALUES", 1000)
    names = "abcdefgh"
    doubled = [f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]" for a, b in pairwise(names)]
    (tmp_path / "run.yaml").write_text("\n".join(["a: &a [x]", *doubled]))
    with pytest.raises(ConfigError, match=r"run\.yaml: holds more than 1,000 values"):
        resolve(Settings, config=tmp_path / "run.yaml")


def test_a_quoted_text_loses_its_quotes_and_no_other_part():
    assert set_to("model='a # b'").model == "a # b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learner:\n  replicas: 2\nsteps: 3\nlearner:\n  share: x\n", "gives 'learner' twice, in lines 1 and 4"),
        ("steps: 3\nsteps: 3\n", "gives 'steps' twice, in lines 1 and 2"),
        ("learner:\n  replicas: 2\nlearner.replicas: 3\n", "gives 'learner.replicas' twice, in lines 2 and 3"),
        ("items:\n- name: a\n- name: b\n  name: c\n", "gives 'items[1].name' twice, in lines 3 and 4"),
        ("learner: {<<: {a: 1}, <<: {a: 2}}", "gives 'learner.<<' twice, in lines 1 and 1"),
        ("learner: {<<: {a: 1, a: 2}}", "gives 'learner.a' twice, in lines 1 and 1"),
        ("learner: {engine_options: {a: 1, a: 2}}", "gives 'learner.engine_options.a' twice, in lines 1 and 1"),
        ("steps: 3\nmodel: [\n", "run.yaml:3: is not valid YAML"),
    ],
)
def test_what_a_file_says_twice_or_wrongly_is_refused_with_its_lines(tmp_path: Path, text, said):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(Settings, config=tmp_path / "run.yaml")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_in_a_file_does_not_undo_its_parts(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(f"algorithm.beta: 0.5\nalgorithm: {__name__}:Other\n")
    assert resolve(Settings, config=tmp_path / "run.yaml").algorithm.load("algorithm") == Other(beta=0.5)


def test_an_optional_setting_is_cleared_by_null():
    assert set_to("learner.share=null").learner.share is None
    assert set_to("learner.share=7").learner.share == "7"
    assert set_to("critic.replicas=2", "critic=null").critic == Node(replicas=2), "a whole is set before its parts"
    assert set_to("critic=null").critic is None


def test_the_last_of_two_equal_paths_wins():
    assert set_to("steps=3", "steps=4").steps == 4


def test_a_file_sets_by_nesting_or_by_path_and_set_wins(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 5\nlearner:\n  optimizer: {lr: 0.1}\nlearner.replicas: 2\nalgorithm: {clip_low: 0.3}\n")
    found = resolve(Settings, config=file, overrides=["steps=6"])
    assert (found.steps, found.learner.optimizer.lr, found.learner.replicas) == (6, 0.1, 2)
    assert found.algorithm.load("algorithm") == Clip(clip_low=0.3, epochs=2)


def test_what_to_tree_writes_resolves_to_the_same_settings(tmp_path: Path):
    import yaml

    settings = set_to(
        "learner.optimizer.betas=[0.1, 0.2]", "algorithm.clip_low=0.4", "critic.share=learner", "items=[]"
    )
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(to_tree(settings)))
    assert resolve(Settings, config=file) == settings


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stps=1", "settings has no setting 'stps', did you mean 'steps'?"),
        ("lr=1", "settings has no setting 'lr', did you mean learner.optimizer.lr or critic.optimizer.lr?"),
        ("optimizer.lr=1", "has no setting 'optimizer', did you mean learner.optimizer.lr or critic.optimizer.lr?"),
        ("learner.rate=1", "learner has no setting 'rate', did you mean learner.optimizer.lr?"),
        ("learner=llama", "learner is a section of settings, not a single value, did you mean model?"),
        ("learner.replica=1", "learner has no setting 'replica', did you mean 'replicas'?"),
        ("learner.optimizer.lrr=1", "learner.optimizer has no setting 'lrr', did you mean 'lr'?"),
        ("learner.optimizer={lrr: 1}", "learner.optimizer has no setting 'lrr', did you mean 'lr'?"),
        ("zzz=1", "(known: algorithm, critic, items, keep, learner, model, names, steps)"),
        ("steps.more=1", "steps is a single value and has no 'more'"),
        ("steps", "--set steps: no value given; write --set path=value"),
        ("steps=0", "steps: expected an integer >= 1, got 0"),
        ("steps=1.5", "steps: expected an integer, got 1.5"),
        ("steps=many", "steps: expected an integer, got 'many'"),
        ("steps=", "steps: expected an integer, got ''"),
        ("steps=null", "steps: expected an integer, got null"),
        ("keep=perhaps", "keep: expected true or false, got 'perhaps'"),
        ("learner=3", "learner: expected a mapping, got 3"),
        ("learner.optimizer.lr=fast", "learner.optimizer.lr: expected a number, got 'fast'"),
        ("learner.optimizer.lr=-1", "learner.optimizer.lr: expected a number >= 0.0, got -1"),
        ("learner.optimizer.lr=inf", "learner.optimizer.lr: expected a finite number, got inf"),
        ("items=[{weight: .inf}]", "items[0].weight: expected a finite number, got inf"),
        ("model=/data/m\udcfcnchen", "model: is not UTF-8"),
        ("steps=99999999999999999999", "steps: expected an integer of up to 63 bits, got 99999999999999999999"),
        ("steps=2026-13-01", "steps: expected an integer, got '2026-13-01'"),  # no date either
        ("learner.optimizer.betas=[1]", "learner.optimizer.betas: expected a list of length 2, got [1]"),
        (
            "learner.optimizer.kind=linear",
            "learner.optimizer.kind: expected one of cosine, constant, off, got 'linear'",
        ),
        ("critic.replicas=0", "critic.replicas: expected an integer >= 1, got 0"),
        ("items=[{weight: x}]", "items[0].weight: expected a number, got 'x'"),
        ("items=[{wait: 1}]", "items[0]: has no setting 'wait', did you mean 'weight'?"),
        ("learner.share=None", "learner.share would be the text 'None'; write null"),
        ("learner={replicas: 3, share: x}", "learner: 3 replicas cannot share x; set replicas=1"),
    ],
)
def test_a_wrong_override_is_refused_with_its_path_and_value(override, said):
    assert said in refused(override)


def test_a_long_wrong_value_is_cut():
    assert len(refused(f"steps={'x' * 500}")) < 120


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learner: {optimizer: {lrr: 1}}", "run.yaml: learner.optimizer has no setting 'lrr', did you mean 'lr'?"),
        ("steps: [", "is not valid YAML"),
        ("- steps", "must be a mapping of settings"),
        ("model: 7", "model: expected a text, got 7"),
        ("3: 4", "run.yaml: settings has no setting '3'"),
        ("steps: 0x_", "run.yaml: holds an invalid value"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text, said):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(Settings, config=file)
    assert said in str(caught.value)


def test_a_missing_file_is_refused_and_an_empty_one_changes_nothing(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve(Settings, config=tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert resolve(Settings, config=tmp_path / "empty.yaml") == Settings()


def test_settings_without_a_default_are_refused():
    class Bare(Config):
        model: str

    with pytest.raises(ConfigError, match="no default for model"):
        resolve(Bare)


def test_an_option_is_set_on_the_class_that_is_chosen():
    found = set_to("algorithm.clip_low=0.3").algorithm
    assert found.load("algorithm") == Clip(clip_low=0.3, epochs=2)


def test_another_class_takes_none_of_the_first_one_s_options(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("algorithm: {clip_low: 0.3}\n")
    found = resolve(Settings, config=file, overrides=[f"algorithm={__name__}:Other"])
    assert found.algorithm.load("algorithm") == Other()


@pytest.mark.parametrize("reverse", [False, True])
def test_class_and_option_may_be_set_in_either_order(reverse):
    overrides = [f"algorithm={__name__}:Other", "algorithm.beta=0.5"]
    found = set_to(*(reversed(overrides) if reverse else overrides))
    assert found.algorithm.load("algorithm") == Other(beta=0.5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.clip_loww=0.1"], "algorithm.clip_loww: Clip has no setting 'clip_loww', did you mean 'clip_low'?"),
        (["algorithm.clip_low=2"], "algorithm.clip_low: expected a number < 1.0, got 2"),
        (["algorithm.epochs=few"], "algorithm.epochs: expected an integer, got 'few'"),
        (["algorithm=no.such.module:X"], "algorithm: cannot import 'no.such.module'"),
        ([f"algorithm={__name__}:Clipp"], "has no 'Clipp', did you mean 'Clip'?"),
        (["algorithm=PPO"], "algorithm: 'PPO' is not of the form module:name"),
        (["algorithm=math:pi"], "algorithm: math:pi is not a class"),
        (["algorithm=decimal:Decimal"], "algorithm: decimal:Decimal is no Config"),
    ],
)
def test_a_wrong_class_or_option_is_refused_when_it_is_loaded(overrides, said):
    settings = set_to(*overrides)
    with pytest.raises(ConfigError) as caught:
        settings.algorithm.load("algorithm")
    assert said in str(caught.value)


def test_an_object_is_found_by_its_import_path():
    assert load_object("math:tau", "here") > 6
    assert load_class("collections:Counter", "here").__name__ == "Counter"


def test_settings_are_frozen_and_strict():
    with pytest.raises(AttributeError):
        Settings().steps = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        Settings(stepz=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Settings(3)  # type: ignore[misc]


def test_widen_copies_the_shared_fields_and_adds_the_rest():
    class Wider(Optimizer):
        model: str

    wide = widen(Wider, Optimizer(lr=0.5), model="tiny")
    assert wide == Wider(lr=0.5, model="tiny")


class Source(Config):
    source: str = "given"

    def implied(self, given):
        return {"limits.most": 256, "elsewhere.most": 1} if "source" in given else {}


class Limits(Config):
    most: int = 16
    least: int = 1

    def implied(self, given):
        return {".least": self.most // 8} if "most" in given else {}


class Run(Config):
    data: Source = Source()
    limits: Limits = Limits()
    small: bool = False

    def implied(self, given):
        return {"limits.most": 2} if given.get("small") else {}


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        ([], 16),
        (["data.source=mine"], 256),
        (["data.source=mine", "limits.most=16"], 16),
        (["data={source: mine}"], 256),
        (["small=true"], 2),
        (["small=true", "limits.most=5"], 5),
    ],
)
def test_a_default_may_follow_from_what_is_given_elsewhere(overrides: list[str], most: int):
    assert resolve(Run, overrides=overrides).limits.most == most


def test_a_default_that_follows_from_settings_beside_it_is_addressed_from_there():
    assert resolve(Run, overrides=["limits.most=40"]).limits == Limits(most=40, least=2)
    assert resolve(Run, overrides=["limits.most=40", "limits.least=3"]).limits.least == 3


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("https://me:pw@judge.example:8443/score?key=abc#top", "https://judge.example:8443/score?..."),
        ("https://token@judge.example", "https://judge.example"),
        (
            "ask http://127.0.0.1:9/score?key=1 or s3://bucket/key#part",
            "ask http://127.0.0.1:9/score?... or s3://bucket/key#...",
        ),
        ("a mail@example.com, 3 / 4 ? 5", "a mail@example.com, 3 / 4 ? 5"),
    ],
)
def test_what_may_be_secret_in_an_address_is_left_out(written: str, shown: str):
    assert redacted({"judge": {"urls": [written, 3]}}) == {"judge": {"urls": [shown, 3]}}


def test_more_processes_than_any_cluster_has_are_a_slip() -> None:
    from flowrl.graph.stage import StageConfig

    with pytest.raises(ConfigError, match=r"replicas: .*65536"):
        resolve(StageConfig, overrides=["replicas=1000000000000"])
    assert resolve(StageConfig, overrides=["replicas=auto", "ranks=64"]).ranks == 64
