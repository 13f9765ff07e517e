"""Every training engine, way of sharding and number of ranks takes the same steps.

Ranks are real processes over gloo. The plain torch engine on one rank is the measure.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowrl.config import Select, load_class
from flowrl.engines.base import Ranks, Schedule, TrainingConfig
from flowrl.engines.weights.manifest import tensor_digests
from flowrl.errors import ConfigError, StageError
from flowrl.messages import Buffer
from tests.support.families import write_family
from tests.support.ranks import start_ranks
from tests.support.scarce_memory import make_scarce
from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.unit.engines.test_packing import random_groups
from tests.unit.engines.test_trainer import WeightedTokens, choose

pytestmark = pytest.mark.slow

GROUPS = random_groups(seed=33, count=7)
MOST = 45  # tokens a scarce pass may have; every single sequence has fewer
TORCH, DEEPSPEED = "flowrl.engines.torch:TorchEngine", "flowrl.engines.deepspeed:DeepSpeedEngine"
FSDP = "flowrl.engines.fsdp:Fsdp2Engine"
Task = Callable[[Any, Path], Any]


class FailsOnRankOne(WeightedTokens):
    """A defect that only one rank meets."""

    def loss(self, batch):
        if os.environ.get("RANK") == "1":
            raise ZeroDivisionError("rank one's own trouble")
        return super().loss(batch)


class Outcome(NamedTuple):
    """What two steps gave."""

    scores: list[list[float]]
    figures: list[dict[str, float]]
    after: list[list[float]]
    saved: dict[str, Any]


def engine_of(path: str, model: Path, **settings: Any):
    # Everything else would be too small to be sharded.
    sharding = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    config = TrainingConfig(
        model=str(model),
        **{
            "dtype": "float32",
            "lr": 1e-3,
            "schedule": Schedule(kind="cosine", warmup_steps=1, total_steps=5),
            "micro_batch_tokens": 60,
            **settings,
        },
    )
    return load_class(path, "test")(config, where="learner", name="test", **(sharding if path == DEEPSPEED else {}))


def flat(scores) -> list[list[float]]:
    return [row.tolist() for group in scores for row in group]


def two_steps(engine, directory: Path) -> Outcome:
    scores = flat(engine.score(GROUPS))
    figures = []
    for _ in range(2):
        metrics = engine.accumulate(GROUPS, choose(WeightedTokens, entropy=0.01))
        figures.append({**metrics, **engine.apply()})
    after = flat(engine.score(GROUPS))
    engine.save_model(directory / "model", card="card")
    from safetensors.torch import load_file

    return Outcome(scores, figures, after, load_file(directory / "model" / "model.safetensors"))


def assert_same(found: Outcome, expected: Outcome, tolerance: float = 1e-5) -> None:
    for mine, theirs in ((found.scores, expected.scores), (found.after, expected.after)):
        for a, b in zip(mine, theirs, strict=True):
            assert a == pytest.approx(b, abs=tolerance, rel=tolerance)
    for mine, theirs in zip(found.figures, expected.figures, strict=True):
        assert mine == pytest.approx(theirs, abs=tolerance, rel=tolerance)
    assert found.saved.keys() == expected.saved.keys()
    for name, tensor in expected.saved.items():
        # Adam divides by the gradient's size: where that is near nothing, rounding shows as a part of a step of 1e-3.
        torch.testing.assert_close(found.saved[name], tensor, atol=3e-5, rtol=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["policy", "value"])
def head(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def measure(model, head, tmp_path_factory) -> Outcome:
    """Return what plain torch does on one rank."""
    engine = engine_of(TORCH, model, head=head)
    engine.open(Ranks())
    outcome = two_steps(engine, tmp_path_factory.mktemp("measure"))
    engine.close()
    return outcome


def take_splits(found: Outcome) -> list[float]:
    """Take out of an outcome, and return, how often each step ran out of memory."""
    for figures in found.figures:
        figures.pop("micro_batch_tokens", None)
    return [figures.pop("memory_splits", 0.0) for figures in found.figures]


@pytest.mark.parametrize(("path", "zero_stage"), [*((DEEPSPEED, stage) for stage in range(4)), (FSDP, 2), (FSDP, 3)])
def test_sharded_engines_take_the_steps_of_plain_torch_and_out_of_memory_the_same(
    model, head, measure, tmp_path, path, zero_stage
):
    engine = engine_of(path, model, head=head, zero_stage=zero_stage)
    engine.open(Ranks())
    make_scarce(engine, most_tokens=MOST, during="forward" if head == "policy" else "backward", after_steps=1)
    found = two_steps(engine, tmp_path)
    assert take_splits(found) == [0, 1]
    assert_same(found, measure)
    engine.close()


@pytest.mark.parametrize(
    ("sharded", "zero_stage"),
    [pytest.param(DEEPSPEED, 1, marks=pytest.mark.long), (DEEPSPEED, 2), (DEEPSPEED, 3), (FSDP, 2)],
)
def test_sharded_engines_in_bfloat16_keep_float32_weights_as_plain_torch_does(model, tmp_path, sharded, zero_stage):
    outcomes = []
    for path, stage in ((TORCH, 0), (sharded, zero_stage)):
        engine = engine_of(path, model, dtype="bfloat16", zero_stage=stage)
        engine.open(Ranks())
        outcomes.append(two_steps(engine, tmp_path / path.partition(":")[2]))
        engine.close()
    for mine, theirs in zip(outcomes[0].figures, outcomes[1].figures, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-2, rel=2e-2)
    norms = [outcome.saved["model.norm.weight"] for outcome in outcomes]
    assert (norms[0] != 1).any()
    torch.testing.assert_close(norms[0], norms[1])


def test_a_published_version_arrives_through_shared_memory(model):
    from flowrl.engines.weights.base import unpack, verify
    from flowrl.engines.weights.manifest import decode_manifest
    from flowrl.engines.weights.shm import ShmFetcher

    engine = engine_of(TORCH, model)
    engine.open(Ranks())
    weights = engine.publish(0, None)
    manifest = decode_manifest(weights.manifest)
    buffers = ShmFetcher("test").fetch(manifest)
    verify(manifest, buffers, "test")
    found = {}
    for bucket, raw in zip(manifest.buckets, buffers, strict=True):
        found |= {name: tensor.clone() for name, tensor in unpack(bucket, raw)}
    expected = dict(engine.model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    engine.transfer(0)
    engine.retire(1)
    engine.close()


def rank_main(ranks: Ranks, task: Task, path: str, model: str, directory: str, settings: dict[str, Any]) -> None:
    """Be one rank in a process of its own; `scarce` says when rank 1 runs out of memory in the second step."""
    scarce = settings.pop("scarce", None)
    engine = engine_of(path, Path(model), **settings)
    engine.open(ranks)
    if scarce and ranks.rank == 1:
        make_scarce(engine, most_tokens=MOST, during=scarce, after_steps=1)
    engine.reader.max_logits = 320 * 9  # nine tokens at once, so that ranks need the head a different number of times
    if ranks.rank == 0:
        result = task(engine, Path(directory))
        (Path(directory) / "result").write_bytes(pickle.dumps(result))
        engine.close()
        return
    with contextlib.suppress(StageError) if task is failure else contextlib.nullcontext():
        engine.follow()
    engine.close()


def failure(engine, directory: Path) -> tuple[str, float]:
    start_s = time.monotonic()
    try:
        engine.accumulate(GROUPS, choose(FailsOnRankOne))
    except StageError as error:
        return str(error), time.monotonic() - start_s
    return "no error", 0.0


def averaged_steps(engine) -> list[dict[str, float]]:
    """Take two steps; returns their figures, and where the average of the weights is."""
    found = []
    for _ in range(2):
        figures = engine.accumulate(GROUPS, choose(WeightedTokens)) | engine.apply()
        sums = [float(tensor.double().abs().sum()) for tensor in engine._average.tensors.values()]
        found.append({**figures, "average": round(sum(sums), 6)})  # how torch splits a sum depends on its threads
    return found


def resumption(engine, directory: Path) -> list[Any]:
    """Return steps 3 and 4: straight on, again from the state after step 2, and from the state in `other`, if any."""
    averaged_steps(engine)
    engine.save_state(directory / "state")
    runs = [averaged_steps(engine)]
    for state in ("state", "other"):
        if (directory / state).exists():
            engine.load_state(directory / state)
            runs.append(averaged_steps(engine))
    return runs


def gathered(engine, directory: Path) -> dict[str, torch.Tensor]:
    """Return what a transport is given."""

    class Sender:
        def publish(self, version, tensors):
            self.tensors = {name: tensor.clone() for name, tensor in tensors}
            return b"{}", 1

        def close(self) -> None:
            pass

    sender = Sender()
    engine._publisher.open_sender = lambda: sender
    weights = engine.publish(0, None)
    assert weights.version == 0
    return sender.tensors


def few_groups(engine, directory: Path) -> dict[str, float]:
    return engine.accumulate(GROUPS[:1], choose(WeightedTokens)) | engine.apply()


def on_two_ranks(task: Task, path: str, model: Path, directory: Path, **settings: Any) -> Any:
    return on_ranks(2, task, path, model, directory, **settings)


def on_ranks(num_ranks: int, task: Task, path: str, model: Path, directory: Path, **settings: Any) -> Any:
    start_ranks(rank_main, (task, path, str(model), str(directory), settings), num_ranks)
    return pickle.loads((directory / "result").read_bytes())


@pytest.fixture
def float16(monkeypatch) -> None:
    """Let DeepSpeed train in float16 on processors that are slow at it, which it refuses."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


def scaled_engine(model: Path, power: int, zero_stage: int, **settings: Any):
    engine = engine_of(DEEPSPEED, model, dtype="float16", zero_stage=zero_stage, **settings)
    engine._further = {**engine._further, "fp16": {"initial_scale_power": power, "hysteresis": 1}}
    engine.open(Ranks())
    return engine


@pytest.mark.parametrize("zero_stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_an_overflow_in_float16_takes_no_step_and_lowers_the_scale(model, tmp_path, float16, zero_stage):
    engine = scaled_engine(model, 20, zero_stage)
    before, skipped = flat(engine.score(GROUPS)), 0
    while "grad_norm" not in (figures := two_halves(engine)):
        assert figures == {"lr": pytest.approx(1e-3), "loss_scale": 2.0 ** (20 - skipped), "skipped_frac": 1.0}
        assert flat(engine.score(GROUPS)) == before
        skipped += 1
    assert 0 < skipped < 20
    after = flat(engine.score(GROUPS))
    engine.close()
    plain = scaled_engine(model, 20 - skipped, zero_stage)
    expected = two_halves(plain)
    assert expected["skipped_frac"] == 0.0
    assert figures == expected
    assert after == flat(plain.score(GROUPS)) != before
    plain.close()


def test_an_overflow_in_float16_at_the_least_scale_ends_the_run_with_a_remedy(model, float16):
    engine = scaled_engine(model, 2, 2)
    objective = choose(WeightedTokens, entropy=1e30)  # too much for float16 whatever the scale
    for scale in (4.0, 2.0):
        engine.accumulate(GROUPS, objective)
        assert engine.apply()["loss_scale"] == scale
    engine.accumulate(GROUPS, objective)
    with pytest.raises(StageError, match="norm is inf in optimizer step 0; resume from the last checkpoint"):
        engine.apply()
    engine.close()


def two_halves(engine) -> dict[str, float]:
    """Take a step for what two calls accumulate."""
    for groups in (GROUPS[:4], GROUPS[4:]):
        engine.accumulate(groups, choose(WeightedTokens, entropy=0.01))
    return engine.apply()


@pytest.mark.parametrize(
    ("head", "path", "zero_stage", "scarce"),
    [
        ("policy", TORCH, 0, "backward"),
        ("policy", DEEPSPEED, 2, "backward"),
        ("policy", DEEPSPEED, 3, "forward"),
        ("policy", FSDP, 3, "backward"),
        pytest.param("policy", DEEPSPEED, 0, "forward", marks=pytest.mark.long),
        pytest.param("policy", DEEPSPEED, 1, "backward", marks=pytest.mark.long),
        pytest.param("value", DEEPSPEED, 3, "backward", marks=pytest.mark.long),
        pytest.param("policy", FSDP, 2, "forward", marks=pytest.mark.long),
        pytest.param("value", FSDP, 3, "forward", marks=pytest.mark.long),
    ],
    indirect=["head"],
)
def test_two_ranks_take_the_steps_of_one_also_when_one_of_them_runs_out_of_memory(
    model, head, measure, tmp_path, path, zero_stage, scarce
):
    found = on_two_ranks(two_steps, path, model, tmp_path, head=head, zero_stage=zero_stage, scarce=scarce)
    assert take_splits(found) == [0, 1]
    assert_same(found, measure)


@pytest.mark.parametrize(("path", "zero_stage"), [(DEEPSPEED, 2), (DEEPSPEED, 3), (FSDP, 3)])
def test_a_rank_without_work_keeps_step(model, tmp_path, path, zero_stage):
    engine = engine_of(TORCH, model)
    engine.open(Ranks())
    expected = few_groups(engine, tmp_path)
    found = on_two_ranks(few_groups, path, model, tmp_path, zero_stage=zero_stage, micro_batch_tokens=2048)
    assert found == pytest.approx(expected, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize(("path", "zero_stage"), [(TORCH, 0), (DEEPSPEED, 2), (DEEPSPEED, 3), (FSDP, 3)])
def test_training_continues_from_state_bit_by_bit_and_on_any_number_of_ranks(model, tmp_path, path, zero_stage):
    settings = {"zero_stage": zero_stage, "ema_decay": 0.9}
    on_one, on_two = tmp_path / "one", tmp_path / "two"

    def continued(state: Path) -> list[dict[str, float]]:
        engine = engine_of(path, model, **settings)
        engine.open(Ranks())
        engine.load_state(state)
        found = averaged_steps(engine)
        engine.close()
        return found

    first = engine_of(path, model, **settings)
    first.open(Ranks())
    straight, again = resumption(first, on_one)
    first.close()
    assert again == straight
    assert continued(on_one / "state") == straight
    shutil.copytree(on_one / "state", on_two / "other")
    of_two, two_again, of_one = on_two_ranks(resumption, path, model, on_two, **settings)
    # ZeRO-3 learns the order of modules in its first pass and sums gradients in other buckets after it.
    assert two_again == [pytest.approx(figures, rel=1e-6) for figures in of_two]
    for found in (of_two, of_one, continued(on_two / "state")):
        assert found == [pytest.approx(figures, abs=1e-5, rel=1e-5) for figures in straight]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # what was converted is gone


@pytest.mark.parametrize(("path", "tied"), [(DEEPSPEED, True), (DEEPSPEED, False), (FSDP, True)])
def test_sharded_parameters_are_published_whole_and_tied_ones_once(tmp_path, path, tied):
    source = tiny_model(tmp_path / "model", tied=tied)
    from safetensors.torch import load_file

    expected = load_file(source / "model.safetensors")
    found = on_two_ranks(gathered, path, source, tmp_path, zero_stage=3)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("path", [TORCH, DEEPSPEED, FSDP])
def test_a_followers_error_reaches_rank_0_with_its_reason(model, tmp_path, path):
    text, spent_s = on_two_ranks(failure, path, model, tmp_path)
    assert "accumulate: rank 1 failed: ZeroDivisionError: rank one's own trouble" in text
    assert spent_s < 30


def test_stage_0_below_float32_is_refused(model):
    engine = engine_of(DEEPSPEED, model, zero_stage=0, dtype="bfloat16")
    with pytest.raises(ConfigError, match="take zero_stage 1, 2 or 3"):
        engine.open(Ranks())
    engine.close()


def live_bytes() -> int:
    """Return the bytes of the host's tensors that are alive, shared storages once."""
    gc.collect()
    found = (each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found if each.numel()}
    return sum(storages.values())


@pytest.mark.parametrize("path", [DEEPSPEED, FSDP])
def test_a_frozen_model_at_stage_3_is_sharded_without_an_optimizer(model, path):
    plain = engine_of(TORCH, model)
    plain.open(Ranks())
    expected = flat(plain.score(GROUPS))
    size = sum(parameter.numel() * 4 for parameter in plain.model.parameters())
    plain.close()
    held = {}
    for frozen in (True, False):
        before = live_bytes()
        engine = engine_of(path, model, zero_stage=3, frozen=frozen)
        engine.open(Ranks())
        assert flat(engine.score(GROUPS)) == [pytest.approx(row, abs=1e-5) for row in expected]
        if frozen:
            with pytest.raises(StageError, match="the model is frozen"):
                engine.accumulate(GROUPS, choose(WeightedTokens))
        else:
            few_groups(engine, model)
        held[frozen] = (live_bytes() - before) / size
        engine.close()
    assert held[True] < 2 < held[False], held


def slept_through(engine, *, sleeps: bool) -> tuple[list[int], dict[str, str]]:
    """Take two steps, asleep wherever a turn may end; returns the bytes then, and the digests of what is sent."""
    asleep: list[int] = []

    def turn_ends() -> None:
        if sleeps:
            engine.sleep()
            asleep.append(live_bytes())
            engine.wake()

    engine.open(Ranks())
    turn_ends()
    for _ in range(2):
        engine.accumulate(GROUPS, choose(WeightedTokens))
        turn_ends()
        engine.apply()
        turn_ends()
    digests = tensor_digests(engine.publish(0, None).manifest)
    engine.close()
    return asleep, digests


@pytest.mark.parametrize(
    ("path", "dtype", "zero_stage"),
    [
        (TORCH, "float32", 0),
        (DEEPSPEED, "bfloat16", 2),
        (FSDP, "bfloat16", 3),
        pytest.param(TORCH, "bfloat16", 0, marks=pytest.mark.long),
        pytest.param(DEEPSPEED, "bfloat16", 1, marks=pytest.mark.long),
        pytest.param(DEEPSPEED, "bfloat16", 3, marks=pytest.mark.long),
        pytest.param(DEEPSPEED, "float32", 0, marks=pytest.mark.long),
    ],
)
def test_an_engine_that_sleeps_holds_little_and_goes_on_to_the_bit(model, tmp_path, path, dtype, zero_stage):
    settings = {"dtype": dtype, "zero_stage": zero_stage, "aside_dir": str(tmp_path)}
    awake = slept_through(engine_of(path, model, **settings), sleeps=False)[1]
    before = live_bytes()
    asleep, digests = slept_through(engine_of(path, model, **settings), sleeps=True)
    assert digests == awake
    num_parameters = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    assert max(asleep) - before < num_parameters, "of 16 bytes a parameter and more, less than one"
    assert not [*tmp_path.iterdir()]


def test_two_deepspeed_engines_share_a_process(model, tmp_path):
    policy = engine_of(DEEPSPEED, model, zero_stage=3)
    critic = engine_of(DEEPSPEED, model, head="value", zero_stage=2)
    for engine in (policy, critic):
        engine.open(Ranks())
    assert two_steps(policy, tmp_path / "policy").figures
    assert two_steps(critic, tmp_path / "critic").figures
    policy.close()
    assert critic.score(GROUPS)
    critic.close()


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "JambaForCausalLM"])
def test_mixtures_of_experts_learn_preferences_by_dpo(tmp_path, family):
    write_family(family, tmp_path)
    constant = Schedule(kind="constant")
    engine = engine_of(TORCH, tmp_path, lr=3e-3, schedule=constant, router_aux_loss=0.01, freeze=["*embed_tokens*"])
    engine.open(Ranks())
    pairs = [item for item in random_groups(seed=7, count=12) if len(item.responses) > 1][:4]
    pairs = [msgspec.structs.replace(item, responses=item.responses[:2], columns={}) for item in pairs]
    pairs = [
        msgspec.structs.replace(item, columns={"reference": [Buffer.floats(row) for row in rows]})
        for item, rows in zip(pairs, engine.score(pairs), strict=True)
    ]
    figures = []
    for _ in range(6):
        figures.append(engine.accumulate(pairs, Select(use="flowrl.algorithms.dpo:DPO", options={"beta": 0.5})))
        engine.apply()
    assert figures[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # the policy is the reference
    assert figures[-1]["loss"] < 0.5 * figures[0]["loss"]
    assert figures[-1]["accuracy"] == 1.0
    assert figures[0]["router_loss"] > 0
    engine.close()


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("mixtral")
    write_family("MixtralForCausalLM", directory)
    return directory


@pytest.fixture(scope="module")
def balanced(experts, tmp_path_factory) -> Outcome:
    """Return what plain torch does on one rank with the loss that uses experts evenly."""
    engine = engine_of(TORCH, experts, router_aux_loss=0.5)
    engine.open(Ranks())
    outcome = two_steps(engine, tmp_path_factory.mktemp("balanced"))
    engine.close()
    assert all(figures["router_loss"] > 2.0 for figures in outcome.figures)  # what two experts of four cost used evenly
    return outcome


def assert_balanced_alike(found: Outcome, expected: Outcome) -> None:
    """As assert_same, but an expert has few tokens: in more places a gradient is near nothing, and Adam's step not."""
    for mine, theirs in zip(found.scores, expected.scores, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    for mine, theirs in zip(found.figures, expected.figures, strict=True):
        assert mine == pytest.approx(theirs, abs=3e-5, rel=3e-5)
    for name, tensor in expected.saved.items():
        assert float((found.saved[name] - tensor).abs().mean()) < 2e-7, name


@pytest.mark.parametrize(("path", "zero_stage"), [*((DEEPSPEED, stage) for stage in range(4)), (FSDP, 3)])
def test_sharded_engines_balance_experts_as_plain_torch_does(experts, balanced, tmp_path, path, zero_stage):
    engine = engine_of(path, experts, router_aux_loss=0.5, zero_stage=zero_stage)
    engine.open(Ranks())
    assert_balanced_alike(two_steps(engine, tmp_path), balanced)
    engine.close()


@pytest.mark.parametrize(
    ("path", "zero_stage"), [(DEEPSPEED, 2), (DEEPSPEED, 3), pytest.param(FSDP, 3, marks=pytest.mark.long)]
)
def test_two_ranks_balance_experts_over_the_whole_step(experts, balanced, tmp_path, path, zero_stage):
    found = on_two_ranks(two_steps, path, experts, tmp_path, zero_stage=zero_stage, router_aux_loss=0.5)
    assert_balanced_alike(found, balanced)


def test_experts_are_published_as_their_checkpoint_names_them(tmp_path):
    from safetensors.torch import load_file
    from transformers import MixtralConfig, MixtralForCausalLM

    MixtralForCausalLM(
        MixtralConfig(vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                      num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    ).save_pretrained(tmp_path)  # fmt: skip
    tiny_tokenizer().save_pretrained(tmp_path)
    engine = engine_of(TORCH, tmp_path)
    engine.open(Ranks())
    expected = load_file(tmp_path / "model.safetensors")
    found = gathered(engine, tmp_path)
    assert found.keys() == expected.keys()
    assert any("experts.1" in name for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def test_an_objective_is_chosen_by_path_on_every_rank():
    assert msgspec.json.decode(msgspec.json.encode(choose(WeightedTokens)), type=Select) == choose(WeightedTokens)
