"""What this machine's processor computes fast in.

Told from its flags and its maker alone, so that all processes of a run, and a plan made before it, say the same.
Called by the engines for `dtype=auto`, by the planner for the bytes of a weight, and by the doctor.

Tests: tests/unit/test_processor.py
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

CPUINFO = Path("/proc/cpuinfo")


def bfloat16_of(cpuinfo: str) -> Literal["fast", "slow", "none"]:
    """Return how a processor, as Linux describes it, multiplies in bfloat16: fast is faster than in float32.

    Intel's are slow where AMX is missing, or hidden from a virtual machine. On two cores of such a Xeon, torch's
    products of SmolLM2-135M's shapes ran at 156 GFLOP/s, at 272 in float32; others saw the same
    (intel/intel-extension-for-pytorch, issue 637). On two cores of an EPYC they ran at 396.
    """
    said: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        said.setdefault(name.strip().lower(), value.strip())
    flags = set(said.get("flags", "").split())
    if "amx_bf16" in flags:
        return "fast"
    if "avx512_bf16" in flags:
        return "slow" if said.get("vendor_id") == "GenuineIntel" else "fast"
    return "none"


@cache
def bfloat16_here() -> Literal["fast", "slow", "none"]:
    """Return it for this machine; "none" where nothing describes the processor."""
    try:
        return bfloat16_of(CPUINFO.read_text())
    except OSError:
        return "none"
