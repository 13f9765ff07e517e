"""An engine's options are held against its constructor before anything starts; a frozen model has nothing to train."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flowrl.config import resolve, widen
from flowrl.data.model_process import run_in_process
from flowrl.engines.base import GenerationConfig, Lora, TrainingConfig, check_engine
from flowrl.engines.vllm_settings import check
from flowrl.errors import ConfigError, ModelError
from flowrl.graph.graph import RunSettings
from flowrl.stages.critic import Critic
from flowrl.stages.generator import Generator
from flowrl.stages.reference import ExampleReference, Reference
from flowrl.stages.reward import RewardModel
from flowrl.stages.serving import check_context

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.engines.base import Scoring

VLLM = "flowrl.engines.vllm:VllmEngine"
HERE = f"{__name__}:Engine"


class Engine:
    """An engine of a user's own, with one option."""

    def __init__(self, config: Any, *, where: str, level: int = 1) -> None:
        pass


class Judging:
    """One that can hold its options against what it passes them to."""

    def __init__(self, config: Any, *, where: str, **options: Any) -> None:
        self.where, self.options = where, options
        self.is_untried = bool(options)

    def try_options(self) -> None:
        if "level" in self.options:
            raise ConfigError(f"{self.where}.engine_options.level", f"is {self.options['level']}", "lower it")

    async def open(self) -> None: ...

    generate = update_weights = close = open


class Plain:
    """One that has none."""

    def __init__(self, config: Any, *, where: str, receiver_index: int = 0) -> None:
        pass


class Settings(RunSettings):
    reference: Reference.Config = Reference.Config()
    reward_model: RewardModel.Config = RewardModel.Config()
    critic: Critic.Config = Critic.Config()


def test_an_option_that_the_engine_takes_is_accepted() -> None:
    check_engine(HERE, {"level": 3}, "learner")
    options = {"kv_cache_dtype": "fp8", "quantization": "fp8", "speculative_config": {}, "pipeline_parallel_size": 2,
               "enable_expert_parallel": True, "enable_prefix_caching": False, "hf_overrides": {}}  # fmt: skip
    check_engine(VLLM, options, "generator")


def test_an_engine_that_passes_options_on_may_take_some_itself() -> None:
    own, passed_on = {"deaths": "/tmp", "points": []}, {"quantization": "fp8"}
    check_engine("tests.support.dying_engines:DyingGeneration", own | passed_on, "generator")
    with pytest.raises(ConfigError, match=r"generator.engine_options.deahts: vLLM takes no such engine argument"):
        check_engine("tests.support.dying_engines:DyingGeneration", {"deahts": "/tmp"}, "generator")


@pytest.mark.parametrize(
    ("path", "options", "said"),
    [
        (HERE, {"levl": 3}, r"learner.engine_options.levl: .*takes no option 'levl', did you mean 'level'\?"),
        (HERE, {"where": "x"}, "takes no option 'where'"),
        (f"{__name__}:Plain", {"stage": 1}, "takes no option 'stage'; it has none"),
        (f"{__name__}:Nothing", {}, "has no 'Nothing'"),
        (
            VLLM,
            {"kv_cache_dtyp": "fp8"},
            r"kv_cache_dtyp: vLLM takes no such engine argument, did you mean 'kv_cache_d",
        ),
        (VLLM, {"tensor_parallel_size": 2}, r"tensor_parallel_size: is not free; set generator.tensor_parallel"),
        (VLLM, {"logprobs_mode": "raw_logprobs"}, "flowrl sets logprobs_mode"),
    ],
)
def test_an_option_that_it_does_not_take_is_refused(path: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_engine(path, options, "learner")


@pytest.mark.slow
def test_an_engine_is_asked_in_a_process_of_its_own_once_for_all_nodes_and_only_where_options_are_given(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def count(*arguments: Any, where: str) -> None:
        asked.append(where)
        run_in_process(*arguments, where=where)

    monkeypatch.setattr("flowrl.stages.serving.run_in_process", count)
    engine = f"{__name__}:Judging"
    taken = Generator.Config(engine=engine, engine_options={"depth": 3})
    for config in (taken, taken, Generator.Config(engine=engine)):
        check_context(config, str(tiny), print, where="generator")
    assert asked == ["generator.engine_options"]
    with pytest.raises(ModelError, match=r"generator.engine_options.level: is 3; lower it"):
        check_context(Generator.Config(engine=engine, engine_options={"level": 3}), str(tiny), print, where="generator")


@pytest.mark.parametrize("setting", ["reference.lr=5", "reward_model.schedule.kind=cosine", "reference.lora.rank=4"])
def test_what_is_frozen_has_no_settings_of_training(setting: str) -> None:
    with pytest.raises(ConfigError, match="has no setting"):
        resolve(Settings, overrides=[setting])
    assert resolve(Settings, overrides=["critic.lr=5"]).critic.lr == 5


@pytest.mark.parametrize("kind", [Reference.Config, ExampleReference.Config, RewardModel.Config])
def test_a_quantised_frozen_model_has_an_adapter_that_changes_nothing(kind: type[Scoring]) -> None:
    config = kind(bits=4, micro_batch_tokens=77)
    told = widen(TrainingConfig, config, lora=config.lora, model="m")
    assert (told.lora, told.micro_batch_tokens) == (Lora(rank=1, bits=4), 77)
    assert kind().lora == Lora()


def test_deepspeed_steps_with_torchs_own_fused_adamw_on_every_device() -> None:
    """Nothing is compiled with nvcc at the first step, nor where the state is moved to the host."""
    from flowrl.engines.deepspeed import DeepSpeedEngine

    for offloads in (False, True):
        config = TrainingConfig(model="m", offload_optimizer=offloads, overlap_comm=True)
        engine = DeepSpeedEngine(config, where="learner.0", name="x")
        engine.device, engine.dtype = torch.device("cuda", 0), torch.bfloat16
        told = engine._settings()
        assert told["optimizer"]["params"]["torch_adam"]
        assert told["optimizer"]["params"]["fused"]
        assert told["zero_force_ds_cpu_optimizer"] is False
        assert told["zero_optimization"]["overlap_comm"] is True


@pytest.mark.parametrize(("parts", "is_taken"), [(1, True), (3, True), (2, False), (4, False)])
def test_a_generator_is_split_into_parts_that_divide_the_heads(tmp_path: Path, parts: int, is_taken: bool):
    (tmp_path / "config.json").write_text('{"text_config": {"num_attention_heads": 9, "num_key_value_heads": 3}}')
    config = GenerationConfig(model=str(tmp_path), dtype="float32", tensor_parallel=parts, layout="processes")
    refused = pytest.raises(
        ConfigError, match=rf"tensor_parallel: {parts} does not divide the model's 9 attention heads"
    )
    with nullcontext() if is_taken else refused:
        check(config, "generator")


@pytest.mark.parametrize(
    ("path", "needs", "said"),
    [
        ("decimal:Decimal", ("open", "score", "close"), "has no open, score, close, so it is no engine for node"),
        ("flowrl.engines.torch:TorchEngine", ("open", "generate"), "has no generate, so it is no engine for node"),
    ],
)
def test_a_class_that_is_no_engine_of_the_kind_is_refused(path: str, needs: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=f"node.engine: {path} {said}"):
        check_engine(path, {}, "node", needs=needs)
