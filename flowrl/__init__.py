"""flowrl: reinforcement learning from human feedback as a streaming dataflow graph.

Importing this package loads nothing heavier than msgspec; torch, ray, vllm and deepspeed are loaded by the
processes that use them.
"""

__version__ = "0.1.0"
