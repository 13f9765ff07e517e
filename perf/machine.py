"""Say on what a figure was measured."""

from __future__ import annotations

import os
import platform


def machine() -> str:
    """Return processor, cores, memory and the load a minute ago, as one line."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as lines:
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return (
        f"{model}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )
