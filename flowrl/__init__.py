"""flowrl: reinforcement learning from human feedback as a streaming dataflow graph.

    import flowrl

    flowrl.check("graphs/ppo_async.py", {"learner.lr": 1e-6})
    run = flowrl.run("graphs/ppo_async.py", {"learner.lr": 1e-6, "steps": 2})
    run = flowrl.load_run("runs/first")

Importing this package loads nothing heavier than msgspec; torch, ray, vllm and deepspeed are loaded by the
processes that use them.

Tests: tests/graphs/test_python_api.py
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowrl.api import Run, check, load_run, run
    from flowrl.errors import FlowrlError

__version__ = "0.1.0"
__all__ = ["FlowrlError", "Run", "check", "load_run", "run"]


def __getattr__(name: str) -> Any:
    """Load a part of the Python API when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module 'flowrl' has no attribute {name!r}")
    from flowrl import api

    return getattr(api, name)
