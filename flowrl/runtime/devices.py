"""What a machine computes on: the GPUs that a run may use, as NVML tells, and the cores beside them.

Invariants:
- only what CUDA_VISIBLE_DEVICES leaves visible is a GPU of the run, in its order;
- nothing here loads torch or starts CUDA;
- whatever keeps a GPU from being used is said in one line before anything starts (no driver, one too old for torch's
  CUDA, slices, somebody else's memory).

A `Machine` is a value: `visible_machine` reads the real one, each node of a cluster sends its own, and tests and plans
for other machines make theirs. Called by placement, a cluster's nodes, the doctor and the planner.

Tests: tests/unit/runtime/test_devices.py
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.errors import ResourceError, number_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

GIB = 1 << 30
CGROUPS = Path("/sys/fs/cgroup")
IN_USE = 0.1  # of a GPU's memory: more than what a display or the driver itself holds
SAME_SIZE = 0.95  # of the largest GPU's memory; less is another model of GPU
NVIDIA = "0x10de"  # on the bus
DISPLAYS = ("0x0300", "0x0302")  # classes of devices there: VGA and 3D controllers


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU, or the one slice of a GPU that is visible."""

    name: str = "GPU"
    index: int = 0  # NVML's
    total_bytes: int = 80 * GIB
    free_bytes: int = 80 * GIB  # the rest is somebody else's
    slices: int = 0  # MIG slices it is split into and none of which is chosen
    is_split: bool = False  # in MIG's mode, in which CUDA takes slices only


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The devices of a machine that a run may use."""

    gpus: tuple[Gpu, ...] = ()
    why_none: str = ""  # where there is no GPU
    has_lost: bool = False  # there are GPUs on the bus, and nothing answers for them
    cores: int = 1
    host_bytes: int = 0  # of memory; 0: not said
    driver_cuda: str = ""  # the newest CUDA that the driver serves
    torch_cuda: str = ""  # what torch is built for; "": CPUs only

    def __str__(self) -> str:
        """Return it as a line says it: `8 x H100 (80 GiB), 64 cores`."""
        kinds: dict[str, int] = {}
        for gpu in self.gpus:
            kind = f"{gpu.name} ({gpu.total_bytes / GIB:.0f} GiB)"
            kinds[kind] = kinds.get(kind, 0) + 1
        return ", ".join([*(f"{count} x {kind}" for kind, count in kinds.items()), f"{self.cores} cores"])


def visible_machine(nvml: Any = None, environ: Mapping[str, str] = os.environ) -> Machine:
    """Return the machine as this process may use it; `nvml` stands in for the module pynvml.

    Raises:
        ResourceError: CUDA_VISIBLE_DEVICES names a GPU that is not there, or one twice; a visible one does not answer.
    """
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bare = Machine(cores=num_cores(), host_bytes=host_bytes, torch_cuda=cuda_of_torch())
    if nvml is None:
        try:
            import pynvml as nvml  # pyright: ignore[reportMissingTypeStubs]
        except ImportError:
            why = "package nvidia-ml-py is missing"
            return msgspec.structs.replace(bare, why_none=why, has_lost=bool(_on_bus()))
    try:
        nvml.nvmlInit()
        gpus, why = _visible(nvml, environ.get("CUDA_VISIBLE_DEVICES"))
        version = int(nvml.nvmlSystemGetCudaDriverVersion())
    except nvml.NVMLError as error:
        lost = _on_bus()
        why = f"{lost} on the bus, but no driver answers ({error})" if lost else f"no driver: {error}"
        return msgspec.structs.replace(bare, why_none=why, has_lost=bool(lost))
    driver_cuda = f"{version // 1000}.{version % 1000 // 10}"
    return msgspec.structs.replace(bare, gpus=tuple(gpus), why_none=why, driver_cuda=driver_cuda)


def together(machines: Sequence[Machine]) -> Machine:
    """Return equal machines as one: two of 8 GPUs and 64 cores have 16 GPUs and 128 cores."""
    gpus = tuple(gpu for machine in machines for gpu in machine.gpus)
    cores = len(machines) * min(machine.cores for machine in machines)
    return msgspec.structs.replace(machines[0], gpus=gpus, cores=cores)


def _visible(nvml: Any, named: str | None) -> tuple[list[Gpu], str]:
    """Return the visible GPUs in CUDA's order, and why there are none."""
    handles = [_handle(nvml, index) for index in range(int(nvml.nvmlDeviceGetCount()))]
    if named is None:
        return [_gpu(nvml, index, handle) for index, handle in enumerate(handles)], "" if handles else "no device"
    found: list[Gpu] = []
    for name in (each.strip() for each in named.split(",")):
        if name in ("", "-1", "NoDevFiles"):  # where CUDA stops reading
            break
        found.append(_named(nvml, name, handles))
        if found[-1].index in [each.index for each in found[:-1]]:
            raise ResourceError("CUDA_VISIBLE_DEVICES", f"{named} names GPU {found[-1].index} twice", "name it once")
        if name.startswith("MIG-"):  # of slices CUDA takes one
            break
    return found, "" if found else f"CUDA_VISIBLE_DEVICES={named} hides all"


def _handle(nvml: Any, index: int) -> Any:
    """Return NVML's handle of a GPU, None where it does not answer."""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError:
        return None
    return handle


def _named(nvml: Any, name: str, handles: list[Any]) -> Gpu:
    if name.isdigit() and int(name) < len(handles):
        return _gpu(nvml, int(name), handles[int(name)])
    known = [(k, each) for k, each in enumerate(handles) if each is not None]
    begun = [(k, each) for k, each in known if _text(nvml.nvmlDeviceGetUUID(each)).startswith(name)]
    if name.startswith("GPU-") and begun:
        exact = [(k, each) for k, each in begun if _text(nvml.nvmlDeviceGetUUID(each)) == name]
        if len(begun) > 1 and not exact:
            what = f"{name!r} begins the names of {len(begun)} GPUs"
            raise ResourceError("CUDA_VISIBLE_DEVICES", what, "write more of it (nvidia-smi -L)")
        return _gpu(nvml, *(exact or begun)[0])
    for index, handle in known:
        for slice_handle in _slices(nvml, handle) if name.startswith("MIG-") else ():
            if _text(nvml.nvmlDeviceGetUUID(slice_handle)).startswith(name):
                return _gpu(nvml, index, slice_handle, is_slice=True)
    if not handles:
        raise ResourceError("CUDA_VISIBLE_DEVICES", f"there is no GPU {name!r}, none is present", "unset it")
    what = f"there is no GPU {name!r}, {len(handles)} are present"
    raise ResourceError("CUDA_VISIBLE_DEVICES", what, f"name some of 0 to {len(handles) - 1}, or unset it")


def _gpu(nvml: Any, index: int, handle: Any, *, is_slice: bool = False) -> Gpu:
    if handle is None:
        what = f"GPU {index} does not answer the driver, though it is there"
        raise ResourceError("CUDA_VISIBLE_DEVICES", what, "leave it out, or restart it (nvidia-smi says what it has)")
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    is_split = not is_slice and _is_split(nvml, handle)
    return Gpu(
        name=_text(nvml.nvmlDeviceGetName(handle)), index=index, total_bytes=int(memory.total),
        free_bytes=int(memory.free), slices=len(_slices(nvml, handle)) if is_split else 0, is_split=is_split,
    )  # fmt: skip


def _is_split(nvml: Any, handle: Any) -> bool:
    """Return whether a GPU is in MIG's mode; few models can be."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except nvml.NVMLError:
        return False


def _slices(nvml: Any, handle: Any) -> list[Any]:
    """Return the MIG slices of a GPU."""
    if not _is_split(nvml, handle):
        return []
    found: list[Any] = []
    for place in range(int(nvml.nvmlDeviceGetMaxMigDeviceCount(handle))):
        try:
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place))
        except nvml.NVMLError:
            break
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _on_bus(root: Path = Path("/sys/bus/pci/devices")) -> str:
    """Return "an NVIDIA GPU is" where the machine has one, whatever drives it."""

    found = [
        each
        for each in root.glob("*")
        if text_in(each / "vendor").strip() == NVIDIA and text_in(each / "class").startswith(DISPLAYS)
    ]
    return "" if not found else f"{len(found)} NVIDIA GPU{'s are' if len(found) > 1 else ' is'}"


def cuda_of_torch() -> str:
    """Return the CUDA that torch is built for, "" for CPUs, without importing it."""
    found = importlib.util.find_spec("torch")
    written = Path(found.origin).with_name("version.py") if found is not None and found.origin else Path("none")
    try:
        line = re.search(r"^cuda\b[^=]*= *'([^']*)'", written.read_text(), re.MULTILINE)
    except OSError:
        return ""
    return line[1] if line else ""


def num_cores() -> int:
    """Return the cores this process may use: those it may run on, and no more than its container has time for."""
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota(CGROUPS)
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(root: Path, groups: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the cores that control groups grant this process, from the tightest one down from `root`; None: all.

    `cpu.max` of "150000 100000" is 1.5, as is a cpu.cfs_quota_us of 150000, which is what older systems have.
    """
    found: list[float] = []
    for line in text_in(groups).splitlines() or ["0::/"]:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers
        inner = base / group.lstrip("/")
        for each in (inner, *(parent for parent in inner.parents if parent.is_relative_to(base))):
            words = (text_in(each / "cpu.max") or text_in(each / "cpu.cfs_quota_us")).split()
            words += text_in(each / "cpu.cfs_period_us").split()
            if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():
                found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def text_in(path: Path) -> str:
    """Return what a file of the system says, "" where it is not there or not for us."""
    try:
        return path.read_text()
    except OSError:
        return ""


def unusable(machine: Machine) -> str:
    """Return why torch cannot compute on a machine's GPUs, with what to do, or ""."""
    if machine.gpus and not machine.torch_cuda:
        return (
            f"{machine}, but torch is built for CPUs: bash scripts/setup.sh installs the build for GPUs; "
            "CUDA_VISIBLE_DEVICES= leaves them alone"
        )
    if machine.gpus and machine.driver_cuda and _major(machine.driver_cuda) < _major(machine.torch_cuda):
        return (
            f"the driver serves CUDA {machine.driver_cuda}, torch is built for {machine.torch_cuda}: "
            "update the NVIDIA driver, or install a torch for the older CUDA"
        )
    return ""


def check_usable(machine: Machine) -> None:
    """Insist that the GPUs of a machine can be reserved whole and alike: nobody says which of them a node gets.

    Raises:
        ResourceError: they are of different sizes, split into slices, or somebody else computes on them.
    """
    for gpu in machine.gpus:
        if gpu.is_split:
            what = f"GPU {gpu.index} is split into {number_of(gpu.slices, 'MIG slice')}, and whole GPUs are placed"
            remedy = "turn MIG off (nvidia-smi -mig 0), or name one slice by CUDA_VISIBLE_DEVICES=MIG-..."
            raise ResourceError("placement", what, remedy)
        used = gpu.total_bytes - gpu.free_bytes
        if used > IN_USE * gpu.total_bytes:
            free = [each for each in machine.gpus if each.total_bytes - each.free_bytes <= IN_USE * each.total_bytes]
            others = [str(each.index) for each in free]
            what = f"{used} of {gpu.total_bytes} bytes of GPU {gpu.index} are in use by others"
            hint = f", or leave it out: CUDA_VISIBLE_DEVICES={','.join(others)}" if others else ""
            raise ResourceError("placement", what, f"end them (nvidia-smi names them){hint}")
    largest = max(machine.gpus, key=lambda gpu: gpu.total_bytes, default=Gpu())
    for gpu in machine.gpus:
        if gpu.total_bytes < SAME_SIZE * largest.total_bytes:
            what = (
                f"GPU {largest.index} has {largest.total_bytes / GIB:.0f} GiB and GPU {gpu.index} "
                f"{gpu.total_bytes / GIB:.0f} GiB; the parts of a split model or batch are alike"
            )
            alike = [str(g.index) for g in machine.gpus if g.total_bytes >= SAME_SIZE * largest.total_bytes]
            raise ResourceError(
                "placement",
                what,
                f"choose equal ones: CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES={','.join(alike)}",
            )


def _major(version: str) -> int:
    return int(version.partition(".")[0] or 0)
