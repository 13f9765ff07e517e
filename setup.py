"""Puts graphs/ into the wheel, as flowrl/graphs, where `flowrl init` finds it; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("*.py", "*.yaml", "recipes/*")


class WithGraphs(build_py):
    """Builds the package with the graphs and recipes as data."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # a checkout has them beside the package
            return
        for file in (file for pattern in SHIPPED for file in Path("graphs").glob(pattern)):
            target = Path(self.build_lib, "flowrl", file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


setup(cmdclass={"build_py": WithGraphs})
