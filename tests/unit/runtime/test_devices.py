"""What a run may compute on is what NVML and CUDA_VISIBLE_DEVICES leave, and what keeps it from that is one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from flowrl.errors import ResourceError
from flowrl.runtime.devices import GIB, Machine, check_usable, cpu_quota, unusable, visible_machine
from tests.support.devices import PretendedNvml, machine

if TYPE_CHECKING:
    from pathlib import Path


def seen(nvml: PretendedNvml, visible: str | None = None) -> Machine:
    return visible_machine(nvml, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})


@pytest.mark.parametrize(
    ("visible", "indices"),
    [(None, [0, 1, 2]), ("2,0", [2, 0]), ("GPU-1", [1]), ("1,-1,2", [1]), ("", []), ("-1", []), ("0, 1", [0, 1])],
)
def test_the_visible_gpus_are_cudas_in_its_order(visible: str | None, indices: list[int]) -> None:
    assert [gpu.index for gpu in seen(PretendedNvml([80, 80, 80]), visible).gpus] == indices


def test_a_gpu_that_is_named_and_not_there_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"CUDA_VISIBLE_DEVICES: there is no GPU '8', 2 are present"):
        seen(PretendedNvml([80, 80]), "0,8")


@pytest.mark.parametrize(
    ("nvml", "visible", "words"),
    [
        (PretendedNvml([80, 80]), "0,0", "0,0 names GPU 0 twice"),
        (PretendedNvml([80, 80]), "0,GPU-0", "0,GPU-0 names GPU 0 twice"),
        (PretendedNvml([80] * 12), "GPU-1", None),  # the whole name of one of them, and the beginning of two others'
        (PretendedNvml([80] * 12), "GPU-", "'GPU-' begins the names of 12 GPUs"),
        (PretendedNvml(), "0", "there is no GPU '0', none is present; unset it"),
        (PretendedNvml([80, 80], lost=frozenset({1})), None, "GPU 1 does not answer the driver"),
        (PretendedNvml([80, 80], lost=frozenset({1})), "1", "GPU 1 does not answer the driver"),
        (PretendedNvml([80, 80], lost=frozenset({1})), "0", None),
    ],
)
def test_what_is_named_is_one_gpu_each_that_answers(
    nvml: PretendedNvml, visible: str | None, words: str | None
) -> None:
    if words is None:
        assert len(seen(nvml, visible).gpus) == 1
        return
    with pytest.raises(ResourceError, match=words):
        seen(nvml, visible)


def test_a_machine_without_gpus_says_why() -> None:
    assert seen(PretendedNvml()).why_none == "no device"
    assert seen(PretendedNvml([80]), "").why_none == "CUDA_VISIBLE_DEVICES= hides all"
    none = seen(PretendedNvml(failure="Driver Not Loaded"))
    assert none.gpus == ()
    assert "driver" in none.why_none
    assert "Driver Not Loaded" in none.why_none


def test_one_slice_that_is_named_is_a_gpu_with_its_own_memory() -> None:
    (gpu,) = seen(PretendedNvml([80], slices={0: 2}), "MIG-0-1,MIG-0-0").gpus
    assert (gpu.total_bytes, gpu.slices) == (40 * GIB, 0)


@pytest.mark.parametrize(
    ("nvml", "words"),
    [
        (PretendedNvml([80, 80], slices={1: 2}), "GPU 1 is split into 2 MIG slices"),
        (PretendedNvml([80, 80], slices={1: 0}), "GPU 1 is split into 0 MIG slices"),
        (PretendedNvml([80, 80], uses={0: 9 * GIB}), f"{9 * GIB} of {80 * GIB} bytes of GPU 0 are in use by others"),
        (PretendedNvml([80, 24]), "GPU 0 has 80 GiB and GPU 1 24 GiB"),
    ],
)
def test_gpus_that_cannot_be_reserved_whole_and_alike_are_refused_in_a_line(nvml: PretendedNvml, words: str) -> None:
    with pytest.raises(ResourceError, match=words) as refused:
        check_usable(seen(nvml))
    assert "\n" not in str(refused.value)
    assert refused.value.remedy


def test_what_a_display_holds_is_not_somebody_elses_work() -> None:
    check_usable(seen(PretendedNvml([24, 23.5], uses={0: GIB})))


def test_a_driver_of_an_older_cuda_than_torchs_is_said_and_a_newer_one_serves() -> None:
    old, new = (msgspec.structs.replace(machine(80), driver_cuda=cuda) for cuda in ("12.8", "14.1"))
    assert "the driver serves CUDA 12.8, torch is built for 13.0" in unusable(old)
    assert unusable(new) == ""
    assert "torch is built for CPUs" in unusable(msgspec.structs.replace(machine(80), torch_cuda=""))
    assert unusable(Machine(torch_cuda="13.0")) == ""


@pytest.mark.parametrize(
    ("about", "files", "cores"),
    [
        ("", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/pod/box", {"cpu.max": "400000 100000", "pod/cpu.max": "50000 100000", "pod/box/cpu.max": "max 9"}, 0.5),
        ("0::/not/seen/from/here", {"cpu.max": "200000 100000"}, 2.0),
        ("4:cpu,acct:/box", {"cpu,acct/cpu.cfs_quota_us": "300000", "cpu,acct/cpu.cfs_period_us": "100000"}, 3.0),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("5:memory:/", {"memory/cpu.max": "100000 100000"}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "odd"}, None),
        ("0::/", {}, None),
    ],
)  # fmt: skip
def test_a_container_has_the_cores_that_it_is_given_time_for(
    tmp_path: Path, about: str, files: dict[str, str], cores: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "groups").write_text(about)
    assert cpu_quota(tmp_path, tmp_path / "groups") == cores
