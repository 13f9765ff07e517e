"""Time on shared devices by hand-reckoned cases, and that what is drawn follows from the request alone."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.engines.base import GenerationConfig, Sampling, TokenGroup, TrainingConfig
from flowrl.messages import Buffer, VersionSpan, Weights
from flowrl.simulation.clock import run_virtual
from flowrl.simulation.costs import CallCost, DecodeCost, NodeProfile, Profile, Spread
from flowrl.simulation.devices import Decoder, Device
from flowrl.simulation.fake import CURRENT, FakeGeneration, FakeTraining, SimulationState, draw_lengths, scatter

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from flowrl.messages import Sample

SPREAD = Spread(quantiles=(1.0, 4.0, 9.0, 40.0), shared=0.5)


def ends(*timed: tuple[float, Coroutine[Any, Any, Any]]) -> list[float]:
    """Start each coroutine at its time; returns when they ended."""

    async def one(start_s: float, body: Coroutine[Any, Any, Any]) -> float:
        await asyncio.sleep(start_s)
        await body
        return asyncio.get_running_loop().time()

    async def main() -> list[float]:
        return await asyncio.gather(*(one(*each) for each in timed))

    return run_virtual(main())


def test_two_on_one_core_take_twice_as_long() -> None:
    core = Device(1)
    assert ends((0.0, core.take(1.0)), (0.0, core.take(1.0))) == pytest.approx([2.0, 2.0])


def test_a_core_each_is_not_shared() -> None:
    cores = Device(2)
    assert ends((0.0, cores.take(1.0)), (0.0, cores.take(2.0))) == pytest.approx([1.0, 2.0])


def test_what_comes_later_slows_only_the_rest_of_what_runs() -> None:
    core = Device(1)
    # alone for 0.5 s, shared until both have had 0.5 s more, then the second alone for its last 0.5 s
    assert ends((0.0, core.take(1.0)), (0.5, core.take(1.0))) == pytest.approx([1.5, 2.0])


def test_threads_weigh_as_many_cores() -> None:
    cores = Device(4)
    assert ends((0.0, cores.take(1.0, 4)), (0.0, cores.take(1.0, 4))) == pytest.approx([2.0, 2.0])


def test_two_that_work_at_once_slow_each_other_on_cores_of_their_own() -> None:
    cores = Device(2, 0.2)
    # 2 s of the first and all of the second at 0.8 of the speed, then the first alone for its last 0.4 s
    assert ends((0.0, cores.take(2.0)), (0.0, cores.take(1.6))) == pytest.approx([2.4, 2.0])
    assert ends((0.0, Device(2, 0.2).take(1.0, 2))) == pytest.approx([1.0]), "what it costs is what it takes alone"


def test_decoding_is_slowed_by_what_computes_beside_it() -> None:
    cores = Device(2, 0.2)
    d = decoder(cores, step_s=0.1, sample_s=0.0)
    assert ends((0.0, d.decode([8], 1)), (0.0, cores.take(0.8))) == pytest.approx([1.0, 1.0])


def test_a_cancelled_call_gives_its_share_back() -> None:
    core = Device(1)

    async def cancelled() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await core.take(10.0)

    # half speed for 0.5 s, then alone: 0.25 s done, 0.75 s left
    assert ends((0.0, core.take(1.0)), (0.0, cancelled())) == pytest.approx([1.25, 0.5])


@pytest.mark.parametrize("seed", range(20))
def test_a_device_does_no_more_and_no_less_than_its_capacity(seed: int) -> None:
    draw = random.Random(seed)
    cores = Device(draw.choice([1, 2, 3]))
    jobs = [(draw.random() * 3, draw.random()) for _ in range(30)]
    last_s = max(ends(*((start_s, cores.take(work_s)) for start_s, work_s in jobs)))
    assert cores.busy_s * cores.capacity == pytest.approx(sum(work_s for _, work_s in jobs))
    assert last_s >= sum(work_s for _, work_s in jobs) / cores.capacity - 1e-6


def decoder(
    device: Device | None = None,
    *,
    max_running: int = 64,
    step_s: float = 0.1,
    sample_s: float = 0.05,
    prompt_token_s: float = 0.0,
) -> Decoder:
    cost = DecodeCost(step_s=step_s, sample_s=sample_s, prompt_token_s=prompt_token_s)
    made = Decoder(cost, device or Device(8), max_running=max_running)
    made.serve(0)
    return made


def test_speed_follows_how_many_run() -> None:
    d = decoder()
    # three run for 5 steps of 0.25 s, two for 5 of 0.2 s, one for 10 of 0.15 s
    assert ends((0.0, d.decode([5], 1)), (0.0, d.decode([10, 20], 1))) == pytest.approx([1.25, 3.75])


def test_a_request_that_joins_slows_those_that_run() -> None:
    d = decoder(step_s=0.0, sample_s=0.1)
    # 5 tokens alone in 0.5 s, then both at half speed
    assert ends((0.0, d.decode([10], 1)), (0.5, d.decode([5], 1))) == pytest.approx([1.5, 1.5])


def test_samples_beyond_the_most_that_run_wait_their_turn() -> None:
    d = decoder(max_running=2, step_s=0.1, sample_s=0.0)
    seen: list[float] = []

    async def look() -> None:
        seen.append(d.slots.filled_s())

    decoded = (0.0, d.decode([10, 10], 1)), (0.0, d.decode([10], 1))
    assert ends(*decoded, (3.0, look())) == pytest.approx([1.0, 2.0, 3.0])
    assert seen == pytest.approx([1.5])  # seconds: both slots for one, then half of them


def test_a_prompt_is_read_once_for_all_its_samples() -> None:
    d = decoder(step_s=0.1, sample_s=0.0, prompt_token_s=0.01)
    assert ends((0.0, d.decode([10, 10, 10], 50))) == pytest.approx([1.5])


def test_decoding_stands_still_only_while_a_prompt_is_read() -> None:
    d = decoder(step_s=0.1, sample_s=0.0, prompt_token_s=0.01)
    # the first reads for 0.5 s and has 5 tokens at 1.0, then the second reads for 0.5 s and both go on
    assert ends((0.0, d.decode([10], 50)), (1.0, d.decode([10], 50))) == pytest.approx([2.0, 2.5])


def test_decoding_shares_its_device_with_other_work() -> None:
    core = Device(1)
    d = decoder(core, step_s=0.1, sample_s=0.0)
    assert ends((0.0, d.decode([10], 1)), (0.0, core.take(1.0))) == pytest.approx([2.0, 2.0])


def test_a_cancelled_request_leaves_its_place() -> None:
    d = decoder(step_s=0.0, sample_s=0.1)

    async def cancelled() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await d.decode([100], 1)

    assert ends((0.0, d.decode([10], 1)), (0.0, cancelled())) == pytest.approx([1.5, 1.0])
    assert d.num_running == 0


def test_what_is_slower_than_enough_samples_is_given_up() -> None:
    d = decoder(step_s=0.1, sample_s=0.0)
    found: list[list[list[VersionSpan]]] = []

    async def enough() -> None:
        found.append(await d.decode([100, 5, 10, 200], 1, enough=2))

    assert ends((0.0, enough()), (0.0, d.decode([20], 1))) == pytest.approx([1.0, 2.0])
    assert found == [[[], [VersionSpan(0, 0, 5)], [VersionSpan(0, 0, 10)], []]]
    assert d.num_running == 0


@pytest.mark.parametrize("seed", range(20))
def test_all_tokens_are_paid_for_whatever_the_arrivals(seed: int) -> None:
    draw = random.Random(seed)
    device = Device(1)
    d = decoder(device, max_running=draw.randint(1, 5), step_s=0.0, sample_s=0.01)
    requests = [(draw.random(), [draw.randint(1, 30) for _ in range(draw.randint(1, 4))]) for _ in range(20)]
    ends(*((start_s, d.decode(lengths, 1)) for start_s, lengths in requests))
    assert device.busy_s == pytest.approx(0.01 * sum(sum(lengths) for _, lengths in requests))


@pytest.mark.parametrize("unit", [1e-9, 1e-6, 1e3])
def test_the_scale_of_time_does_not_matter(unit: float) -> None:
    d = decoder(step_s=unit, sample_s=0.0)
    assert ends((0.0, d.decode([1000], 1)), (0.0, d.decode([500], 1))) == pytest.approx([1000 * unit, 500 * unit], 1e-3)


def profile(**node: Any) -> Profile:
    return Profile(format=1, response_tokens=SPREAD, nodes={"generator": NodeProfile(**node)})


def generation(state: SimulationState, **config: Any) -> FakeGeneration:
    token = CURRENT.set(state)
    try:
        return FakeGeneration(GenerationConfig(model="none", **config), where="generator.0", node="generator")
    finally:
        CURRENT.reset(token)


def generate(order: Sequence[int]) -> dict[int, tuple[list[int], float]]:
    """Send one request for each seed, in this order and at once; returns lengths and the end by seed."""
    found: dict[int, tuple[list[int], float]] = {}

    async def main() -> None:
        engine = generation(SimulationState(profile(decode=DecodeCost(step_s=0.1, sample_s=0.01))))

        async def one(seed: int) -> None:
            samples = await engine.generate(
                request_id=f"{seed}", prompt_ids=[1], num_samples=4, seed=seed, sampling=Sampling(max_tokens=30)
            )
            end_s = asyncio.get_running_loop().time()
            found[seed] = [len(sample.token_ids) for sample in samples], round(end_s, 6)

        await asyncio.gather(*map(one, order))

    run_virtual(main())
    return found


def test_what_is_generated_and_when_does_not_depend_on_the_order_of_arrival() -> None:
    seeds = list(range(12))
    assert generate(seeds) == generate(seeds[::-1]) == generate(random.Random(0).sample(seeds, 12))


def updated(on_update: str, keep_cache: bool) -> tuple[list[Sample], float, float]:
    """Update after 2 of 10 tokens; returns the samples, when they and when the update ended."""

    async def main() -> tuple[list[Sample], float, float]:
        calls = {"update_pause": CallCost(call_s=1.0), "update_transfer": CallCost(call_s=0.2)}
        nodes = {"generator": NodeProfile(decode=DecodeCost(step_s=0.1, prompt_token_s=0.01), calls=calls)}
        state = SimulationState(Profile(format=1, response_tokens=Spread(quantiles=(10.0,)), nodes=nodes))
        engine = generation(state, on_update=on_update, keep_cache=keep_cache)
        now = asyncio.get_running_loop().time
        weights = [Weights(version=v, transport="", manifest=b"", canary=None, size_bytes=0) for v in (0, 1)]
        await engine.update_weights(weights[0])
        began_s = now()
        sampling = asyncio.ensure_future(
            engine.generate(request_id="a", prompt_ids=[1], num_samples=1, seed=0, sampling=Sampling(max_tokens=99))
        )
        await asyncio.sleep(0)
        await engine.update_weights(weights[1])
        updated_s = now() - began_s
        return await sampling, now() - began_s, updated_s

    return run_virtual(main())


@pytest.mark.parametrize(
    ("on_update", "keep_cache", "versions", "end_s", "updated_s"),
    [  # the prompt is read in 0.01 s, and again with the 1.9 tokens that are there
        ("keep", False, [VersionSpan(0, 0, 2), VersionSpan(1, 2, 10)], 2.01 + 0.029, 1.2),
        ("keep", True, [VersionSpan(0, 0, 2), VersionSpan(1, 2, 10)], 2.01, 1.2),
        ("resume", False, [VersionSpan(0, 0, 2), VersionSpan(1, 2, 10)], 2.01 + 0.029, 1.2),
        ("abort", False, [VersionSpan(1, 0, 10)], 2.2, 1.2),
        ("wait", False, [VersionSpan(0, 0, 10)], 2.01, 2.01),
    ],
)
def test_an_update_treats_what_is_in_flight_as_told(
    on_update: str, keep_cache: bool, versions: list[VersionSpan], end_s: float, updated_s: float
) -> None:
    samples, ended_s, up_s = updated(on_update, keep_cache)
    assert samples[0].versions == versions
    assert (ended_s, up_s) == pytest.approx((end_s, updated_s))


def test_lengths_keep_to_their_spread_and_to_the_most_allowed() -> None:
    drawn = [length for seed in range(2000) for length in draw_lengths(SPREAD, seed=seed, num=4, most=30)]
    assert max(drawn) == 30
    assert min(drawn) == 1
    assert sorted(drawn)[len(drawn) // 3] == pytest.approx(4, abs=0.6)


def test_samples_of_a_prompt_are_alike_as_far_as_the_spread_says() -> None:
    alike = Spread(quantiles=(1.0, 100.0), shared=1.0)
    assert len(set(draw_lengths(alike, seed=1, num=8, most=100))) == 1
    apart = Spread(quantiles=(1.0, 100.0), shared=0.0)
    assert len(set(draw_lengths(apart, seed=1, num=8, most=100))) > 4


def test_scatter_has_mean_one_and_comes_from_its_seed() -> None:
    drawn = [scatter(0.5, str(seed)) for seed in range(4000)]
    assert sum(drawn) / len(drawn) == pytest.approx(1.0, abs=0.03)
    assert scatter(0.5, "7") == drawn[7]


def test_a_training_call_costs_by_its_tokens_and_ranks() -> None:
    costs = {"train": CallCost(call_s=1.0, token_s=0.01), "score": CallCost(token_s=0.1)}
    state = SimulationState(Profile(format=1, nodes={"learner": NodeProfile(calls=costs)}))
    token = CURRENT.set(state)
    engine = FakeTraining(TrainingConfig(model="none"), where="learner.0", node="learner", speed=2.0)
    CURRENT.reset(token)
    group = TokenGroup(prompt_ids=Buffer.ints([1] * 20), responses=[Buffer.ints([0] * 30), Buffer.ints([0] * 10)])
    engine.accumulate([group, group], objective=None)  # type: ignore[arg-type]
    assert engine.last_duration_s == pytest.approx((1.0 + 0.01 * 160) / 2)
    assert [len(row) for row in engine.score([group])[0]] == [30, 10]
    assert engine.last_duration_s == pytest.approx(0.1 * 80 / 2)
