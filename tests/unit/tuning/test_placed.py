import msgspec
import pytest

from flowrl.engines.savings import FSDP
from flowrl.stages.critic import Critic
from flowrl.stages.generator import Generator
from flowrl.stages.learner import Learner
from flowrl.stages.reference import Reference
from flowrl.tuning.machines import parse_site
from flowrl.tuning.memory import BUCKET, CONTEXT, GRAPHS, PERSISTENT, Need, Work, asleep
from flowrl.tuning.placed import Models, place_processes, table
from flowrl.tuning.shapes import find_shape

SHAPE = find_shape("meta-llama/Meta-Llama-3-8B-Instruct", {})
NODES = ("generator", "learner", "reference", "critic")
MODELS = Models(shapes=dict.fromkeys(NODES, SHAPE), heads={"critic": "value", **dict.fromkeys(NODES[:3], "policy")},
                work=Work(prompt=512, response=512))  # fmt: skip


def placed(on, **configs):
    site = parse_site(on)
    return place_processes(configs, "learner", MODELS, site), site


def split():
    return {
        "generator": Generator.Config(replicas=2, gpus=2, tensor_parallel=2, kv_cache_bytes=0, layout="processes"),
        "learner": Learner.Config(ranks=4, gpus=1, zero_stage=3, gradient_checkpointing=True),
        "reference": Reference.Config(share="learner", replicas=4),
    }


def test_every_process_has_its_devices_and_those_that_share_have_their_hosts():
    found, _ = placed("8x80GB", **split())
    where = {process.name: process.devices for process in found.processes}
    assert where["generator.0"] == (0, 1)
    assert where["generator.1"] == (2, 3)
    assert [where[f"learner rank {rank}"] for rank in range(4)] == [(4,), (5,), (6,), (7,)]
    assert [where[f"reference.{copy}"] for copy in range(4)] == [(4,), (5,), (6,), (7,)]
    assert not found.lacks


def test_every_byte_stands_on_one_device_or_host():
    found, _ = placed("8x80GB", **split())
    assert sum(found.devices) == pytest.approx(sum(p.need.device_bytes * len(p.devices) for p in found.processes))
    assert sum(found.hosts) == pytest.approx(1.5e9 + sum(p.need.host_bytes for p in found.processes))


def test_a_generator_takes_its_share_and_its_cache_is_what_the_weights_leave_of_it():
    found, site = placed("8x80GB", **split())
    need = next(process.need for process in found.processes if process.node == "generator")
    assert need.device_bytes == pytest.approx(0.85 * site.device_bytes)
    assert need.device["weights"] == SHAPE.num_parameters  # half of them, two bytes each


@pytest.mark.parametrize(
    ("settings", "parts"), [({"zero_stage": 3}, 4), ({"zero_stage": 2}, 1), ({"zero_stage": 3, "engine": FSDP}, 1)]
)
def test_a_teacher_is_shared_out_among_the_ranks_of_deepspeeds_stage_3(settings, parts):
    models = msgspec.structs.replace(MODELS, teachers={"learner": SHAPE})
    configs = {"learner": Learner.Config(ranks=4, gpus=1, **settings)}
    found = place_processes(configs, "learner", models, parse_site("4x80GB"))
    assert [process.need.device["teacher"] for process in found.processes] == [2 * SHAPE.num_parameters / parts] * 4


def test_the_devices_of_one_replica_are_of_one_machine():
    configs = {"learner": Learner.Config(ranks=3, gpus=1),
               "generator": Generator.Config(gpus=2, tensor_parallel=2, kv_cache_bytes=0)}  # fmt: skip
    found, _ = placed("2x4x80GB", **configs)
    assert next(p.devices for p in found.processes if p.node == "generator") == (4, 5)


@pytest.mark.parametrize(
    ("on", "words"),
    [("4x80GB", "finds no 1 GPUs any more: 4 are there"), ("8x24GB", "on a GPU of 24.0 (learner, reference)"),
     ("8x80GB,host=10GB", "in a host of 10.0")],
)  # fmt: skip
def test_what_is_too_much_is_said_with_the_numbers(on, words):
    assert any(words in lack for lack in placed(on, **split())[0].lacks)


def test_in_turns_a_device_holds_the_fuller_side_and_what_the_other_leaves_there_asleep():
    sampling = {"replicas": 4, "kv_cache_bytes": 0, "gpu_memory_utilization": 0.85, "share": "learner"}
    training = {"learner": Learner.Config(ranks=4, gpus=1, zero_stage=3, gradient_checkpointing=True),
                "reference": Reference.Config(share="learner", replicas=4)}  # fmt: skip
    beside, _ = placed("4x80GB", generator=Generator.Config(**sampling), **training)
    found, site = placed("4x80GB", generator=Generator.Config(**sampling, turns=True), **training)
    assert any("on a GPU of 80.0" in lack for lack in beside.lacks)
    assert not found.lacks
    needs = {process.node: process.need for process in found.processes}
    trained = needs["learner"].device_bytes + needs["reference"].device_bytes
    left = asleep(needs["generator"]).device_bytes
    assert left == CONTEXT + GRAPHS
    assert found.devices[0] == pytest.approx(max(trained + left, needs["generator"].device_bytes + 2 * CONTEXT))
    moved = asleep(needs["learner"]).host["put aside"]
    assert moved == pytest.approx(
        sum(needs["learner"].device[name] for name in PERSISTENT if name in needs["learner"].device)
    )
    assert sum(found.hosts) > sum(beside.hosts), "what sleeps is in the hosts"
    assert any("(asleep)" in line for line in table(found, site))


def test_on_cpus_what_sleeps_is_on_the_disk():
    need = Need(host={"process": 1e9, "weights": 2e9, "KV cache": 5e8})
    assert asleep(need).host_bytes == 1e9


def test_only_rank_0_holds_versions_on_their_way():
    found, _ = placed("8x80GB", **split())
    sizes = [
        process.need.host.get("weights on their way", 0.0) for process in found.processes if process.node == "learner"
    ]
    assert sizes == [4 * SHAPE.num_parameters + 2 * BUCKET, 0.0, 0.0, 0.0], "two versions, and two pinned buckets"


def test_a_generator_without_room_for_a_cache_is_said_to_have_none():
    found, _ = placed("1x24GB", generator=Generator.Config(gpus=1, kv_cache_bytes=0, gpu_memory_utilization=0.7),
                      learner=Learner.Config())  # fmt: skip
    assert any("before any KV cache: 0 samples fit at once" in lack for lack in found.lacks)


def test_like_devices_are_one_row_and_their_free_memory_is_told():
    found, site = placed("8x80GB", **split())
    lines = table(found, site)
    assert any(line.startswith("GPU 0-3  generator") and line.endswith("12.0") for line in lines)
    assert any(line.startswith("GPU 4-7  learner") for line in lines)


def test_a_decoupled_smaller_critic_saves_a_third_of_the_peak():
    """For a policy of 70B on 16 devices, a critic of 7B in place of one of 70B (docs/how/memory.md)."""
    policy, small = (find_shape(f"meta-llama/Llama-2-{size}-chat-hf", {}) for size in ("70b", "7b"))
    configs = {
        "learner": Learner.Config(ranks=16, gpus=1, zero_stage=3, gradient_checkpointing=True),
        "critic": Critic.Config(share="learner", ranks=16, zero_stage=3, gradient_checkpointing=True),
    }
    peaks = [
        max(place_processes(configs, "learner", Models(
            shapes={"learner": policy, "critic": critic}, heads={"learner": "policy", "critic": "value"},
            work=Work(prompt=1024, response=1024)), parse_site("2x8x80GB")).devices)
        for critic in (policy, small)
    ]  # fmt: skip
    assert 0.3 < 1 - peaks[1] / peaks[0] < 0.5
