"""vLLM beside a learner on one device: versions arrive and are proved, the pause is told, sleeping frees the device."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from flowrl.config import widen
from flowrl.engines.base import GenerationConfig, Sampling
from flowrl.engines.vllm import VllmEngine
from flowrl.messages import Buffer
from tests.gpu.test_learner import OBJECTIVE, groups_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flowrl.engines.base import UpdateReport
    from flowrl.messages import Sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Destroying context with unclosed socket:ResourceWarning"),
]

CANARY = Buffer.ints([40 + (7 * i) % 200 for i in range(24)])
RUNNING = {"cuda": 128, "cpu": 8}
TOKENS = {"cuda": 256, "cpu": 32}  # of a response


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def generator(model: Path, device: str, nodes: dict[str, Any], loop: asyncio.Runner) -> Iterator[VllmEngine]:
    config = widen(GenerationConfig, nodes["generator"], model=str(model), turns=device == "cuda")
    engine = VllmEngine(config, where="generator", receiver_index=0)
    loop.run(engine.open())
    yield engine
    loop.run(engine.close())


async def answers(generator: VllmEngine, number: int, max_tokens: int) -> list[list[Sample]]:
    sampling = Sampling(max_tokens=max_tokens, ignore_stop=True)
    return await asyncio.gather(*(
        generator.generate(request_id=str(i), prompt_ids=[5 + i % 200, 7, 9], num_samples=1, seed=i, sampling=sampling)
        for i in range(number)
    ))  # fmt: skip


async def updated(generator: VllmEngine, learner: Any, version: int) -> tuple[UpdateReport, float]:
    """Bring a version of the learner to the generator; returns the report and the seconds that publishing took."""
    start_s = time.perf_counter()
    weights = await asyncio.to_thread(learner.publish, version, CANARY)
    publish_s = time.perf_counter() - start_s
    async with asyncio.TaskGroup() as both:
        both.create_task(asyncio.to_thread(learner.transfer, version))
        report = both.create_task(generator.update_weights(weights))
    learner.retire(version)
    return report.result(), publish_s


def test_versions_are_proved_and_loaded_while_samples_are_decoded(learner, generator, loop, device, figure) -> None:
    async def run() -> tuple[UpdateReport, float, list[list[Sample]]]:
        await updated(generator, learner, 0)
        learner.accumulate(groups_of(2), OBJECTIVE)
        learner.apply()
        samples: list[list[Sample]] = []
        is_loaded = asyncio.Event()

        async def decode() -> None:
            while not is_loaded.is_set():
                samples.extend(await answers(generator, RUNNING[device], TOKENS[device]))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(decode())
            await answers(generator, 1, 4)
            report, publish_s = await updated(generator, learner, 1)
            is_loaded.set()
        return report, publish_s, [*samples, *await answers(generator, 1, 4)]

    report, publish_s, samples = loop.run(run())
    assert report.mean_gap < report.allowed_gap
    assert {span.version for (sample,) in samples for span in sample.versions} == {0, 1}
    figure("update, publish s", f"{publish_s:.3f}")
    figure("update, transfer s", f"{report.transfer_s:.3f}")
    figure("update, pause of generation s", f"{report.pause_s:.3f}")
    figure("canary, nats", f"{report.mean_gap:.4f}")


def test_serving_speed_is_told(learner, generator, loop, device, figure) -> None:
    loop.run(updated(generator, learner, 2))
    start_s = time.perf_counter()
    samples = loop.run(answers(generator, RUNNING[device], TOKENS[device]))
    assert all(len(sample.token_ids) == TOKENS[device] for (sample,) in samples)
    figure("vLLM, tokens/s", f"{RUNNING[device] * TOKENS[device] / (time.perf_counter() - start_s):.0f}")


def test_sleeping_frees_the_device_and_a_version_wakes_it(learner, generator, loop, device, figure) -> None:
    if device != "cuda":
        pytest.skip("vLLM's CPU build does not sleep")
    loop.run(updated(generator, learner, 3))
    before = [sample.token_ids.tolist() for (sample,) in loop.run(answers(generator, 4, 16))]
    for level in (1, 2):
        awake, _ = torch.cuda.mem_get_info()
        loop.run(generator._engine.sleep(level=level))
        asleep, _ = torch.cuda.mem_get_info()
        figure(f"sleep level {level}, GB freed", f"{(asleep - awake) / 1e9:.2f}")
        assert asleep - awake > generator.config.gpu_memory_utilization * torch.cuda.mem_get_info()[1] / 2
        start_s = time.perf_counter()
        loop.run(generator._engine.wake_up())
        if level == 2:  # the weights are gone; the next version brings them
            loop.run(updated(generator, learner, 4))
        figure(f"wake from level {level}, s", f"{time.perf_counter() - start_s:.2f}")
        after = [sample.token_ids.tolist() for (sample,) in loop.run(answers(generator, 4, 16))]
        assert after == before, "the same weights, whatever lay between"
