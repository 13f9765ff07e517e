"""What a sleeping training engine holds, put aside: storages copied to a file or to host memory, and emptied.

Invariants:
- tensors stay the objects that they are, and views of one storage stay views of it: only its bytes go, and come back
  the same;
- a storage that cannot be emptied (mapped from elsewhere) stays where it is, as whatever is not handed in.

From a CPU the bytes go into a temporary file without a name, which dies with the process, from a GPU into pinned host
memory. Called by `Trainer`, between two of its calls.

Tests: tests/unit/engines/test_aside.py
"""

from __future__ import annotations

import ctypes
import tempfile
from typing import IO, TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, UntypedStorage

PURGE = b"arena.4096.purge"  # of jemalloc's mallctl: all arenas
LEAST_BYTES = 1 << 12  # smaller ones are left: they free nothing


class Aside:
    """The bytes of storages that are empty meanwhile."""

    def __init__(self, directory: str = "") -> None:
        self._directory = directory
        self._kept: list[tuple[UntypedStorage, int, Tensor | None]] = []  # None: in the file, one after the other
        self._scratch: list[tuple[UntypedStorage, int]] = []
        self._file: IO[bytes] | None = None

    def put(self, tensors: Iterable[Tensor], scratch: Iterable[Tensor] = ()) -> int:
        """Empty the storages of tensors and return how many bytes that frees; what is in `scratch` need not come back.

        Raises:
            OSError: the file cannot be written; everything is then as it was.
        """
        chosen = _storages_of(tensors)
        on_host = [each for each in chosen if each.device.type == "cpu"]
        if on_host:
            self._file = tempfile.TemporaryFile(dir=self._directory or None)  # noqa: SIM115  # open until `back`
            try:
                for each in on_host:
                    self._file.write(_bytes_of(each))
                self._file.flush()
            except OSError:
                self._file.close()
                raise
        if len(on_host) < len(chosen):
            torch.cuda.synchronize()  # DeepSpeed computes on streams of its own, too
        kept = {each._cdata: _to_host(each) for each in chosen if each.device.type != "cpu"}
        for each in chosen:
            self._kept.append((each, each.nbytes(), kept.get(each._cdata)))
            each.resize_(0)
        for each in _storages_of(scratch):
            self._scratch.append((each, each.nbytes()))
            each.resize_(0)
        if kept:
            torch.cuda.empty_cache()
        give_back_to_system()
        return sum(size for _, size, *_ in (*self._kept, *self._scratch))

    def back(self) -> None:
        """Fill the storages again."""
        if self._file is not None:
            self._file.seek(0)
        while self._scratch:
            storage, size = self._scratch.pop()
            storage.resize_(size)
        for storage, size, kept in self._kept:
            storage.resize_(size)
            if kept is not None:
                _flat(storage).copy_(kept)
                continue
            assert self._file is not None, "what was on the host is in the file"
            target, done = _bytes_of(storage), 0
            while done < size:
                if not (read := self._file.readinto(target[done:])):  # type: ignore[attr-defined]
                    raise OSError(f"{size - done} bytes of what was put aside are gone")
                done += read
        self._kept.clear()
        if self._file is not None:
            self._file.close()
            self._file = None


def give_back_to_system() -> None:
    """Return freed host memory to the system: jemalloc, where a process has it, keeps all, and glibc small pieces."""
    process = ctypes.CDLL(None)
    if hasattr(process, "mallctl"):
        process.mallctl(PURGE, None, None, None, ctypes.c_size_t(0))
    else:
        process.malloc_trim(0)


def tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield what an optimizer of torch steps on, with gradients and moments."""
    stepped = [each for group in optimizer.param_groups for each in group["params"]]
    for parameter in (*stepped, *optimizer.state):
        yield from (parameter, *([] if parameter.grad is None else [parameter.grad]))
    for state in optimizer.state.values():
        yield from (each for each in state.values() if isinstance(each, torch.Tensor))


def _storages_of(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """Return the storages of tensors that can be emptied, each once."""
    storages = {each._cdata: each for each in map(_storage_of, tensors)}
    large = (each for each in storages.values() if each.device.type != "meta" and each.nbytes() >= LEAST_BYTES)
    return [each for each in large if each.resizable()]


@torch.no_grad()
def _storage_of(tensor: Any) -> UntypedStorage:
    """Return a tensor's storage; of a sharded one (DTensor) that of the part here."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()


def _flat(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[arg-type]


def _bytes_of(storage: UntypedStorage) -> memoryview:
    """Return the bytes of a storage on the host; torch's own view (numpy) would keep it from being emptied."""
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def _to_host(storage: UntypedStorage) -> Tensor:
    source = _flat(storage)
    return torch.empty(source.shape, dtype=torch.uint8, pin_memory=True).copy_(source)
