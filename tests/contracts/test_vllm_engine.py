"""VllmEngine on a real vLLM: seeds, log-probs against Hugging Face, weight updates in flight, proofs and failures.

float32 on both sides, so that equal weights agree within 1e-4 nats and stale ones do not. One engine serves the tests
that leave it fit for use; those that break one open their own.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from flowrl.engines.base import GenerationConfig, Sampling
from flowrl.engines.vllm import VllmEngine
from flowrl.engines.vllm_answers import AnsweringVllm
from flowrl.errors import ConfigError, FlowrlError, ModelError, ProofError, StageError, TransferError
from tests.support.families import write_family
from tests.support.policy import Policy, engine_of, opened
from tests.support.tiny import tiny_model

if TYPE_CHECKING:
    from flowrl.messages import Sample

pytestmark = [
    pytest.mark.slow,
    # vLLM's socket threads leave closing to their zmq context, which closes the sockets and says so.
    pytest.mark.filterwarnings("ignore:Destroying context with unclosed socket:ResourceWarning"),
]

TOLERANCE = 1e-4  # nats, between vLLM and Hugging Face in float32
PROMPTS = [[5 + i, 60 + 3 * i, 7, 8 + i] * (1 + i % 3) for i in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loop():
    """Give all tests one event loop, which an engine is bound to."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def engine(model, loop):
    engine = loop.run(opened(model, kind=AnsweringVllm))
    yield engine
    loop.run(engine.close())
    gc.collect()


@pytest.fixture
def policy(model):
    policy = Policy(model)
    yield policy
    policy.sender.close()


@pytest.fixture
def served(engine, policy, loop):
    """Return the shared engine under version 0 of the policy."""
    loop.run(engine.update_weights(policy.publish()))
    return engine


def draw(engine: VllmEngine, prompt: list[int], *, seed: int = 11, num_samples: int = 1, **sampling: Any):
    settings = Sampling(**{"max_tokens": 24, **sampling})
    return engine.generate(request_id="group", prompt_ids=prompt, num_samples=num_samples, seed=seed, sampling=settings)


async def together(*coroutines):
    return await asyncio.gather(*coroutines)


def tokens(samples: list[Sample]) -> list[list[int]]:
    return [sample.token_ids.tolist() for sample in samples]


def change_first_byte(path: Path) -> None:
    with path.open("r+b") as file:
        first = file.read(1)[0]
        file.seek(0)
        file.write(bytes([first ^ 1]))


async def once_running(engine: VllmEngine) -> None:
    """Wait until the engine has answered something else, so that what was sent before is being decoded."""
    await draw(engine, [9, 9], max_tokens=4)


def test_nothing_is_served_before_the_first_version(model):
    engine = engine_of(model)
    with pytest.raises(StageError, match="no policy version"):
        asyncio.run(draw(engine, [5, 6]))


def with_options(model: Path, **options: Any) -> VllmEngine:
    return VllmEngine(GenerationConfig(model=str(model), dtype="float32"), where="generator", **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_cache_dtype": "banana"}, r"kv_cache_dtype: is 'banana', which vLLM refuses \(.*'auto', "),
        ({"quantization": "fp9"}, r"quantization: is 'fp9', which vLLM refuses \(Unknown quantization method: fp9"),
        ({"quantization": "fp8"}, "float32 is not supported for quantization method fp8"),
        ({"max_num_batched_tokens": 1}, r"tokens: is 1, .*\(1\) is smaller than max_model_len \(512\)"),
        ({"enable_chunked_prefill": True}, "enable_chunked_prefill: is True, .* whose prompt is read in parts"),
        ({"seed": "x", "block_size": 32}, "engine_options.seed: is 'x', .*a valid integer"),
        ({"pipeline_parallel_size": "two"}, "pipeline_parallel_size: is 'two'"),
        ({"enable_lora": True, "max_loras": 0}, r"engine_options: is {.*}, .*greater than or equal to 1"),
    ],
)  # fmt: skip
def test_a_value_that_vllm_refuses_is_told_of_without_loading_the_model(model, options, said):
    with pytest.raises(ConfigError, match=said) as refused:
        with_options(model, **options).try_options()
    assert str(refused.value).startswith("generator.engine_options")
    assert len(str(refused.value).splitlines()) == 1


def test_options_that_vllm_takes_are_taken_and_only_they_are_tried(model):
    with_options(model, kv_cache_dtype="fp8", enable_prefix_caching=False).try_options()
    assert with_options(model, block_size=32).is_untried
    assert not with_options(model).is_untried
    for_gpus = GenerationConfig(model=str(model), gpus=1)  # which are not here
    assert not VllmEngine(for_gpus, where="generator", block_size=32).is_untried


def test_the_model_is_served_as_it_is_where_nothing_is_trained(engine, policy, loop):
    loop.run(engine.serve_loaded())
    (sample,) = loop.run(draw(engine, PROMPTS[0]))
    assert [span.version for span in sample.versions] == [0]
    assert policy.gap(PROMPTS[0], sample) < TOLERANCE


def test_a_sample_is_the_same_alone_and_in_a_batch(served, loop):
    batched = loop.run(together(*(draw(served, p, seed=100 * i, num_samples=3) for i, p in enumerate(PROMPTS))))
    for i, prompt in enumerate(PROMPTS):
        for k in range(3):
            (alone,) = loop.run(draw(served, prompt, seed=100 * i + k))
            assert alone.token_ids.tolist() == batched[i][k].token_ids.tolist(), (i, k)
    assert len({tuple(ids) for ids in tokens(batched[0])}) == 3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_hugging_face_at_the_sampling_temperature(served, policy, loop, temperature):
    groups = loop.run(together(*(draw(served, p, num_samples=2, temperature=temperature) for p in PROMPTS)))
    gaps = [policy.gap(p, s, temperature) for p, group in zip(PROMPTS, groups, strict=True) for s in group]
    assert max(gaps) < TOLERANCE


def test_a_prompt_is_computed_once_for_its_samples_and_again_for_the_next_version(served, policy, loop, monkeypatch):
    prompt = [5 + place for place in range(70)]
    cached: list[int] = []
    generate = served._engine.generate

    async def watched(*given: Any, **named: Any):
        async for output in generate(*given, **named):
            cached.append(output.num_cached_tokens)
            yield output

    monkeypatch.setattr(served._engine, "generate", watched)
    samples = loop.run(draw(served, prompt, num_samples=4))
    assert sorted(cached) == [0, 64, 64, 64], "whole blocks of 32 tokens"
    assert max(policy.gap(prompt, sample) for sample in samples) < TOLERANCE
    loop.run(served.update_weights(policy.publish(seed=3)))
    del cached[:]
    samples = loop.run(draw(served, prompt, num_samples=2))
    assert sorted(cached) == [0, 64]
    assert max(policy.gap(prompt, sample) for sample in samples) < TOLERANCE


def test_tokens_are_weighed_against_each_other_alone(served, policy, loop):
    tokens = [36, 9, 300]
    found = loop.run(served.among(PROMPTS[0], tokens))
    alone = [float(np.exp(policy.logprobs(PROMPTS[0], [token])[0])) for token in tokens]
    assert found == pytest.approx([each / sum(alone) for each in alone], abs=TOLERANCE)
    assert max(found) - min(found) > 0.05


def test_logprobs_are_renormalised_under_top_k(served, policy, loop):
    (sample,) = loop.run(draw(served, PROMPTS[0], top_k=1))
    assert np.abs(sample.logprobs.numpy()).max() < TOLERANCE
    assert policy.gap(PROMPTS[0], sample) > 0.1


def test_a_response_ends_with_the_stop_token_and_its_text_has_none(served, loop):
    (free,) = loop.run(draw(served, PROMPTS[1], max_tokens=12))
    assert (free.finish, len(free.token_ids)) == ("length", 12)
    ids = free.token_ids.tolist()
    (stopped,) = loop.run(draw(served, PROMPTS[1], max_tokens=12, stop_token_ids=[ids[5]]))
    assert stopped.finish == "stop"
    assert stopped.token_ids.tolist() == ids[: ids.index(ids[5]) + 1]
    (ended,) = loop.run(draw(served, [5, 6], seed=find_eos(served, loop), max_tokens=200))
    assert ended.token_ids.tolist()[-1] == 2
    assert "<|im_end|>" not in ended.text


def find_eos(engine: VllmEngine, loop: asyncio.Runner) -> int:
    """Return a seed whose response ends with the end-of-sequence token."""
    samples = loop.run(draw(engine, [5, 6], seed=0, num_samples=24, max_tokens=200))
    return next(seed for seed, sample in enumerate(samples) if sample.finish == "stop")


def test_defaults_of_generation_config_do_not_reach_the_distribution(served, model, policy, loop):
    # vLLM reads this file when it starts; the shared engine proves nothing, so a second one is opened.
    other = model.parent / "with-defaults"
    other.mkdir(exist_ok=True)
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    defaults = json.loads((model / "generation_config.json").read_bytes())
    defaults |= {"temperature": 0.1, "top_k": 3, "repetition_penalty": 2.0, "eos_token_id": [2, 77], "do_sample": True}
    (other / "generation_config.json").write_text(json.dumps(defaults))

    async def scenario():
        engine = await opened(other)
        try:
            await engine.update_weights(policy.publish())
            return engine._stop_ids, await together(*(draw(engine, prompt) for prompt in PROMPTS))
        finally:
            await engine.close()

    stops, groups = loop.run(scenario())
    assert stops == [2, 77]
    expected = loop.run(together(*(draw(served, prompt, stop_token_ids=[77]) for prompt in PROMPTS)))
    assert [tokens(group) for group in groups] == [tokens(group) for group in expected]


def test_an_update_splits_a_running_request_at_the_token_it_takes_effect(served, policy, loop):
    before = policy.version

    async def scenario():
        running = asyncio.ensure_future(draw(served, PROMPTS[2], num_samples=2, max_tokens=400, temperature=0.7))
        await once_running(served)
        report = await served.update_weights(policy.publish(seed=1))
        return await running, report

    samples, report = loop.run(scenario())
    assert report.mean_gap < TOLERANCE
    assert report.version == policy.version == before + 1
    for sample in samples:
        first, second = sample.versions
        assert (first.version, second.version) == (before, policy.version)
        assert (first.start, first.end, second.end) == (0, second.start, len(sample.token_ids))
        assert policy.gap(PROMPTS[2], sample, 0.7, start=second.start) < TOLERANCE
        assert policy.gap(PROMPTS[2], sample, 0.7) > 0.1  # its old tokens are not the new weights'


def test_after_an_update_the_logprobs_are_those_of_the_new_weights(served, policy, loop):
    old = loop.run(draw(served, PROMPTS[3], num_samples=2))
    loop.run(served.update_weights(policy.publish(seed=2)))
    new = loop.run(draw(served, PROMPTS[3], num_samples=2))  # same prompt: its old prefix must not be reused
    assert all(policy.gap(PROMPTS[3], sample) < TOLERANCE for sample in new)
    assert all(policy.gap(PROMPTS[3], sample) > 0.1 for sample in old)
    assert {span.version for sample in new for span in sample.versions} == {policy.version}


def test_a_sample_of_a_version_not_yet_proved_is_held_back(served, policy, loop, monkeypatch):
    async def scenario():
        answered, proving, release = asyncio.Event(), asyncio.Event(), asyncio.Event()
        request, prove = VllmEngine._request, VllmEngine._prove

        async def seen(*arguments: Any) -> Any:
            output = await request(*arguments)
            answered.set()
            return output

        async def delayed(*arguments: Any) -> Any:
            proving.set()
            await release.wait()
            return await prove(*arguments)

        monkeypatch.setattr(VllmEngine, "_request", seen)
        monkeypatch.setattr(VllmEngine, "_prove", delayed)
        update = asyncio.ensure_future(served.update_weights(policy.publish(seed=13)))
        await proving.wait()
        sample = asyncio.ensure_future(draw(served, PROMPTS[0]))
        await answered.wait()
        done, _ = await asyncio.wait({sample}, timeout=0.2)
        release.set()
        await update
        return done, await sample

    done, (sample,) = loop.run(scenario())
    assert not done
    assert [span.version for span in sample.versions] == [policy.version]


def test_cancelling_generate_aborts_its_requests(served, loop):
    async def scenario():
        task = asyncio.ensure_future(draw(served, PROMPTS[0], num_samples=8, max_tokens=480))
        await once_running(served)
        running = served.num_running
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await once_running(served)
        return running, served.num_running, served._engine.output_processor.get_num_unfinished_requests()

    assert loop.run(scenario()) == (8, 0, 0)


def test_of_spare_samples_the_first_to_end_are_returned_and_the_others_aborted(served, loop):
    sampling = Sampling(max_tokens=200)

    async def drawn(num_samples: int, num_spare: int) -> list[list[int]]:
        found = await served.generate(
            request_id=f"spare {num_spare}", prompt_ids=PROMPTS[0], num_samples=num_samples, seed=7, sampling=sampling,
            num_spare=num_spare,
        )  # fmt: skip
        return [sample.token_ids.tolist() for sample in found]

    all_six, two = loop.run(drawn(6, 0)), loop.run(drawn(2, 4))
    assert served.num_running == 0
    places = [all_six.index(each) for each in two]
    assert places == sorted(places)
    others = [len(each) for place, each in enumerate(all_six) if place not in places]
    assert max(map(len, two)) <= min(others)


def test_a_prompt_without_room_for_a_response_is_refused_with_the_numbers(served, loop):
    with pytest.raises(StageError, match="512 tokens leaves no room for a response in max_model_len=512"):
        loop.run(draw(served, [5] * 512))


def test_many_long_prompts_with_seeds_are_not_split(served, policy, loop):
    prompts = [[5 + (i * j) % 200 for j in range(300)] for i in range(8)]
    groups = loop.run(together(*(draw(served, prompt, num_samples=4, max_tokens=8) for prompt in prompts)))
    assert max(policy.gap(p, s) for p, group in zip(prompts, groups, strict=True) for s in group) < TOLERANCE


def test_bytes_that_never_come_are_a_transfer_error_and_the_old_version_stays(served, policy, loop):
    before = loop.run(draw(served, PROMPTS[0]))
    weights = policy.publish(seed=3)
    Path(json.loads(weights.manifest)["path"]).unlink()
    with pytest.raises(TransferError, match="cannot be read"):
        loop.run(served.update_weights(weights))
    assert tokens(loop.run(draw(served, PROMPTS[0]))) == tokens(before)


def test_a_sender_that_never_sends_is_a_transfer_error_within_the_deadline(model, loop):
    policy = Policy(model, transport="broadcast", timeout_s=1.0)
    weights = policy.publish()
    policy.sender.close()

    async def scenario():
        engine = await opened(model, transfer_timeout_s=3.0)  # the receiver gives up after it, the engine after three
        try:
            async with asyncio.timeout(120.0):
                with pytest.raises(TransferError, match="could not be pulled"):
                    await engine.update_weights(weights)
        finally:
            await engine.close()

    loop.run(scenario())


def test_a_changed_byte_is_a_proof_error_and_nothing_is_served_after_it(model, policy, loop):
    async def scenario():
        engine = await opened(model)
        try:
            await engine.update_weights(policy.publish())
            weights = policy.publish(seed=4)
            change_first_byte(Path(json.loads(weights.manifest)["path"]))
            with pytest.raises(ProofError, match=r"weight of version 1 \("):
                await engine.update_weights(weights)
            with pytest.raises(ProofError, match=r"weight of version"):
                await draw(engine, PROMPTS[0])
        finally:
            await engine.close()

    loop.run(scenario())


def test_the_canary_catches_a_stale_tied_head_and_holds_back_what_it_sampled(model, policy, loop, monkeypatch):
    from flowrl.engines.weights import receiver

    async def scenario():
        engine = await opened(model)
        try:
            await engine.update_weights(policy.publish())
            running = asyncio.ensure_future(draw(engine, PROMPTS[2], max_tokens=400))
            await once_running(engine)
            monkeypatch.setattr(receiver, "repack_tied_head", lambda *_: None)
            with pytest.raises(ProofError, match="canary differs from the learner's"):
                await engine.update_weights(policy.publish(seed=5))
            with pytest.raises(ProofError):
                await running
            with pytest.raises(ProofError):
                await draw(engine, PROMPTS[0])
        finally:
            await engine.close()

    loop.run(scenario())


def refuse_while_paused(engine: VllmEngine) -> None:
    """Let vLLM refuse requests in a pause that ends those in flight, as it does from 0.33 on."""
    from vllm.exceptions import RetryableRequestError

    client = engine._engine
    add, pause, resume, closed = client.add_request, client.pause_generation, client.resume_generation, asyncio.Event()

    async def add_request(*arguments: Any, **further: Any) -> Any:
        if closed.is_set():
            raise RetryableRequestError
        return await add(*arguments, **further)

    async def pause_generation(*, mode: str, clear_cache: bool) -> None:
        if mode != "keep":
            closed.set()
        await pause(mode=mode, clear_cache=clear_cache)

    async def resume_generation() -> None:
        await resume()
        closed.clear()

    client.add_request, client.pause_generation, client.resume_generation = (
        add_request,
        pause_generation,
        resume_generation,
    )


@pytest.mark.parametrize("on_update", ["wait", "abort"])
def test_requests_in_flight_are_finished_or_drawn_again_as_the_setting_says(model, policy, loop, on_update):
    async def scenario():
        engine = await opened(model, on_update=on_update)
        refuse_while_paused(engine)
        try:
            await engine.update_weights(policy.publish())
            running = asyncio.ensure_future(draw(engine, PROMPTS[2], num_samples=2, max_tokens=300))
            await once_running(engine)
            update = asyncio.ensure_future(engine.update_weights(policy.publish(seed=6)))
            await asyncio.sleep(0.01)
            meanwhile = await draw(engine, PROMPTS[3])  # is drawn, whatever vLLM makes of it in the pause
            await update
            (again,) = await draw(engine, PROMPTS[2], max_tokens=300)
            assert meanwhile[0].finish in ("stop", "length")
            return await running, again
        finally:
            await engine.close()

    samples, again = loop.run(scenario())
    only = 0 if on_update == "wait" else 1
    assert all(sample.finish in ("stop", "length") for sample in samples)
    assert all([span.version for span in sample.versions] == [only] for sample in samples)
    assert (tokens(samples)[0] == again.token_ids.tolist()) == (on_update == "abort")


@pytest.mark.parametrize("settings", [{"on_update": "resume"}, {"keep_cache": True}, {}])
def test_requests_in_flight_go_on_from_their_tokens_under_the_new_weights(model, policy, loop, settings):
    async def scenario():
        engine = await opened(model, **settings)
        if settings.get("on_update"):
            refuse_while_paused(engine)
        try:
            await engine.update_weights(policy.publish())
            running = asyncio.ensure_future(draw(engine, PROMPTS[2], num_samples=2, max_tokens=300, ignore_stop=True))
            await once_running(engine)
            await engine.update_weights(policy.publish(seed=7))
            (fresh,) = await draw(engine, PROMPTS[2])
            return await running, fresh
        finally:
            await engine.close()

    samples, fresh = loop.run(scenario())
    assert policy.gap(PROMPTS[2], fresh) < TOLERANCE  # no key or value of the old weights
    for sample in samples:
        first, second = sample.versions
        assert (first.version, first.start, first.end) == (0, 0, second.start)
        assert (second.version, second.end, len(sample.token_ids)) == (1, 300, 300)
        gap = policy.gap(PROMPTS[2], sample, start=second.start)
        assert (gap < TOLERANCE) == (not settings.get("keep_cache"))


def test_a_gloo_broadcast_reaches_two_engines(model, loop):
    policy = Policy(model, transport="broadcast", num_receivers=2)

    async def scenario():
        engines = [await opened(model, receiver_index=index) for index in range(2)]
        try:
            for seed in (None, 7):
                weights = policy.publish(seed=seed)
                sent = asyncio.ensure_future(asyncio.to_thread(policy.sender.transfer, weights.version))
                reports = await together(*(engine.update_weights(weights) for engine in engines))
                await sent
                assert max(report.max_gap for report in reports) < TOLERANCE
            return await together(*(draw(engine, PROMPTS[4]) for engine in engines))
        finally:
            for engine in engines:
                await engine.close()
            policy.sender.close()

    (first,), (second,) = loop.run(scenario())
    assert first.token_ids.tolist() == second.token_ids.tolist()
    assert policy.gap(PROMPTS[4], first) < TOLERANCE


def test_an_untied_model_takes_updates_too(tmp_path, loop):
    model = tiny_model(tmp_path, seed=8, tied=False)
    policy = Policy(model)

    async def scenario():
        engine = await opened(model)
        try:
            await engine.update_weights(policy.publish(seed=9))
            return await engine.update_weights(policy.publish(seed=10))
        finally:
            await engine.close()
            policy.sender.close()

    assert loop.run(scenario()).max_gap < TOLERANCE


def test_a_class_of_transformers_that_vllm_serves_itself_still_trains_in_the_same_process(tmp_path, loop):
    write_family("GPTNeoXForCausalLM", tmp_path)
    policy = Policy(tmp_path)
    before = policy.logprobs(PROMPTS[0], PROMPTS[1])

    async def scenario():
        engine = await opened(tmp_path)
        try:
            report = await engine.update_weights(policy.publish(seed=9))
            return report, await draw(engine, PROMPTS[3], num_samples=1)
        finally:
            await engine.close()
            policy.sender.close()

    report, samples = loop.run(scenario())
    assert report.max_gap < TOLERANCE
    assert policy.gap(PROMPTS[3], samples[0]) < TOLERANCE
    assert np.array_equal(Policy(tmp_path).logprobs(PROMPTS[0], PROMPTS[1]), before)  # a model made after vLLM's


@pytest.fixture
def expert_group(engine, monkeypatch):
    """Make what vLLM makes in a process whose first model has experts; here the first was the shared engine's."""
    from torch.distributed import get_backend
    from vllm.distributed import parallel_state

    world = parallel_state.get_world_group()
    backend = get_backend(world.device_group)
    group = parallel_state.init_model_parallel_group([[0]], world.local_rank, backend, group_name="ep")
    monkeypatch.setattr(parallel_state, "_EP", group)
    yield
    group.destroy()


@pytest.mark.usefixtures("expert_group")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("MixtralForCausalLM", "float32"),
        ("GptOssForCausalLM", "float32"),  # loads past weight loaders
        ("Qwen3NextForCausalLM", "bfloat16"),  # its linear attention has no other kernel
    ],
)
def test_a_mixture_of_experts_serves_its_new_experts_after_an_update(tmp_path, loop, family, dtype):
    write_family(family, tmp_path)
    policy = Policy(tmp_path, max_mean_gap=1e-3)  # of a learner in float32, whatever the engine computes in

    async def scenario():
        engine = await opened(tmp_path, dtype=dtype)
        try:
            reports = [await engine.update_weights(policy.publish(seed=seed)) for seed in (None, 14, 15)]
            return reports, await draw(engine, PROMPTS[2], num_samples=3)
        finally:
            await engine.close()
            policy.sender.close()

    reports, samples = loop.run(scenario())
    tolerance = TOLERANCE if dtype == "float32" else 1.5  # of one token; other weights are several nats away
    assert max(report.max_gap for report in reports) < tolerance
    assert max(policy.gap(PROMPTS[2], sample) for sample in samples) < tolerance


@pytest.mark.usefixtures("expert_group")
def test_what_the_build_for_cpus_has_no_kernel_for_is_refused_by_its_name(tmp_path, loop):
    for family, said in (
        ("JambaForCausalLM", "has layers of the first Mamba, for which vLLM's build for CPUs has no kernel"),
        (
            "Qwen3NextForCausalLM",
            r"\.dtype: is float32, and vLLM's build for CPUs .* in bfloat16 only; set it to bfloat16",
        ),
    ):
        write_family(family, tmp_path)
        with pytest.raises(FlowrlError, match=said):
            engine_of(tmp_path)
    write_family("Qwen3NextForCausalLM", tmp_path, linear_key_head_dim=32, linear_value_head_dim=32)
    with pytest.raises(ModelError, match=r"RuntimeError: Unexpected head dim size, 32.*; vLLM's build for CPUs lacks"):
        loop.run(opened(tmp_path, dtype="bfloat16"))  # found by its first request


def test_closing_leaves_no_thread_and_no_socket(model, policy, loop):
    before = set(threading.enumerate())

    async def scenario():
        engine = await opened(model)
        await engine.update_weights(policy.publish())
        await draw(engine, PROMPTS[0])
        await engine.close()
        await engine.close()
        return engine._scratch.path

    directory = loop.run(scenario())
    own = [thread for thread in set(threading.enumerate()) - before if not thread.name.startswith("asyncio_")]
    for thread in own:  # vLLM has told them to end, and does not wait
        thread.join(30.0)
    assert [thread.name for thread in own if thread.is_alive()] == []
    assert not directory.exists()


def test_a_model_that_cannot_be_served_is_refused(tmp_path, model, loop):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        engine_of(tmp_path)
    with pytest.raises(ConfigError, match="tensor_parallel=2"):
        engine_of(model, tensor_parallel=2)
    with pytest.raises(ModelError, match="could not serve"):
        loop.run(opened(model, max_model_len=4096))  # the model was made for 512 positions


def test_processes_serve_and_update_as_the_thread_does(model, policy, loop, served):
    """Two workers hold a half of the model each, receive what is published and prove it by digests and canary."""

    async def scenario():
        engine = await opened(model, layout="processes", tensor_parallel=2)
        try:
            reports = [await engine.update_weights(policy.publish(seed=seed)) for seed in (None, 12)]
            return reports, await draw(engine, PROMPTS[5], num_samples=3)
        finally:
            await engine.close()

    reports, samples = loop.run(scenario())
    assert max(report.max_gap for report in reports) < TOLERANCE
    assert max(policy.gap(PROMPTS[5], sample) for sample in samples) < TOLERANCE


def test_vllm_does_not_warn_of_layers_that_are_sent_nothing() -> None:
    import vllm.model_executor.model_loader.reload.layerwise as reload

    import flowrl.engines.weights.receiver  # noqa: F401

    said = "%s: Failed to load weights"
    assert said in Path(reload.__file__).read_text(), "vLLM words it otherwise now"
    record = logging.makeLogRecord({"name": reload.logger.name, "msg": said, "levelno": logging.WARNING})
    assert not logging.getLogger(reload.__name__).filter(record)
    assert reload.logger.filter(logging.makeLogRecord({"msg": "something else"}))
    assert not reload.logger.filter(record)
