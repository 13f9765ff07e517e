"""Two training ranks as real processes, forked from one that has the libraries loaded.

Importing torch, transformers and deepspeed takes a rank longer than most tests take it; a fork server imports them once
for a whole test process. Nothing is initialised before the fork: no engine, no process group, no thread of torch's.
"""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING, Any

from torch.multiprocessing.spawn import start_processes

if TYPE_CHECKING:
    from collections.abc import Callable

multiprocessing.set_forkserver_preload(
    [
        "deepspeed",
        "peft",
        "transformers.models.llama.modeling_llama",
        "flowrl.engines.deepspeed",
        "flowrl.engines.torch",
    ]
)


def start_ranks(main: Callable[..., None], arguments: tuple[Any, ...], count: int = 2) -> None:
    """Run main(rank, *arguments) in `count` processes and wait for them; raises what the first of them raised."""
    start_processes(main, arguments, nprocs=count, start_method="forkserver")
