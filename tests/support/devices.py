"""GPUs that nobody has: a stand-in for the module pynvml, and machines made up."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from flowrl.runtime.devices import GIB, Gpu, Machine


def machine(*gigabytes: float, cores: int = 64) -> Machine:
    """Return a machine with a GPU of each of these sizes, on which a torch for GPUs computes."""
    gpus = [
        Gpu(name="Pretended", index=i, total_bytes=int(size * GIB), free_bytes=int(size * GIB))
        for i, size in enumerate(gigabytes)
    ]
    return Machine(gpus=tuple(gpus), cores=cores, driver_cuda="13.0", torch_cuda="13.0")


@dataclass
class PretendedNvml:
    """What flowrl asks of pynvml, answered for GPUs of so many GiB; `uses` are bytes that others hold, by index."""

    sizes: list[float] = field(default_factory=list[float])
    uses: dict[int, int] = field(default_factory=dict[int, int])
    slices: dict[int, int] = field(default_factory=dict[int, int])  # MIG slices by index
    driver: int = 13000
    failure: str = ""
    lost: frozenset[int] = frozenset()  # indices of GPUs that do not answer

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:
        if self.failure:
            raise self.NVMLError(self.failure)

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return self.driver

    def nvmlDeviceGetCount(self) -> int:
        return len(self.sizes)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if index in self.lost:
            raise self.NVMLError("GPU is lost")
        return (index, -1)

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return "Pretended"

    def nvmlDeviceGetUUID(self, handle: Any) -> bytes:
        return b"GPU-%d" % handle[0] if handle[1] < 0 else b"MIG-%d-%d" % handle

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        total = int(self.sizes[handle[0]] * GIB) // (2 if handle[1] >= 0 else 1)
        used = self.uses.get(handle[0], 0)
        return SimpleNamespace(total=total, used=used, free=total - used)

    def nvmlDeviceGetMigMode(self, handle: Any) -> list[int]:
        return [int(handle[0] in self.slices)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, place: int) -> Any:
        if place >= self.slices.get(handle[0], 0):
            raise self.NVMLError("Not Found")
        return (handle[0], place)
