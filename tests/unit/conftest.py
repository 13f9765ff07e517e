"""Keeps the unit tier quick and closed: no sleeping, no Ray, no network.

`time.sleep`, `ray.init` and connecting or binding a socket raise; the pair of connected sockets that an event loop
wakes itself with is neither. Tests over 0.25 s that are not marked slow are listed after the run: listed and not
failed, since a busy machine slows any test.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import socket
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

SLOW_S = 0.25
_too_slow: list[tuple[float, str]] = []


class Forbidden(Exception):
    """A unit test did what the tier does not allow."""


def _forbid(what: str, instead: str) -> Any:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise Forbidden(f"{what} in a unit test; {instead}")

    return refuse


class _RayWithoutInit(importlib.abc.MetaPathFinder):
    """Lets `import ray` through (its exceptions are wanted) and takes `ray.init` away as soon as it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "ray":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_forbid(module: ModuleType) -> None:
                execute(module)
                module.init = _forbid("ray.init", "use the local runtime, or move the test to tests/ray")  # type: ignore[attr-defined]

            spec.loader.exec_module = execute_and_forbid  # type: ignore[method-assign]
        return spec


@pytest.fixture(autouse=True, scope="module")
def _closed_tier():
    forbidden = {
        (time, "sleep"): _forbid("time.sleep", "use the virtual clock"),
        (socket.socket, "connect"): _forbid("connecting a socket", "move the test to tests/contracts"),
        (socket.socket, "connect_ex"): _forbid("connecting a socket", "move the test to tests/contracts"),
        (socket.socket, "bind"): _forbid("binding a socket", "move the test to tests/contracts"),
    }
    finder = _RayWithoutInit()
    with pytest.MonkeyPatch.context() as patch:
        for (owner, name), refuse in forbidden.items():
            patch.setattr(owner, name, refuse)
        sys.meta_path.insert(0, finder)
        if "ray" in sys.modules:
            patch.setattr(sys.modules["ray"], "init", _forbid("ray.init", "use the local runtime"))
        yield
        sys.meta_path.remove(finder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if call.when == "call" and call.duration > SLOW_S and item.get_closest_marker("slow") is None:
        _too_slow.append((call.duration, item.nodeid))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _too_slow:
        terminalreporter.section(f"unit tests over {SLOW_S} s: make them quicker or mark them slow")
        for duration, name in sorted(_too_slow, reverse=True):
            terminalreporter.write_line(f"{duration:6.2f} s  {name}")
