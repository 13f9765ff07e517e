"""Graphs refuse what cannot run, with the place, the arithmetic and the remedy."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from flowrl.errors import GraphError
from flowrl.graph.edges import UNSAID
from flowrl.graph.graph import Credits, Graph, Latest, Queue, RunSettings
from flowrl.graph.ports import In, Out
from flowrl.graph.program import GraphPlan, graph_of, load_program, plan_of
from flowrl.graph.show import edge_table, mermaid, staleness_line
from flowrl.graph.stage import Agreement, Stage, StageConfig
from flowrl.graph.staleness import Admission, most_credits, staleness_bound
from flowrl.messages import Credit, Prompt, Rollouts, Samples, Weights
from tests.support.command import ROOT
from tests.support.flows import flow, random_settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GRAPHS = ROOT / "graphs"


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
    ordered = frozenset({"rollouts"})
    rollouts: In[Rollouts]
    released: Out[Credit]
    weights: Out[Weights]

    def __init__(self, config: Config, *, per_version: int, max_staleness: int) -> None:
        self.config = config
        self.per_version = per_version
        self.max_staleness = max_staleness

    @property
    def admission(self) -> Admission:
        return Admission(self.per_version, None, self.max_staleness)


class Loop(Stage):
    class Config(StageConfig):
        pass

    rollouts: In[Rollouts]
    prompts: Out[Rollouts]

    def __init__(self, config: Config) -> None:
        self.config = config


class End(Stage):
    rollouts: In[Rollouts]

    def __init__(self) -> None:
        self.config = StageConfig()


class Parts:
    """A sound graph and its pieces, to be spoiled one at a time."""

    def __init__(self, *, initial: int = UNSAID, per_version: int = 4, window: int | None = None, depth: int = UNSAID,
                 max_staleness: int = 1, sink_replicas: int = 1) -> None:  # fmt: skip
        self.source = Source(Source.Config())
        self.worker = Worker(Worker.Config(replicas=2))
        config = Sink.Config(replicas=sink_replicas)
        self.sink = Sink(config, per_version=per_version, max_staleness=max_staleness)
        self.edges: list[Any] = [
            Queue(self.source.prompts, self.worker.prompts, depth=4),
            Queue(self.worker.rollouts, self.sink.rollouts, depth=depth, window=window),
            Credits(self.sink.released, self.source.credits, initial=initial),
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
        ({"window": 6}, "3 credits can never fill a step of 4 groups; lower window"),
        ({"per_version": 0}, "learns 0 groups"),
        ({"depth": 7}, "depth=7 with 8 credits"),
        ({"sink_replicas": 2}, "sink.replicas: 2, but Sink ends the run; leave it 1"),
        ({"window": 0}, "window=0"),
    ],
)
def test_bounds_that_break_or_deadlock_are_refused_with_the_arithmetic(bounds: dict[str, int], said: str) -> None:
    with pytest.raises(GraphError) as refused:
        Parts(**bounds).graph().check()
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("graph", "override", "said"),
    [
        ("ppo_async", "generator.ranks=2", "generator.ranks: 2, but Generator is no stage whose ranks march together"),
        ("ppo_async", "reward.ranks=2", "reward.ranks: 2, but Reward is no"),
        ("ppo_async", "prompts.ranks=2", "prompts.ranks: 2, but Prompts is no"),
        ("ppo_async", "prompts.replicas=2", "prompts.replicas: 2, but Prompts does its work once; leave it 1"),
        ("ppo_async", "evaluation.replicas=2", "evaluation.replicas: 2, but Evaluator does its work once"),
        ("ppo_async", "critic.replicas=2", "critic.replicas: 2, but Critic keeps state; leave it 1, and use ranks"),
        ("ppo_async", "learner.replicas=2", "learner.replicas: 2, but Learner ends the run; leave it 1, and use ranks"),
        ("group_async", "advantage.replicas=2", "advantage.replicas: 2, but Advantage keeps state; leave it 1"),
        ("agent_async", "agent.ranks=2", "agent.ranks: 2, but Agent is no"),
        ("generate", "generator.ranks=2", "generator.ranks: 2, but"),
    ],
)
def test_processes_that_a_stage_cannot_be_are_refused(graph: str, override: str, said: str) -> None:
    models = ["reward_models=[x]"] if "reward_model." in override else []
    with pytest.raises(GraphError) as refused:
        load_program(GRAPHS / f"{graph}.py", overrides=[override, *models])
    assert str(refused.value).startswith(said)


JUDGED = ["judge.server.url=http://127.0.0.1:1/v1", "judge.server.model=x"]


@pytest.mark.parametrize(
    ("graph", "overrides", "unread"),
    [
        ("group_async", ["judge.rubric.way=pairs", "model_judge.in_flight=8", "steps=7"], ["judge.rubric.way"]),
        ("group_async", ["judge.rubric.way=pairs", *JUDGED], []),
        ("group_async", ["judge.rubric.way=points", "seed=3", "stop_grace_s=5", "cluster.strategy=spread"], []),
        ("ppo_async", ["reward_model.weight=0.5", "critic.lr=3e-5"], ["reward_model.weight"]),
        ("ppo_async", ["reward_model.weight=0.5", "reward_models=[x]"], []),
        ("rejection", ["reward.function=", "judge.rubric.rivals=2", "model_judge.model=x"], ["judge.rubric.rivals"]),
    ],
)  # fmt: skip
def test_settings_that_no_node_reads_are_named(graph: str, overrides: list[str], unread: list[str]) -> None:
    assert load_program(GRAPHS / f"{graph}.py", overrides=overrides).unread() == unread


def test_replicas_compete_where_a_stage_allows_it_but_never_for_an_ordered_queue() -> None:
    parts = Parts()
    object.__setattr__(parts.edges[0], "window", 1)
    with pytest.raises(GraphError, match=r"window=1\) but 2 replicas compete for it"):
        parts.graph().check()


def test_the_staleness_refusal_says_what_would_be_accepted() -> None:
    with pytest.raises(GraphError) as refused:
        Parts(initial=300, per_version=64, depth=300, max_staleness=2).graph().check()
    assert "lower it to 192 or raise max_staleness" in str(refused.value)
    Parts(initial=192, per_version=64, depth=300, max_staleness=2).graph().check()


def test_credits_and_depths_that_are_not_said_follow_from_the_learner() -> None:
    graph = Parts(per_version=16, max_staleness=2, window=3).graph()
    graph.check()
    credits = next(edge for edge in graph.edges if isinstance(edge, Credits))
    queues = [edge for edge in graph.edges if isinstance(edge, Queue)]
    assert (credits.initial, credits.per_version) == (46, 16)
    assert [(queue.depth, queue.window, queue.max_staleness) for queue in queues] == [(4, None, None), (46, 3, 2)]


def test_an_edge_cannot_say_what_the_learner_learns() -> None:
    """The copied graph of old: 96 credits and 48 per version in front of a learner that took 16."""
    parts = Parts(per_version=16, max_staleness=1)
    with pytest.raises(TypeError, match="per_version"):
        Credits(parts.sink.released, parts.source.credits, initial=96, per_version=48)  # pyright: ignore
    parts.edges[2] = Credits(parts.sink.released, parts.source.credits, initial=96)
    with pytest.raises(GraphError, match="96 credits, 16 per version and window 1 allow staleness 5"):
        parts.graph().check()


def test_credits_of_a_stage_that_does_not_say_what_it_learns_are_refused() -> None:
    class Silent(Stage):
        released: Out[Credit]

        def __init__(self, config: StageConfig) -> None:
            self.config = config

    source, silent = Source(Source.Config()), Silent(StageConfig())
    with pytest.raises(GraphError, match="does not say how many groups it learns"):
        Graph(nodes={"s": source, "w": silent}, edges=[Credits(silent.released, source.credits)], until=silent)


class Numbers(msgspec.Struct):
    group_size: int = 1


class Told(Loop):
    def __init__(self, config: StageConfig, numbers: Numbers) -> None:
        self.config = config


def test_two_nodes_that_are_given_different_numbers_are_refused() -> None:
    def graph(first: int, second: int) -> Graph:
        one, two = (Told(StageConfig(), Numbers(group_size=size)) for size in (first, second))
        edges = [Queue(one.prompts, two.rollouts), Queue(two.prompts, one.rollouts, depth=1, most=1)]
        return Graph(nodes={"one": one, "two": two}, edges=edges, until=one)

    graph(3, 3).check()
    with pytest.raises(GraphError, match=r"two.numbers: differs from that of one: group_size is 4 and 3"):
        graph(3, 4).check()


class Shared(Agreement):
    group_size: int = 1


class SharedMore(Shared):
    more: int = 0


class ToldOtherwise(Loop):
    def __init__(self, config: StageConfig, mine: Shared) -> None:
        self.config = config


class ToldToo(Loop):
    def __init__(self, config: StageConfig, shared: Shared) -> None:
        self.config = config


@pytest.mark.parametrize("other", [Shared(group_size=4), SharedMore(group_size=3)])
def test_what_nodes_agree_on_is_one_value_whatever_their_constructors_call_it(other: Shared) -> None:
    def graph(second: Shared) -> Graph:
        one, two = ToldToo(StageConfig(), Shared(group_size=3)), ToldOtherwise(StageConfig(), second)
        edges = [Queue(one.prompts, two.rollouts), Queue(two.prompts, one.rollouts, depth=1, most=1)]
        return Graph(nodes={"one": one, "two": two}, edges=edges, until=one)

    graph(Shared(group_size=3)).check()
    with pytest.raises(GraphError, match=r"two.mine: differs from that of one: (group_size is 4 and 3|SharedMore and)"):
        graph(other).check()


class OfSink(Stage):
    rollouts: In[Rollouts]
    prompts: Out[Rollouts]

    def __init__(self, config: StageConfig, sink: SizedSink.Config) -> None:
        self.config = config


class SizedSink(Stage):
    rollouts: In[Rollouts]
    prompts: Out[Rollouts]

    class Config(StageConfig):
        size: int = 2


def test_settings_of_another_node_are_that_node_s() -> None:
    def graph(told: SizedSink.Config) -> Graph:
        one, two = OfSink(StageConfig(), told), SizedSink(SizedSink.Config(size=3))
        edges = [Queue(one.prompts, two.rollouts), Queue(two.prompts, one.rollouts, depth=1, most=1)]
        return Graph(nodes={"one": one, "two": two}, edges=edges, until=one)

    graph(SizedSink.Config(size=3)).check()
    with pytest.raises(GraphError, match=r"one.sink: differs from two's own: size is 2 and 3; give it the same"):
        graph(SizedSink.Config()).check()


class Course(Agreement):
    per_version: int

    @property
    def admission(self) -> Admission:
        return Admission(self.per_version, None, 1)


class TaughtSink(Sink):
    def __init__(self, config: StageConfig, course: Course, *, per_version: int) -> None:
        self.config, self.per_version, self.max_staleness = config, per_version, 1


def test_a_learner_says_what_it_was_given_to_learn() -> None:
    """Four times the groups that it takes: proved at most 1, and truly 5."""
    parts = Parts()

    def graph(per_version: int) -> Graph:
        sink = TaughtSink(StageConfig(), Course(per_version=4), per_version=per_version)
        edges = [
            Queue(parts.source.prompts, parts.worker.prompts), Queue(parts.worker.rollouts, sink.rollouts),
            Credits(sink.released, parts.source.credits), Latest(sink.weights, parts.worker.weights),
        ]  # fmt: skip
        return Graph(nodes={"source": parts.source, "worker": parts.worker, "sink": sink}, edges=edges, until=sink)

    graph(4).check()
    with pytest.raises(GraphError, match=r"sink.admission: says per_version=16, .* was given per_version=4,"):
        graph(16).check()


def test_a_stage_that_saves_but_is_not_stateful_is_refused() -> None:
    class Saves(Worker):
        def save(self, directory: Path, version: int) -> None:
            pass

    parts = Parts()
    saves = Saves(Worker.Config())
    parts.edges[0] = Queue(parts.source.prompts, saves.prompts)
    parts.edges[1] = Queue(saves.rollouts, parts.sink.rollouts)
    parts.edges[3] = Latest(parts.sink.weights, saves.weights)
    parts.worker = saves
    with pytest.raises(GraphError, match=r"worker: Saves defines `save`, which nobody calls.*set is_stateful = True"):
        parts.graph().check()


def test_ports_that_go_together_are_joined_together() -> None:
    class Lanes(Worker):
        optional = frozenset({"weights", "more", "others"})
        together = (frozenset({"more", "others"}),)
        more: In[Prompt]
        others: Out[Rollouts]

    parts = Parts()
    parts.worker = worker = Lanes(Worker.Config())
    parts.edges = [
        Queue(parts.source.prompts, worker.prompts),
        Queue(worker.rollouts, parts.sink.rollouts),
        Credits(parts.sink.released, parts.source.credits),
        Latest(parts.sink.weights, worker.weights),
    ]
    parts.graph().check()
    end = End()
    parts.edges.append(Queue(worker.others, end.rollouts))
    graph = dataclasses.replace(parts.graph(), nodes={**parts.graph().nodes, "end": end})
    with pytest.raises(GraphError, match=r"worker.more: is on no edge, but others is"):
        graph.check()


@pytest.mark.parametrize("window", [2, 5])
def test_a_port_that_takes_groups_strictly_in_order_has_no_window(window: int) -> None:
    class Strict(Loop):
        ordered = frozenset({"rollouts"})

    parts, strict = Parts(), Strict(Loop.Config())
    parts.edges[1] = Queue(parts.worker.rollouts, strict.rollouts, window=window)
    parts.edges.append(Queue(strict.prompts, parts.sink.rollouts))
    graph = dataclasses.replace(parts.graph(), nodes={**parts.graph().nodes, "strict": strict})
    with pytest.raises(GraphError, match=f"window={window}, but strict.rollouts takes groups strictly in their order"):
        graph.check()


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
    parts.edges[1] = Queue(parts.worker.rollouts, parts.sink.rollouts)
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


def test_what_a_run_does_not_look_at_is_said() -> None:
    assert RunSettings().idle_settings() == []
    settings = load_program(GRAPHS / "group_async.py", overrides=["wandb.project=mine"]).settings
    assert settings.idle_settings() == ["wandb.project: no effect while wandb.mode is off; set it to online or offline"]
    overrides = [
        "wandb.project=mine",
        "wandb.mode=offline",
        "runtime=local",
        "cluster.proxies=2",
        "heartbeat_timeout_s=5",
    ]
    settings = load_program(GRAPHS / "group_async.py", overrides=overrides).settings
    (line,) = settings.idle_settings()
    assert line == "heartbeat_timeout_s, cluster: no effect with runtime=local, which starts no processes"
