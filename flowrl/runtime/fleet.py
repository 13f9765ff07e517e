"""The fleet: where an attempt's processes are put on the nodes of a cluster, and which nodes come and go.

What reserves cores or GPUs gets a bundle of one placement group, so that a graph is placed as a whole or not at all;
the learner's first rank goes to the home node, and what reserves nothing sits there too.

Invariants:
- whoever waits for a place is named, with what he needs, within `TELL_S`, and no longer than `cluster.place_timeout_s`;
- no rank spans nodes, for a bundle is on one.

One fleet serves the workers (ray.py), which have it reserve anew at each attempt, ask it where to start each process
and tell it where each was born.

Tests: tests/ray/test_placement_on_ray.py
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, cast

import ray as _ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from flowrl.errors import ResourceError, RunError
from flowrl.runtime.actors import seen_devices
from flowrl.runtime.cluster import Unanswered, answer_of, ask
from flowrl.runtime.flow import replica_name
from flowrl.runtime.nodes import amounts, capacities, lacking
from flowrl.runtime.placement import places, places_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from flowrl.graph.graph import ClusterConfig, Graph
    from flowrl.runtime.cluster import Cluster
    from flowrl.runtime.nodes import RayNode
    from flowrl.runtime.placement import Place

    Tell = Callable[[str, str, str], None]

ray: Any = _ray  # its own types are partial

LOOK_AT_GPUS_S = 300.0  # for a process to start in each bundle
NODE_ID = "ray.io/node-id"  # a label that every node of Ray has
TELL_S = 5.0  # of waiting for a place, before it is said
LOOK_S = 2.0  # between two looks at which nodes there are
HEAD_S = 30.0  # without an answer from Ray's head, after which nothing can be started any more
UNHEARD = (Unanswered, RayError, RuntimeError, OSError)  # what asking a head that is gone may raise


class Fleet:
    """The places of one attempt."""

    def __init__(self, graph: Graph, cluster: Cluster, config: ClusterConfig, tell: Tell) -> None:
        self._graph = graph
        self._cluster = cluster
        self._config = config
        self._tell = tell
        self._nodes: dict[str, RayNode] = {}  # by Ray's id; those that may be used
        self._alive: set[str] = set()  # the ids of all that live
        self._home: RayNode | None = None
        self._group: PlacementGroup | None = None
        self._own: list[Place] = []  # the processes that have reserved devices, one bundle of the group each
        self._devices: dict[tuple[str, int], str] = {}  # by host and seat
        self._grown: dict[
            Place, PlacementGroup
        ] = {}  # of processes of replicas that joined, each with a group of its own
        self._born: dict[str, set[str]] = {}  # by replica: addresses
        self._looked_s = 0.0
        self._unheard_s: float | None = None  # since when Ray's head has been asked and has not answered

    async def reserve(self) -> None:
        """Find the nodes and reserve what the graph asks for.

        Raises:
            ResourceError: it was not free in time, or a process's GPUs are on two nodes.
        """
        self._group, self._own, self._devices, self._grown = None, [], {}, {}
        await self.look(is_due=True)
        self._home = await self._find_home(is_first=self._home is None)
        own = self._own = [p for p in places(self._graph) if p.host == p.node and (p.cpus or p.gpus)]
        if not own:
            return
        while True:
            selectors = [self._selector(place) for place in own]
            self._group = placement_group(
                [needs_of(place) for place in own],
                strategy=self._config.strategy.upper(),
                bundle_label_selector=selectors if any(selectors) else cast("Any", None),
            )
            if await self._granted(self._group, [(name_of(place), needs_of(place)) for place in own]):
                break
            remove_placement_group(self._group)  # it would wait for the home node for ever
            self._home = await self._find_home(is_first=False)
        await self._learn_devices(self._group)

    async def _find_home(self, *, is_first: bool) -> RayNode:
        """Return the home node; where the one that the user names is lost while the run goes on, another."""
        nodes, named = await self._cluster.nodes(), self._config.home
        if named and not is_first and named not in {node.address for node in nodes if node.is_alive}:
            home = await self._cluster.home(nodes)
            self._tell("warning", f"node {named}", f"is gone, and was the home node: that is {home.address} now")
            return home
        return await self._cluster.home(nodes, named)

    async def _learn_devices(self, group: Any) -> None:
        on_gpus = [place for place in self._own if place.gpus]
        seen = await asyncio.gather(*(_look(group, self._own.index(place), place.gpus) for place in on_gpus))
        nodes: dict[tuple[str, int], str] = {}
        for place, (node, names) in zip(on_gpus, seen, strict=True):
            for seat, name in zip(place.seats, names, strict=True):
                self._devices[place.node, seat], nodes[place.node, seat] = name, node
        for place in places(self._graph):
            if len({nodes[place.host, seat] for seat in place.seats}) > 1:
                what = f"its {len(place.seats)} GPUs are on several nodes"
                raise ResourceError(name_of(place), what, "lower tensor_parallel, or give it GPUs of its own")

    def devices(self, place: Place) -> list[str]:
        """Return the GPUs that a process is to see, as CUDA names them."""
        return [self._devices[place.host, seat] for seat in place.seats]

    def _selector(self, place: Place) -> dict[str, str]:
        """Return the labels that a bundle's node must have."""
        labels = dict(self._config.labels.get(place.node, {}))
        home = self._home
        if self._cluster.is_local or home is None:
            return labels
        needs = needs_of(place)
        is_first = place.node == self._graph.until_node and place.replica == 0 and place.rank == 0
        if is_first and not labels and home.id in self._nodes and not lacking([("", needs)], [home]):
            return {NODE_ID: home.id}
        if self._config.nodes:
            labels[NODE_ID] = f"in({','.join(self._nodes)})"
        return labels

    async def _granted(self, group: Any, wanted: list[tuple[str, dict[str, float]]]) -> bool:
        """Wait until a group has its places; returns False where the home node is lost, which Ray may know late.

        Raises:
            ResourceError: it has none in time.
        """
        limit_s = self._config.place_timeout_s
        granted = asyncio.ensure_future(answer_of(group.ready(), where="placement", within_s=limit_s))
        told = ""
        try:
            while not (await asyncio.wait([granted], timeout=TELL_S))[0]:
                await self.look()
                if self._home is not None and self._home.id not in self._alive:
                    return False
                if (text := self._waiting_for(wanted)) != told:
                    told = text
                    self._tell("warning", "placement", f"{text}; waiting at most {limit_s:.0f} s")
            await granted
            return True
        except Unanswered as error:
            what = f"{self._waiting_for(wanted)}, and it was not free within {limit_s:.0f} s"
            remedy = "lower replicas, ranks, cpus or gpus, or free or enlarge the cluster"
            raise ResourceError("placement", what, remedy) from error
        finally:
            granted.cancel()

    def _waiting_for(self, wanted: list[tuple[str, dict[str, float]]]) -> str:
        left = lacking(wanted, self._nodes.values())
        who = ", ".join(left or [f"{name} ({amounts(needs)})" for name, needs in wanted])
        reason = "no room for" if left else "others use the room for"
        return f"{reason} {who}; the nodes have {capacities(self._nodes.values())}"

    async def make_room(self, ranks: list[Place]) -> None:
        """Reserve what a replica's processes need, where the graph's own places have none for it."""
        for place in ranks:
            if _bundle_of(place, self._own) is not None or place in self._grown or not needs_of(place):
                continue
            selector = self._selector(place)
            group = self._grown[place] = placement_group(
                [needs_of(place)], bundle_label_selector=[selector] if selector else cast("Any", None)
            )
            if place.gpus:
                _, names = await _look(group, 0, place.gpus)
                self._devices |= {(place.host, seat): name for seat, name in zip(place.seats, names, strict=True)}

    def choice(self, place: Place) -> dict[str, Any]:
        """Return where a process is to be started, as options of its actor."""
        if place in self._grown:
            return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._grown[place], 0)}
        bundle = _bundle_of(place, self._own)
        if self._group is not None and bundle is not None:
            return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, bundle)}
        return self.at_home()

    def at_home(self) -> dict[str, Any]:
        """Return what puts a process on the home node, or on another where that is gone."""
        if self._cluster.is_local or not self._nodes:
            return {}
        named = self._home.id if self._home is not None else ""
        home = self._nodes.get(named) or next(iter(self._nodes.values()))
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(home.id, soft=False)}

    def born(self, replica: str, addresses: set[str]) -> None:
        """Note where a replica's processes are; one that is elsewhere than before is told."""
        before = self._born.get(replica)
        self._born[replica] = addresses
        if before is not None and before != addresses:
            self._tell("info", replica, f"is on {' and '.join(sorted(addresses))} now")

    def where(self) -> str:
        """Return which replicas are on which node, in words, where there are several."""
        if self._cluster.is_local or len(self._nodes) < 2:
            return ""
        by_node: dict[str, list[str]] = {}
        for replica, addresses in sorted(self._born.items()):
            for address in addresses:
                by_node.setdefault(address, []).append(replica)
        return "; ".join(f"{', '.join(held)} on {address}" for address, held in sorted(by_node.items()))

    async def tell_waiting(self, replica: str, needs: Mapping[str, float]) -> None:
        """Say that a replica has no process yet, and what it waits for."""
        await self.look()
        text = f"has no process yet: it needs {amounts(needs)}; the nodes have {capacities(self._nodes.values())}"
        self._tell("warning", replica, text)

    def left(self, replica: str) -> None:
        """Give back what a replica that has left reserved for itself."""
        self._born.pop(replica, None)
        for place in [place for place in self._grown if f"{place.node}.{place.replica}" == replica]:
            with contextlib.suppress(RayError):
                remove_placement_group(self._grown.pop(place))

    def room(self) -> dict[str, int]:
        """Return how many replicas the nodes of `cluster.most` may have on the cluster as it is."""
        return room_for(self._graph, self._config.most, self._nodes.values())

    async def look(self, *, is_due: bool = False) -> bool:
        """Tell which nodes have been lost, with what they held, and which have joined; returns whether there are some.

        Raises:
            RunError: Ray's head has not answered for long.
        """
        if not is_due and (self._cluster.is_local or time.monotonic() < self._looked_s + LOOK_S):
            return False
        self._looked_s = time.monotonic()
        try:
            nodes = await self._cluster.nodes()
        except UNHEARD as error:
            if self._unheard_s is None:
                self._unheard_s = self._looked_s
            silent_s = time.monotonic() - self._unheard_s
            if not self._cluster.is_local and silent_s > HEAD_S:
                what = f"its head has not answered for {silent_s:.0f} s, so nothing can be started any more"
                raise RunError("ray", what, "start the cluster again and resume the run") from error
            return False
        self._unheard_s = None
        self._alive = {node.id for node in nodes if node.is_alive}
        alive = {node.id: node for node in usable(nodes, self._config)}
        before, self._nodes = self._nodes, alive
        if self._cluster.is_local or not before:
            return False
        for node in [node for node in before.values() if node.id not in alive]:
            held = sorted(replica for replica, addresses in self._born.items() if node.address in addresses)
            self._tell("warning", f"node {node.address}", f"is lost, with {', '.join(held) or 'nothing of this run'}")
        for node in [node for node in alive.values() if node.id not in before]:
            self._tell("info", f"node {node.address}", f"has joined, with {capacities([node]).partition(' ')[2]}")
        return before.keys() != alive.keys()

    async def has_head(self) -> bool:
        """Return whether Ray's head answers; if not, every further question to it would only wait."""
        if not self._cluster.has_head:  # when it was asked last, a moment ago
            return False
        try:
            await self._cluster.nodes()
        except UNHEARD:
            return False
        return True

    def free(self) -> None:
        """Give back what was reserved."""
        for group in [self._group, *self._grown.values()]:
            if group is not None:
                with contextlib.suppress(RayError):
                    remove_placement_group(group)


def usable(nodes: list[RayNode], config: ClusterConfig) -> list[RayNode]:
    """Return the living nodes that a run may use."""
    return [node for node in nodes if node.is_alive and (not config.nodes or node.address in config.nodes)]


def room_for(graph: Graph, most: Mapping[str, int], nodes: Collection[RayNode]) -> dict[str, int]:
    """Return how many replicas of each node in `most` the nodes have room for, all else placed; at least its own."""
    wanted = [place for place in places(graph) if place.host == place.node and place.node not in most]
    found: dict[str, int] = {}
    for node, limit in most.items():
        by_replica = [places_of(graph, replica_name(node, index)) for index in range(limit)]
        least = graph.nodes[node].config.replicas
        for count in range(limit, least - 1, -1):
            asked = [*wanted, *(place for ranks in by_replica[:count] for place in ranks)]
            if count == least or not lacking([(name_of(place), needs_of(place)) for place in asked], nodes):
                found[node], wanted = count, asked
                break
    return found


def needs_of(place: Place) -> dict[str, float]:
    """Return the resources that a process reserves."""
    return {name: amount for name, amount in (("CPU", place.cpus), ("GPU", float(place.gpus))) if amount}


def name_of(place: Place) -> str:
    """Return a process's name as it is told."""
    return f"{place.node}.{place.replica}" + (f" rank {place.rank}" if place.rank else "")


async def _look(group: Any, bundle: int, gpus: int) -> tuple[str, list[str]]:
    """Return which node's GPUs a bundle has; it has them for as long as the group lives."""
    where = PlacementGroupSchedulingStrategy(group, bundle)
    look = ray.remote(seen_devices).options(num_cpus=0, num_gpus=gpus, max_retries=0, scheduling_strategy=where)
    return await ask(look, where="placement", within_s=LOOK_AT_GPUS_S)


def _bundle_of(place: Place, own: list[Place]) -> int | None:
    """Return the bundle that a process sits in: its own, that of its first seat, or its host's of the same place."""

    def fits(bundle: Place) -> bool:
        if place.host == place.node:
            return bundle == place
        if place.seats:
            return bundle.node == place.host and place.seats[0] in bundle.seats
        return (bundle.node, bundle.replica, bundle.rank) == (place.host, place.replica, place.rank)

    return next((index for index, bundle in enumerate(own) if fits(bundle)), None)
