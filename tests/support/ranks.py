"""Training ranks as real processes, forked from one that has the libraries loaded.

Importing torch, transformers and deepspeed takes a rank longer than most tests take it; a fork server imports them once
for a whole test process. Nothing is initialised before the fork: no engine, no process group, no thread of torch's.
"""

from __future__ import annotations

import multiprocessing
import socket
from typing import TYPE_CHECKING, Any

from torch.multiprocessing.spawn import start_processes

from flowrl.graph.stage import Ranks

if TYPE_CHECKING:
    from collections.abc import Callable

multiprocessing.set_forkserver_preload(
    [
        "deepspeed",
        "peft",
        "transformers.models.llama.modeling_llama",
        "flowrl.engines.deepspeed",
        "flowrl.engines.fsdp",
        "flowrl.engines.torch",
    ]
)


def start_ranks(main: Callable[..., None], arguments: tuple[Any, ...], num_ranks: int = 2) -> None:
    """Run main(ranks, *arguments) in every process and wait; raises what the first of them raised."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # handed on as it is: nobody else can take the port
        start_processes(_be_rank, (server, num_ranks, main, *arguments), nprocs=num_ranks, start_method="forkserver")


def _be_rank(rank: int, server: socket.socket, num_ranks: int, main: Callable[..., None], *arguments: Any) -> None:
    port = server.getsockname()[1]
    listener = -1 if rank else server.detach()
    server.close()
    main(Ranks(rank=rank, world_size=num_ranks, port=port, listener=listener), *arguments)
