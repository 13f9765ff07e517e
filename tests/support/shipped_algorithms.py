"""The algorithms' classes, found in their package, so that a new file is tested without being listed."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

import flowrl.algorithms

T = TypeVar("T")


def defined(base: type[T]) -> list[type[T]]:
    """Return every subclass of `base` in flowrl.algorithms, each once, where it is defined."""
    found: list[type[T]] = []
    for module_info in pkgutil.walk_packages(flowrl.algorithms.__path__, "flowrl.algorithms."):
        module = importlib.import_module(module_info.name)
        found += [
            kind
            for kind in vars(module).values()
            if isinstance(kind, type) and issubclass(kind, base) and kind.__module__ == module.__name__
        ]
    return found
