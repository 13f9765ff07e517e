"""Stages: one role's code with its declared ports, and what a runtime hands to it.

A stage is a light value while a graph is built: it keeps its constructor's arguments and creates its ports, nothing
else. A runtime rebuilds it in each replica (`specification` and `from_specification` carry it there without pickle),
binds its ports and calls `run`. Subclasses declare `name: In[M]` / `name: Out[M]` as annotations, list in `optional`
the ports that may stay unconnected, and load heavy libraries only inside `run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, Self, TypeVar, get_type_hints

import msgspec

from flowrl.config import Config, Meta, load_class
from flowrl.errors import GraphError
from flowrl.graph.ports import In, Out, Port
from flowrl.imports import path_of
from flowrl.telemetry.events import Notice
from flowrl.telemetry.files import is_full, no_room

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.telemetry.causes import CauseClock
    from flowrl.telemetry.events import Recorder

T = TypeVar("T")
ROOM_RETRY_S = 2.0  # between two looks at a full disk
ROOM_TOLD_S = 60.0  # between two notices of it
Say = Callable[[str], None]


class StageConfig(Config):
    """Placement, common to every node's settings."""

    replicas: Annotated[int, Meta(ge=1)] = 1  # copies that compete for the node's queues
    ranks: Annotated[int, Meta(ge=1)] = 1  # processes that march together as one replica
    cpus: Annotated[float, Meta(ge=0)] = 0.0  # cores reserved for each rank; below 1 it only sits beside others
    gpus: Annotated[float, Meta(ge=0)] = 0.0  # GPUs reserved for each rank
    share: str = ""  # another node, on whose devices this one sits


class Ranks(msgspec.Struct, frozen=True, kw_only=True):
    """A process's place among the ranks that march together."""

    rank: int = 0
    world_size: int = 1
    address: str = "127.0.0.1"  # of rank 0's rendezvous store
    port: int = 0  # 0 only where world_size is 1
    listener: int = -1  # rank 0: the descriptor of the socket that listens there; -1: none is open yet
    token: str = ""  # under which the ranks meet; who does not know it meets nobody


class Compute(Protocol):
    """Run blocking code in this replica's worker thread, charged as computing."""

    async def __call__(self, function: Callable[..., T], *arguments: Any) -> T: ...


class Context:
    """What one replica is told by its runtime."""

    def __init__(
        self,
        *,
        node: str,
        replica: int,
        ranks: Ranks,
        run_dir: Path,
        clock: CauseClock,
        recorder: Recorder,
        stopping: asyncio.Event,
        compute: Compute,
        background: Compute,
        cut: Callable[[int], Awaitable[bytes]],
        fewer_out: Callable[[int], Awaitable[None]],
        note_wait: Callable[[str], Awaitable[None]],
        num_readers: int = 1,
        resume_from: Path | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.node = node
        self.replica = replica
        self.ranks = ranks
        self.run_dir = run_dir
        self.clock = clock
        self.recorder = recorder
        self.stopping = stopping  # set when the user asks for a controlled stop
        self.compute = compute
        self.background = background  # like compute, but beside it and not charged: for what merely waits
        self.cut = cut  # what a checkpoint of this version must hold of the flow; opaque to stages
        self.fewer_out = fewer_out  # wait until fewer groups than this are admitted and have not ended
        self.note_wait = note_wait  # tell the runtime what is waited for outside the flow; "": nothing any more
        self.num_readers = num_readers  # replicas that take the weights this node publishes
        self.resume_from = resume_from  # checkpoint directory to continue from
        self.now = now
        self.done = 0  # groups finished, for the live view
        self._room_told_s = -ROOM_TOLD_S
        self.running = 0
        self.version = -1

    @property
    def where(self) -> str:
        """Return node and replica as errors name them."""
        return f"{self.node}.{self.replica}"

    async def write(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run code that writes to the disk, like `compute`; while the disk is full it is said and tried again.

        Raises:
            OSError: the disk is full and the user asked to stop, or something else is wrong.
        """
        while True:
            try:
                return await self.compute(function, *arguments)
            except OSError as error:
                if not is_full(error) or self.stopping.is_set():
                    raise
                await self.wait_for_room(no_room(self.run_dir))

    async def wait_for_room(self, trouble: str) -> None:
        """Say what a full disk lacks, now and then, and wait a while; to the runtime this is no stall."""
        if not 0.0 <= self.now() - self._room_told_s < ROOM_TOLD_S:
            self._room_told_s = self.now()
            text = f"{trouble}; waiting for room, tried again every {ROOM_RETRY_S:.0f} s"
            self.recorder.record(Notice(level="warning", where=self.where, text=text, time_s=self.now()))
        await self.note_wait(trouble)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROOM_RETRY_S):
                    await self.stopping.wait()
        finally:
            await self.note_wait("")


class Stage:
    """One role's code with its declared ports."""

    config: StageConfig
    optional: ClassVar[frozenset[str]] = frozenset()  # ports that may stay unconnected
    # Whether it holds what cannot be made again from its messages: if it dies, the run goes back to a checkpoint.
    is_stateful: ClassVar[bool] = False
    data_digest: str = ""  # of the rows that `check` has read, which a resumed run must find again
    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        stage = super().__new__(cls)
        bound = _signature(cls).bind(stage, *args, **kwargs)
        bound.apply_defaults()
        stage._arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        for name, (direction, message) in port_types(cls).items():
            setattr(stage, name, direction(stage, name, message, is_optional=name in cls.optional))
        return stage

    @property
    def arguments(self) -> dict[str, Any]:
        """Return what the stage was constructed with, by name."""
        return self._arguments

    @property
    def ports(self) -> dict[str, Port]:
        """Return the declared ports by name."""
        return {name: getattr(self, name) for name in port_types(type(self))}

    def check(self, say: Say) -> None:
        """Raise a UserError if what this stage needs (model, data, function) is not there; starts nothing."""

    async def run(self, context: Context) -> None:
        """Do the stage's work until its input is closed or, for the graph's last node, until it is finished."""
        raise NotImplementedError

    async def follow(self, context: Context) -> None:
        """Serve as a rank other than 0; a stage that allows several ranks overrides it."""
        raise NotImplementedError


@functools.cache
def _signature(stage: type[Stage]) -> inspect.Signature:
    return inspect.signature(stage.__init__)


@functools.cache
def port_types(stage: type[Stage]) -> dict[str, tuple[type[In[Any]] | type[Out[Any]], Any]]:
    """Return name -> (In or Out, message type) from a stage class's annotations."""
    found: dict[str, tuple[type[In[Any]] | type[Out[Any]], Any]] = {}
    for kind in reversed(stage.__mro__):
        own = inspect.get_annotations(kind)
        named = {k: v for k, v in own.items() if isinstance(v, str) and v.startswith(("In[", "Out["))}
        if named:
            scope = {**vars(sys.modules[kind.__module__]), "In": In, "Out": Out}
            for name, text in named.items():
                annotation = eval(text, scope)
                found[name] = (annotation.__origin__, annotation.__args__[0])
    return found


class Specification(msgspec.Struct, frozen=True, kw_only=True):
    """A stage as plain data: its class and its constructor's arguments."""

    stage: str  # "module:Class"
    arguments: dict[str, Any]


def specification(stage: Stage) -> Specification:
    """Return what rebuilds the stage in another process."""
    kind = type(stage)
    return Specification(
        stage=path_of(kind),
        arguments={name: msgspec.to_builtins(value) for name, value in stage.arguments.items()},
    )


def from_specification(spec: Specification, where: str) -> Stage:
    """Rebuild a stage from its specification."""
    kind = load_class(spec.stage, where)
    try:
        hints = _argument_types(kind)
    except NameError as error:
        remedy = "import it where the class is defined, not under TYPE_CHECKING"
        raise GraphError(where, f"{spec.stage}: an argument's type is not importable ({error})", remedy) from error
    return kind(**{name: msgspec.convert(value, hints[name]) for name, value in spec.arguments.items()})


@functools.cache
def _argument_types(kind: type[Stage]) -> dict[str, Any]:
    return get_type_hints(kind.__init__, localns={"Config": getattr(kind, "Config", StageConfig)})
