"""Graphs refuse what cannot run, with the place, the arithmetic and the remedy."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.errors import GraphError
from flowrl.graph.graph import Credits, Graph, Latest, Queue
from flowrl.graph.plan import GraphPlan, graph_of, plan_of
from flowrl.graph.ports import In, Out
from flowrl.graph.show import edge_table, mermaid, staleness_line
from flowrl.graph.stage import Stage, StageConfig
from flowrl.graph.staleness import most_credits, staleness_bound
from flowrl.messages import Credit, Prompt, Rollouts, Samples, Weights
from tests.support.flows import flow, random_settings

if TYPE_CHECKING:
    from collections.abc import Callable


class Source(Stage):
    class Config(StageConfig):
        pass

    credits: In[Credit]
    prompts: Out[Prompt]

    def __init__(self, config: Config) -> None:
        self.config = config


class Worker(Stage):
    class Config(StageConfig):
        pass

    optional = frozenset({"weights"})
    prompts: In[Prompt]
    rollouts: Out[Rollouts]
    weights: In[Weights]

    def __init__(self, config: Config) -> None:
        self.config = config


class Sink(Stage):
    class Config(StageConfig):
        pass

    optional = frozenset({"weights"})
    rollouts: In[Rollouts]
    released: Out[Credit]
    weights: Out[Weights]

    def __init__(self, config: Config) -> None:
        self.config = config


class Loop(Stage):
    class Config(StageConfig):
        pass

    rollouts: In[Rollouts]
    prompts: Out[Rollouts]

    def __init__(self, config: Config) -> None:
        self.config = config


class Parts:
    """A sound graph and its pieces, to be spoiled one at a time."""

    def __init__(self, *, initial: int = 8, per_version: int = 4, window: int = 1, depth: int = 8,
                 max_staleness: int = 1, sink_replicas: int = 1) -> None:  # fmt: skip
        self.source = Source(Source.Config())
        self.worker = Worker(Worker.Config(replicas=2))
        self.sink = Sink(Sink.Config(replicas=sink_replicas))
        self.edges: list[Any] = [
            Queue(self.source.prompts, self.worker.prompts, depth=4),
            Queue(self.worker.rollouts, self.sink.rollouts, depth=depth, window=window, max_staleness=max_staleness),
            Credits(self.sink.released, self.source.credits, initial=initial, per_version=per_version),
            Latest(self.sink.weights, self.worker.weights),
        ]

    def graph(self) -> Graph:
        nodes = {"source": self.source, "worker": self.worker, "sink": self.sink}
        return Graph(nodes=nodes, edges=self.edges, until=self.sink)


def test_a_sound_graph_checks() -> None:
    Parts().graph().check()


def drop_an_edge(parts: Parts) -> None:
    del parts.edges[0]


def feed_twice(parts: Parts) -> None:
    parts.edges.append(Queue(parts.source.prompts, parts.worker.prompts, depth=4))


def cross_types(parts: Parts) -> None:
    parts.edges[0] = Queue(parts.source.prompts, parts.sink.rollouts, depth=4)  # pyright: ignore
    parts.edges[1] = Queue(parts.worker.rollouts, parts.worker.prompts, depth=4)


def no_depth(parts: Parts) -> None:
    parts.edges[0] = Queue(parts.source.prompts, parts.worker.prompts, depth=0)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (drop_an_edge, "worker.prompts: is fed by no edge"),
        (feed_twice, "is on 2 edges"),
        (cross_types, "carries Prompt, but sink.rollouts takes Rollouts"),
        (no_depth, "depth=0"),
    ],
)
def test_a_spoiled_graph_is_refused_with_its_place(spoil: Callable[[Parts], None], said: str) -> None:
    parts = Parts()
    spoil(parts)
    with pytest.raises(GraphError) as refused:
        parts.graph().check()
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        (
            {"initial": 9, "depth": 9},
            "9 credits, 4 per version and window 1 allow staleness 2, more than max_staleness=1",
        ),
        ({"initial": 8, "window": 2}, "allow staleness 2"),
        ({"initial": 3}, "3 credits can never fill a step of 4 groups"),
        ({"depth": 7}, "depth=7 with 8 credits"),
        ({"sink_replicas": 2}, "2 replicas compete"),
        ({"window": 0}, "window=0"),
    ],
)
def test_bounds_that_break_or_deadlock_are_refused_with_the_arithmetic(bounds: dict[str, int], said: str) -> None:
    with pytest.raises(GraphError) as refused:
        Parts(**bounds).graph().check()
    assert said in str(refused.value)


def test_the_staleness_refusal_says_what_would_be_accepted() -> None:
    with pytest.raises(GraphError) as refused:
        Parts(initial=300, per_version=64, depth=300, max_staleness=2).graph().check()
    assert "lower initial to 192 or raise max_staleness" in str(refused.value)
    Parts(initial=192, per_version=64, depth=300, max_staleness=2).graph().check()


def test_a_cycle_of_queues_is_refused() -> None:
    first, second = Loop(Loop.Config()), Loop(Loop.Config())
    graph = Graph(
        nodes={"first": first, "second": second},
        edges=[Queue(first.prompts, second.rollouts, depth=1), Queue(second.prompts, first.rollouts, depth=1)],
        until=first,
    )
    with pytest.raises(GraphError, match="first -> second -> first: is a cycle of queues"):
        graph.check()


def test_sharing_with_a_node_that_has_no_devices_is_refused() -> None:
    parts = Parts()
    parts.worker = Worker(Worker.Config(share="nobody"))
    parts.edges[0] = Queue(parts.source.prompts, parts.worker.prompts, depth=4)
    parts.edges[1] = Queue(parts.worker.rollouts, parts.sink.rollouts, depth=8, window=1, max_staleness=1)
    parts.edges[3] = Latest(parts.sink.weights, parts.worker.weights)
    with pytest.raises(GraphError, match="'nobody' is not a node"):
        parts.graph().check()


def test_a_stage_left_out_of_the_nodes_is_refused() -> None:
    parts = Parts()
    graph = dataclasses.replace(parts.graph(), nodes={"source": parts.source, "sink": parts.sink})
    with pytest.raises(GraphError, match="not a node of this graph"):
        graph.check()


@pytest.mark.parametrize("per_version", [1, 3, 64])
@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("max_staleness", [0, 1, 4])
def test_most_credits_is_the_last_number_within_the_bound(per_version: int, window: int, max_staleness: int) -> None:
    most = most_credits(max_staleness, per_version, window)
    assert staleness_bound(most, per_version, window) <= max_staleness
    assert staleness_bound(most + 1, per_version, window) == max_staleness + 1


def test_a_graph_survives_the_trip_through_plain_data() -> None:
    graph = flow(random_settings(3))
    wire = msgspec.json.encode(plan_of(graph))
    again = graph_of(msgspec.json.decode(wire, type=GraphPlan))
    again.check()
    assert plan_of(again) == plan_of(graph)
    assert edge_table(again) == edge_table(graph)


def test_the_edge_table_and_the_diagram_name_every_edge() -> None:
    graph = Parts().graph()
    for edge in graph.edges:
        assert graph.address(edge.source) in edge_table(graph)
        assert graph.node_of(edge.target) in mermaid(graph)
    assert "at most 1 of max_staleness=1 ((8 credits + window 1 - 2) // 4 per version)" in staleness_line(graph)


def test_ports_are_found_with_their_messages_through_inheritance() -> None:
    class Special(Worker):
        extra: Out[Samples]

    ports = Special(Worker.Config()).ports
    assert {name: port.message for name, port in ports.items()} == {
        "prompts": Prompt, "rollouts": Rollouts, "weights": Weights, "extra": Samples,
    }  # fmt: skip
