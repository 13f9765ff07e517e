"""Stages: one role's code with its declared ports, and what a runtime hands to it.

A stage is a light value while a graph is built: it keeps its constructor's arguments and creates its ports, nothing
else. A runtime rebuilds it in each replica (`specification` and `from_specification` carry it there without pickle),
binds its ports and calls `run`. Subclasses declare `name: In[M]` / `name: Out[M]` as annotations, list in `optional`
the ports that may stay unconnected, and load heavy libraries only inside `run`. One whose settings are all that it is
told needs no constructor.

A stateful stage holds what cannot be made again from its messages. It writes that in `save`, which the runtime calls
whenever the graph's last node writes a checkpoint, between two of its steps (`Context.stepping`).

Tests: tests/unit/graph/test_ports.py
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Protocol,
    Self,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec

from flowrl.config import AUTO, Config, Count, Meta, load_class
from flowrl.errors import GraphError
from flowrl.graph.ports import In, Out, Port
from flowrl.imports import path_of
from flowrl.messages import Message, Save
from flowrl.telemetry import clock as clocks
from flowrl.telemetry.events import Notice, Span
from flowrl.telemetry.files import is_full, no_room

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from flowrl.graph.simulated import Costs, Simulated
    from flowrl.graph.staleness import Admission
    from flowrl.telemetry.events import CauseClock, Recorder, Slots

T = TypeVar("T")
ROOM_RETRY_S = 2.0  # between two looks at a full disk
ROOM_TOLD_S = 60.0  # between two notices of it
Say = Callable[[str], None]


class StageConfig(Config):
    """Placement, common to every node's settings; runtime/placement.py makes `auto` out of the devices there are."""

    replicas: Annotated[Count, AUTO] = 1  # copies that compete for the node's queues
    ranks: Annotated[Count, AUTO] = 1  # processes that march together as one replica
    cpus: Annotated[float, Meta(ge=0), AUTO] = 0.0  # cores reserved for each rank; below 1 it only sits beside others
    gpus: Annotated[int, Meta(ge=0), AUTO] = 0  # whole GPUs reserved for each rank; auto: all that are visible are used
    share: Annotated[str, AUTO] = ""  # another node, on whose devices this one sits


class Agreement(Config):
    """What several nodes of a graph are given and must be given alike, whatever their constructors call it."""

    @property
    def admission(self) -> Admission | None:
        """Return what it says of how much is learned into a version; None: nothing."""
        return None


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


class Devices(Protocol):
    """Devices that a replica has in turns with others; its engine sleeps while they have them."""

    def use(self) -> AbstractAsyncContextManager[None]:
        """Have the devices for the duration of the block; waits for the turn."""
        ...

    def join(self, engine: Any) -> None:
        """Have this engine sleep while others have the devices: `sleep` and `wake`, blocking or not."""
        ...

    def leave(self) -> None:
        """Wait for no turn any more: the engine is about to be closed."""
        ...

    async def attend(self, context: Context) -> None:
        """Take the devices when they are needed and give them back when others wait; the runtime's."""
        ...


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
        devices: Devices | None = None,
        now: Callable[[], float] = clocks.now,
    ) -> None:
        self.node = node
        self.replica = replica
        self.ranks = ranks
        self.run_dir = run_dir
        self.clock = clock
        self.recorder = recorder
        self.stopping = stopping  # set when the user asks for a controlled stop
        self.devices = devices  # None: it need not wait for them
        self.compute = compute if devices is None else _in_turn(compute, devices)
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
        self.slots: Slots | None = None  # of its generation engine
        self.version = -1
        self._boundary = asyncio.Condition()

    @asynccontextmanager
    async def stepping(self) -> AsyncGenerator[None]:
        """Go from one version to the next in the body; no state is saved while it runs."""
        async with self._boundary:
            yield
            self.version += 1
            self._boundary.notify_all()

    @asynccontextmanager
    async def between_steps(self, version: int) -> AsyncGenerator[None]:
        """Wait until this replica has come as far as `version`, and keep it from stepping while the body runs."""
        async with self._boundary:
            await self._boundary.wait_for(lambda: self.version >= version)
            yield

    @property
    def where(self) -> str:
        """Return node and replica as errors name them."""
        return f"{self.node}.{self.replica}"

    def notice(self, text: str, *, level: str = "warning") -> None:
        """Tell the user a line."""
        self.recorder.record(Notice(level=level, where=self.where, text=text, time_s=self.now()))

    def span(
        self, name: str, start_s: float, *, groups: Sequence[int] = (), args: dict[str, Any] | None = None
    ) -> None:
        """Tell the timeline what this replica did from `start_s` until now, with which groups."""
        span = Span(
            node=self.node,
            replica=self.replica,
            name=name,
            start_s=start_s,
            end_s=self.now(),
            groups=list(groups),
            args=dict(args or {}),
        )
        self.recorder.record(span)

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
                await self.wait_for_room(no_room(self.run_dir, why=os.strerror(error.errno or 0)))

    async def wait_for_room(self, trouble: str) -> None:
        """Say what a full disk lacks, now and then, and wait a while; to the runtime this is no stall."""
        if self.now() - self._room_told_s >= ROOM_TOLD_S:
            self._room_told_s = self.now()
            text = f"{trouble}; waiting for room, tried again every {ROOM_RETRY_S:.0f} s"
            self.notice(text)
        await self.note_wait(trouble)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROOM_RETRY_S):
                    await self.stopping.wait()
        finally:
            await self.note_wait("")


def _in_turn(compute: Compute, devices: Devices) -> Compute:
    async def under_lease(function: Callable[..., T], *arguments: Any) -> T:
        async with devices.use():
            return await compute(function, *arguments)

    return under_lease


class Stage:
    """One role's code with its declared ports."""

    config: StageConfig
    optional: ClassVar[frozenset[str]] = frozenset()  # ports that may stay unconnected
    together: ClassVar[tuple[frozenset[str], ...]] = ()  # of these, ports of which all or none are joined
    ordered: ClassVar[frozenset[str]] = frozenset()  # ports at which groups arrive in the order of their ids
    # Whether it holds what cannot be made again from its messages: if it dies, the run goes back to a checkpoint.
    is_stateful: ClassVar[bool] = False
    is_single: ClassVar[bool] = False  # replicas would each do all of its work, or break its order; so would state
    data_digest: str = ""  # of the rows that `check` has read, which a resumed run must find again
    saves: In[Save]  # only of a stateful stage, as the next; a graph joins them
    saving: Out[Save]  # where it is the graph's last node: asks all the others for their part of a checkpoint
    _arguments: dict[str, Any]

    def __init__(self, config: StageConfig) -> None:
        self.config = config

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        stage = super().__new__(cls)
        bound = _signature(cls).bind(stage, *args, **kwargs)
        bound.apply_defaults()
        stage._arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        for name, (direction, message) in port_types(cls).items():
            is_optional, is_ordered = name in cls.optional or message is Save, name in cls.ordered
            setattr(stage, name, direction(stage, name, message, is_optional=is_optional, is_ordered=is_ordered))
        return stage

    @property
    def arguments(self) -> dict[str, Any]:
        """Return what the stage was constructed with, by name."""
        return self._arguments

    @property
    def ports(self) -> dict[str, Port]:
        """Return the declared ports by name."""
        return {name: getattr(self, name) for name in port_types(type(self))}

    @property
    def admission(self) -> Admission | None:
        """Return what it learns into each version; only a stage that gives credits back learns anything."""
        return None

    def check(self, say: Say) -> None:
        """Raise a UserError if what this stage needs (model, data, function) is not there; starts nothing."""

    def simulated(self, costs: Costs) -> Simulated | None:
        """Say what the stage does in a simulation; None: no graph that needs it is predicted.

        It holds for the class that defines it alone: a subclass may do anything else.
        """
        return None

    async def run(self, context: Context) -> None:
        """Do the stage's work until its input is closed or, for the graph's last node, until it is finished."""
        raise NotImplementedError

    async def follow(self, context: Context) -> None:
        """Serve as a rank other than 0; a stage that allows several ranks overrides it."""
        raise NotImplementedError

    def save(self, directory: Path, version: int) -> None:
        """Write the state from which step `version` goes on into a directory; blocking.

        A stateful stage that is not the graph's last node overrides it. `context.version` may be greater by now, where
        the stage runs ahead of the one that asks.
        """
        raise NotImplementedError


@functools.cache
def _signature(stage: type[Stage]) -> inspect.Signature:
    return inspect.signature(stage.__init__)


@functools.cache
def port_types(stage: type[Stage]) -> dict[str, tuple[type[In[Any]] | type[Out[Any]], Any]]:
    """Return name -> (In or Out, message type) from a stage class's annotations.

    Raises:
        GraphError: an annotation that is to be a port is not one, or names what is not there when the class is used.
    """
    found: dict[str, tuple[type[In[Any]] | type[Out[Any]], Any]] = {}
    for kind in reversed(stage.__mro__):
        if kind is Stage and not stage.is_stateful:
            continue
        for name, annotation in inspect.get_annotations(kind).items():
            hint = _resolved(kind, name, annotation)
            origin, where = get_origin(hint), f"{stage.__name__}.{name}"
            if hint in (In, Out):
                raise GraphError(where, "does not say which message it carries", f"write {hint.__name__}[Rollouts]")
            if origin not in (In, Out):
                if any(get_origin(each) in (In, Out) for each in get_args(hint)):
                    remedy = f"write the port alone, and list {name!r} in `optional` where it may stay unconnected"
                    raise GraphError(where, f"{annotation} holds a port and is none", remedy)
                continue
            message = _meant(stage, get_args(hint)[0])
            if not (isinstance(message, type) and issubclass(message, Message)):
                raise GraphError(where, f"{message!r} is not a message", "subclass flowrl.messages.Message")
            found[name] = (origin, message)
    return found


def _meant(stage: type, message: Any) -> Any:
    """Return the message that a class of type parameters, `class Sift(Stage, Generic[M])`, has as `Sift[Scored]`."""
    for kind in reversed(stage.__mro__):
        for base in getattr(kind, "__orig_bases__", ()) if "__orig_bases__" in vars(kind) else ():
            names = getattr(get_origin(base), "__parameters__", ())
            if isinstance(message, TypeVar) and message in names:
                message = get_args(base)[names.index(message)]
    return message.__bound__ or message if isinstance(message, TypeVar) else message


def _resolved(kind: type, name: str, annotation: Any) -> Any:
    """Return what an annotation of a class means; None for one that names what is there for type checkers only."""
    module = sys.modules.get(kind.__module__)
    scope = {"In": In, "Out": Out, **vars(module)} if module else {}
    holder: Any = SimpleNamespace(__annotations__={name: annotation})
    try:
        return get_type_hints(holder, globalns=scope, localns=dict(vars(kind)))[name]
    except (NameError, AttributeError, TypeError) as error:
        text = str(annotation)
        if "In[" not in text and "Out[" not in text:
            return None
        what = f"the annotation {text} cannot be read ({error})"
        remedy = "import its message where the class is defined, not under TYPE_CHECKING or in a function"
        raise GraphError(f"{kind.__name__}.{name}", what, remedy) from error


class Specification(msgspec.Struct, frozen=True, kw_only=True):
    """A stage as plain data: its class and its constructor's arguments, its settings as it settled them."""

    stage: str  # "module:Class"
    arguments: dict[str, Any]


def specification(stage: Stage) -> Specification:
    """Return what rebuilds the stage in another process."""
    kind = type(stage)
    if "<locals>" in kind.__qualname__:
        what = "is defined inside a function, where no other process can find it"
        raise GraphError(kind.__name__, what, "define the class in the graph file itself or in a module beside it")
    return Specification(
        stage=path_of(kind),
        arguments={
            name: msgspec.to_builtins(stage.config if name == "config" else value)
            for name, value in stage.arguments.items()
        },
    )


def from_specification(spec: Specification, where: str) -> Stage:
    """Rebuild a stage from its specification."""
    kind = load_class(spec.stage, where)
    try:
        hints = _argument_types(kind)
    except NameError as error:
        remedy = "import it where the class is defined, not under TYPE_CHECKING"
        raise GraphError(where, f"{spec.stage}: an argument's type is not importable ({error})", remedy) from error
    try:
        return kind(**{name: msgspec.convert(value, hints[name]) for name, value in spec.arguments.items()})
    except msgspec.ValidationError as error:
        what = f"{kind.__name__} was given an argument of another type than it declares ({error})"
        raise GraphError(where, what, "is its config that of another node?") from error


@functools.cache
def _argument_types(kind: type[Stage]) -> dict[str, Any]:
    config = getattr(kind, "Config", StageConfig)
    hints = get_type_hints(kind.__init__, localns={"Config": config})
    return {**hints, "config": config} if kind.__init__ is Stage.__init__ else hints
