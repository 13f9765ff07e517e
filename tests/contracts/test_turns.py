"""Turns on shared devices with real engines on the CPU, where to sleep is to free the host's memory.

vLLM's build for CPUs cannot sleep: it is ended, and started again with the version that it served. DeepSpeed's states
go into a file.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.config import Select
from flowrl.engines.base import Ranks, Sampling, Schedule, TrainingConfig
from flowrl.engines.deepspeed import DeepSpeedEngine
from flowrl.engines.weights.manifest import tensor_digests
from flowrl.runs.retrain import first_difference
from flowrl.telemetry.events import Span
from flowrl.telemetry.timeline import read_timeline, timelines
from perf.memory import write_model
from tests.support.command import GRAPH, flowrl, plain_data, tiny_settings
from tests.support.policy import Policy, opened
from tests.unit.engines.test_packing import random_groups

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:Destroying context with unclosed socket:ResourceWarning"),
]

STEPS = 3
GAP = 1e-3  # nats, in float32
PARAMETERS = 60e6  # of the model of `large`, about


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("large"), 768, 8, 2048)


async def slept(model: Path, policy: Policy) -> tuple[int, list[list[Any]], list[float]]:
    """Return the bytes that a sleep freed, what was sampled before and after, and the canary's gaps."""
    engine = await opened(model)
    draw = partial(engine.generate, request_id="group", prompt_ids=[5, 60, 7, 8], num_samples=2, seed=3)
    try:
        gaps = [(await engine.update_weights(policy.publish(seed=seed))).mean_gap for seed in (None, 1)]
        before = await draw(sampling=Sampling(max_tokens=16))
        awake_bytes = resident_bytes()
        await engine.sleep()
        freed_bytes = awake_bytes - resident_bytes()
        await engine.wake()
        after = await draw(sampling=Sampling(max_tokens=16))
        gaps.append((await engine.update_weights(policy.publish(seed=2))).mean_gap)
    finally:
        await engine.close()
    drawn = [[(each.token_ids.tolist(), each.versions) for each in samples] for samples in (before, after)]
    return freed_bytes, drawn, gaps


def test_asleep_vllm_frees_its_memory_and_awake_it_serves_the_version_that_it_served(large: Path) -> None:
    policy = Policy(large, max_mean_gap=GAP)
    policy.hf.float()
    try:
        freed_bytes, (before, after), gaps = asyncio.run(slept(large, policy))
    finally:
        policy.sender.close()
    assert after == before, "version 1 is served as before, to the token"
    assert {span.version for _, spans in after for span in spans} == {1}
    assert max(gaps) < GAP
    print(f"vLLM freed {freed_bytes / 1e6:.0f} MB")
    assert freed_bytes > 4 * PARAMETERS, "its float32 weights, to say the least"


def test_asleep_deepspeed_frees_its_states_and_goes_on_to_the_bit(large: Path, tmp_path: Path) -> None:
    config = TrainingConfig(model=str(large), dtype="bfloat16", lr=1e-4, zero_stage=2, aside_dir=str(tmp_path),
                            schedule=Schedule(kind="constant"))  # fmt: skip
    objective, groups = Select(use="tests.unit.engines.test_trainer:WeightedTokens"), random_groups(seed=1, count=2)
    digests: list[dict[str, str]] = []
    for sleeps in (False, True):
        engine = DeepSpeedEngine(config, where="learner", name="turns")
        engine.open(Ranks())
        for _ in range(2):
            engine.accumulate(groups, objective)
            engine.apply()
            if sleeps:
                awake_bytes = resident_bytes()
                engine.sleep()
                freed_bytes = awake_bytes - resident_bytes()
                engine.wake()
        digests.append(tensor_digests(engine.publish(2, None).manifest))
        engine.close()
    assert digests[0] == digests[1]
    print(f"DeepSpeed freed {freed_bytes / 1e6:.0f} MB")
    assert freed_bytes > 14 * PARAMETERS, "float32 weights, both moments and bfloat16 weights are 14 bytes a parameter"


@pytest.mark.parametrize("runtime", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_run_in_turns_learns_bit_for_bit_what_one_without_them_learns(
    tiny: Path, tmp_path: Path, runtime: str
) -> None:
    rates: dict[str, Any] = {"learner.lr": 1e-3, "critic.lr": 1e-3}
    settings = tiny_settings(tiny, steps=STEPS, max_staleness=0, runtime=runtime, **plain_data(tmp_path), **rates)
    turns = ["generator.turns=true", *(f"{node}.share=learner" for node in ("generator", "critic", "reference"))]
    in_turns = [part for each in turns for part in ("--set", each)]
    for name, more in (("beside", []), ("in-turns", in_turns)):
        result = flowrl("run", GRAPH, "--name", name, *settings, *more, cwd=tmp_path)
        assert result.code == 0, result.text
    beside, taken = (tmp_path / "runs" / name for name in ("beside", "in-turns"))
    assert first_difference(beside, taken, range(STEPS)) is None
    happened = [each for path in timelines(taken) for each in read_timeline(path)]
    moved = {each.node for each in happened if isinstance(each, Span) and each.name in ("sleep", "wake")}
    assert moved >= {"generator", "learner", "critic", "reference"}
    assert "waiting for devices" in result.text
