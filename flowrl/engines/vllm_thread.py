"""vLLM's engine core in a thread of this process instead of two processes of its own.

It starts in two seconds instead of fifteen and needs a third of the memory: for CPUs and for tests. It rests on
private classes of vLLM (tried on 0.32), and nothing else in flowrl does. They are EngineCoreProc with its handshake
replaced by known addresses, and the client that accepts such addresses.

Invariants:
- after `stop` the core's thread and both threads of its sockets have ended, so that the model's memory is free for the
  next engine;
- the classes of transformers stay as they are: a learner of this process uses them, too.

Called by `VllmEngine` when `layout` is "thread".

Tests: tests/contracts/test_vllm_engine.py
"""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.transformers.base import Base
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCoreProc, EngineShutdownState
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.executor import Executor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vllm.engine.arg_utils import AsyncEngineArgs


# vLLM's CPU kernels share scratch memory and counters within a process: two engines that compute at once hang in
# attention or corrupt each other. They take turns; whoever waits holds `_NEXT`, so that no engine overtakes.
_NEXT = threading.Lock()
_TURN = threading.Lock()

# Where vLLM has no code of its own for a family it runs the class of transformers, and first changes it so that every
# model of the class compiles and wants vLLM's config. Nothing is compiled here.
setattr(Base, "_decorate_cls_for_torch_compile", lambda *_, **__: None)  # noqa: B010

JOIN_S = 5.0  # for a socket thread that has nothing left to do


def close_client(client: AsyncLLM) -> None:
    """Shut a client down in either layout, its socket context included, which vLLM leaves open."""
    context = client.engine_core.resources.ctx
    client.shutdown()
    context.destroy(linger=0)


class _Ended(Exception):
    """Raised in a socket thread to end it."""


class _Ending:
    """Stands in for a queue or for an output once the core has ended; to touch it ends the thread that does."""

    def put_nowait(self, _: object) -> None:
        raise _Ended

    def __iter__(self) -> Iterator[Any]:
        raise _Ended


@contextmanager
def _turn() -> Iterator[None]:
    with _NEXT:
        _TURN.acquire()
    try:
        yield
    finally:
        _TURN.release()


class _Core(EngineCoreProc):
    """An engine core that knows its addresses and whose socket threads can end."""

    known_addresses: EngineZmqAddresses
    input_thread: threading.Thread

    @contextmanager
    def _perform_handshakes(self, *_: Any, **__: Any) -> Iterator[EngineZmqAddresses]:
        yield self.known_addresses

    def _process_engine_step(self) -> bool:
        with _turn():
            return super()._process_engine_step()

    def _handle_client_request(self, *arguments: Any) -> None:
        with _turn():  # loading weights computes, too
            super()._handle_client_request(*arguments)

    def process_input_sockets(self, *arguments: Any) -> None:
        self.input_thread = threading.current_thread()
        with suppress(_Ended):
            super().process_input_sockets(*arguments)

    def process_output_sockets(self, *arguments: Any) -> None:
        with suppress(_Ended):
            super().process_output_sockets(*arguments)

    def shutdown(self) -> None:
        """Release what this core holds, as the original does, but not the process groups.

        Those belong to the process: other engines in it, of whatever kind, go on using them.
        """
        self.structured_output_manager.clear_backend()
        if self.model_executor:
            self.model_executor.shutdown()
        if self.scheduler:
            self.scheduler.shutdown()
        gc.unfreeze()


class ThreadedCore:
    """An engine core and the thread that steps it."""

    def __init__(self, arguments: AsyncEngineArgs, sockets: Path) -> None:
        self._arguments = arguments
        self._addresses = EngineZmqAddresses(inputs=[f"ipc://{sockets}/in"], outputs=[f"ipc://{sockets}/out"])
        self._started: Future[_Core] = Future()
        self._thread = threading.Thread(target=self._run, name="vllm-core", daemon=True)
        self.failure: Exception | None = None  # what ended the core

    def start(self) -> None:
        """Load the model; blocks until the core waits for requests, and raises whatever kept it from that."""
        self._config: Any = self._arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
        self._executor = Executor.get_class(self._config)
        self._thread.start()
        self._started.result()

    def connect(self) -> AsyncLLM:
        """Return the client; called on the event loop that will use it."""
        return AsyncLLM(
            vllm_config=self._config,
            executor_class=self._executor,
            log_stats=False,
            log_requests=False,
            client_addresses={"input_address": self._addresses.inputs[0], "output_address": self._addresses.outputs[0]},
        )

    def _run(self) -> None:
        kind = type("Core", (_Core,), {"known_addresses": self._addresses})
        try:
            core = kind(
                vllm_config=self._config,
                local_client=True,
                handshake_address="",
                executor_class=self._executor,
                log_stats=False,
            )
        except BaseException as error:  # handed to `start`, in the thread that waits
            self._started.set_exception(error)
            return
        self._started.set_result(core)
        try:
            core.run_busy_loop()
        except SystemExit:
            pass  # how the loop ends when it is asked to
        except Exception as error:  # the client raises EngineDeadError in whoever waits, which does not say why
            self.failure = error
            core._send_engine_dead()
        finally:
            core.shutdown()

    async def stop(self, client: AsyncLLM | None) -> None:
        """Ask the core to end and wait for its threads; `client` is still open."""
        if self._thread.ident is None or self._started.exception() is not None:
            return
        core = self._started.result()
        core.shutdown_state = EngineShutdownState.REQUESTED
        core.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))
        await asyncio.to_thread(self._thread.join)
        ending: Any = _Ending()
        core.output_queue.put_nowait(ending)
        await asyncio.to_thread(core.output_thread.join, JOIN_S)
        core.input_queue = ending
        if client is not None and not client.engine_core.resources.engine_dead:
            await client.engine_core.abort_requests_async(["none"])  # any message wakes the thread that polls
            await asyncio.to_thread(core.input_thread.join, JOIN_S)
        self._started = Future()  # the core, its model and its cache lie in cycles
        del core
        gc.collect()
