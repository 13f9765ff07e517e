"""Where a run may be placed: equal machines with their GPUs, memory and cores, as `--on` says them or as found here.

`8x80GB`, `2x8xH100,host=1TB,cores=96` (two machines), `4x24GB`, `cpu,host=24GB,cores=2`, or a YAML file of the same
words: `{machines: 2, gpus: 8, device: 80GB, host: 1TB, cores: 96}`. GB is 10^9 bytes and GiB 2^30. A GPU is named, or
given by its memory alone and then takes the speed of a common one of that size, which the plan says. Machines that
differ are refused: flowrl places on equal ones. Called by the planner, the companion of a run and the command line.

Tests: tests/unit/tuning/test_machines.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.config import read_yaml
from flowrl.errors import ConfigError
from flowrl.runtime.devices import Gpu, Machine, together, visible_machine

if TYPE_CHECKING:
    from collections.abc import Sequence

WHERE = "--on"
EXAMPLE = "write 8x80GB, 2x8xH100,host=1TB, cpu,host=24GB,cores=2 or the name of a YAML file"
UNITS = {"MB": 10**6, "MIB": 1 << 20, "GB": 10**9, "GIB": 1 << 30, "TB": 10**12, "TIB": 1 << 40}
NAMES = ("machines", "gpus", "device", "host", "cores")  # of a YAML file
MOST = 4096  # machines, or GPUs of one


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """How fast a GPU is, by its vendor's data sheet."""

    name: str
    memory_bytes: int
    flops: float  # operations a second in bfloat16, dense
    bandwidth: float  # bytes a second from its memory


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """Equal machines."""

    machine: Machine  # the GPUs of all of them, and the cores of one
    num_machines: int = 1
    host_bytes: int = 0  # of each; 0: not said
    speed: Speed | None = None  # of a GPU
    is_assumed: bool = False  # the speed is that of another GPU of its size

    @property
    def whole(self) -> Machine:
        """Return all machines as one, as the rules of placement count them."""
        return msgspec.structs.replace(self.machine, cores=self.num_machines * self.machine.cores)

    @property
    def per_machine(self) -> int:
        """Return the GPUs of one machine."""
        return len(self.machine.gpus) // self.num_machines

    @property
    def device_bytes(self) -> int:
        """Return the memory of a GPU."""
        return min((gpu.free_bytes for gpu in self.machine.gpus), default=0)

    def __str__(self) -> str:
        """Return it in words: `2 machines, each 8 x 80 GB (as fast as A100-80GB), 96 cores, 1000 GB of host memory`."""
        parts: list[str] = []
        if self.speed is not None:
            name = f"{self.device_bytes / 1e9:.4g} GB"
            parts.append(f"{self.per_machine} x {name} ({'as fast as ' * self.is_assumed}{self.speed.name})")
        if self.machine.cores:
            parts.append(f"{self.machine.cores} core{'s' * (self.machine.cores != 1)}")
        if self.host_bytes:
            parts.append(f"{self.host_bytes / 1e9:.4g} GB of host memory")
        words = ", ".join(parts) or "a machine of which nothing is said"
        return f"{self.num_machines} machines, each {words}" if self.num_machines > 1 else words


def _speed(name: str, gigabytes: int, teraflops: float, gigabytes_per_s: float) -> Speed:
    return Speed(name=name, memory_bytes=gigabytes * 10**9, flops=teraflops * 1e12, bandwidth=gigabytes_per_s * 1e9)


SPEEDS = [  # the first of a size stands for all of it
    _speed("A100-80GB", 80, 312, 2039), _speed("H100", 80, 989, 3350), _speed("A800", 80, 312, 2039),
    _speed("H800", 80, 989, 3350), _speed("H200", 141, 989, 4800), _speed("H20", 96, 148, 4000),
    _speed("B200", 180, 2250, 8000), _speed("A100-40GB", 40, 312, 1555), _speed("L40S", 48, 362, 864),
    _speed("RTX4090", 24, 165, 1008), _speed("L4", 24, 121, 300), _speed("A10G", 24, 70, 600),
    _speed("RTX3090", 24, 71, 936), _speed("T4", 16, 65, 320), _speed("V100", 32, 125, 900),
]  # fmt: skip


def parse_site(text: str) -> Site:
    """Return the machines that `--on` says.

    Raises:
        ConfigError: it says none, or something is not a number of what it should be.
    """
    text = text.strip()
    if text.endswith((".yaml", ".yml")):
        return _site(_read(Path(text)), f"{WHERE} {text}")
    first, *rest = [part.strip() for part in text.split(",")]
    counts = re.fullmatch(r"(?:(\d+)\s*x\s*)?(\d+)\s*x\s*([A-Za-z0-9][A-Za-z0-9.\- ]*)", first)
    if counts is None and first.lower() != "cpu":
        raise ConfigError(WHERE, f"{first!r} is not a number of GPUs", EXAMPLE)
    given: dict[str, Any] = {}
    if counts is not None:
        given = {"machines": int(counts[1] or 1), "gpus": int(counts[2]), "device": counts[3]}
    for part in rest:
        name, separator, value = (each.strip() for each in part.partition("="))
        if name not in ("host", "cores") or not separator:
            raise ConfigError(WHERE, f"{part!r} is not understood", "after the GPUs come host=1TB and cores=96")
        if name in given:
            raise ConfigError(WHERE, f"{text!r} says {name} twice", "say it once")
        given[name] = int(value) if value.isdigit() and name == "cores" else value
    return _site(given, WHERE)


def this_site() -> Site:
    """Return this machine."""
    return site_of([visible_machine()])


def site_of(machines: Sequence[Machine]) -> Site:
    """Return equal machines, which have what the least of them has."""
    least = min(machine.cores for machine in machines)
    machine, num = msgspec.structs.replace(together(machines), cores=least), len(machines)
    host_bytes = min(machine.host_bytes for machine in machines)
    if not machine.gpus:
        return Site(machine=machine, num_machines=num, host_bytes=host_bytes)
    speed, is_assumed = speed_of(machine.gpus[0])
    return Site(machine=machine, num_machines=num, host_bytes=host_bytes, speed=speed, is_assumed=is_assumed)


def speed_of(gpu: Gpu) -> tuple[Speed, bool]:
    """Return the speed of a GPU by its name, and False; where that is not known, one of its size, and True."""
    words = re.split(r"[^A-Za-z0-9]+", gpu.name.replace("RTX ", "RTX"))
    named = [speed for speed in SPEEDS if speed.name.partition("-")[0] in words]
    return min(named or SPEEDS, key=lambda speed: abs(speed.memory_bytes - gpu.total_bytes)), not named


def parse_bytes(text: str, where: str) -> int:
    """Return a size in bytes: 80GB is 80 * 10^9, 80GiB is 80 * 2^30.

    Raises:
        ConfigError: it is none, or next to nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    size = round(float(found[1]) * UNITS.get(found[2].upper(), 0)) if found else 0
    if size < UNITS["GB"] // 2:
        what = f"{text!r} is not a size" if not size else f"{text!r} holds no run"
        raise ConfigError(where, what, "write a number with GB, GiB, TB or TiB, such as 80GB")
    return size


def _site(given: dict[str, Any], where: str) -> Site:
    numbers = {
        name: _count(given.get(name, least), f"{where} {name}", least)
        for name, least in (("machines", 1), ("gpus", int("device" in given)), ("cores", 0))
    }
    host_bytes = parse_bytes(str(given["host"]), f"{where} host") if "host" in given else 0
    machine = Machine(cores=numbers["cores"])
    if not numbers["gpus"]:
        if numbers["machines"] > 1:
            raise ConfigError(where, f"{numbers['machines']} machines without GPUs", "plan for one")
        return Site(machine=machine, host_bytes=host_bytes)
    if "device" not in given:
        raise ConfigError(where, f"has {numbers['gpus']} GPUs, and does not say which", "add device: 80GB")
    speed, is_assumed, size = _named(str(given["device"]), f"{where} device")
    gpus = tuple(
        Gpu(name=speed.name, index=index % numbers["gpus"], total_bytes=size, free_bytes=size)
        for index in range(numbers["machines"] * numbers["gpus"])
    )
    machine, num = msgspec.structs.replace(machine, gpus=gpus), numbers["machines"]
    return Site(machine=machine, num_machines=num, host_bytes=host_bytes, speed=speed, is_assumed=is_assumed)


def _count(value: Any, where: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
        raise ConfigError(where, f"is {value!r}", f"give {max(1, least)} to {MOST}")
    return value


def _named(name: str, where: str) -> tuple[Speed, bool, int]:
    """Return a GPU's speed, whether it is another's, and its memory."""
    key = name.upper().replace("-", "").replace(" ", "")
    for speed in SPEEDS:
        if speed.name.upper().replace("-", "") in (key, f"{key}80GB"):
            return speed, False, speed.memory_bytes
    if not name[:1].isdigit():
        known = ", ".join(speed.name for speed in SPEEDS)
        raise ConfigError(where, f"{name!r} is not a GPU that flowrl knows", f"give its memory, or one of {known}")
    size = parse_bytes(name, where)
    return min(SPEEDS, key=lambda speed: abs(speed.memory_bytes - size)), True, size


def _read(path: Path) -> dict[str, Any]:
    where = f"{WHERE} {path}"
    tree = read_yaml(path, EXAMPLE)
    if not isinstance(tree, dict):
        raise ConfigError(where, "is no mapping", "write machines: 2, gpus: 8, device: 80GB, host: 1TB, cores: 96")
    if unknown := [str(name) for name in cast("dict[Any, Any]", tree) if name not in NAMES]:
        raise ConfigError(where, f"has no {unknown[0]!r}", f"it may have {', '.join(NAMES)}")
    return cast("dict[str, Any]", tree)
