"""What would make a run quicker, by simulating its own graph from its own profile, changed in one place at a time.

One more replica of a node needs nothing but the run's directory; what only the graph file can change (staleness,
batch) is searched by `tune`, where the file is given. Invariant: a change is said only if the graph allows it, with
its predicted gain and what it would cost in devices. Called by review.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.errors import FlowrlError
from flowrl.graph.plan import graph_of
from flowrl.simulation.costs import load_profile
from flowrl.simulation.run import simulate
from flowrl.simulation.timed_graph import optional_nodes
from flowrl.tuning.tune import TuneRequest, describe, tune

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from flowrl.graph.graph import Graph
    from flowrl.graph.plan import GraphPlan
    from flowrl.simulation.costs import Profile

STEPS = 8  # simulated for each change, after the pipeline has filled
WORTH_SAYING = 0.02  # a smaller gain is within what a simulation is off by
TUNED = 80  # simulations of a tuning


def advice(run_dir: Path, plan: GraphPlan, graph_file: Path | None) -> list[str]:
    """Return advice as lines; none where the run has left no profile.

    Raises:
        UserError: `graph_file` cannot be used with the run's settings.
    """
    if not (run_dir / "profile.json").is_file():
        return []
    if graph_file is not None:
        settings = run_dir / "settings.yaml"
        request = TuneRequest(graph=graph_file, profile=run_dir, config=settings, budget=TUNED)
        return describe(tune(request)).splitlines()
    try:
        return [*_one_more_each(plan, load_profile(run_dir))]
    except FlowrlError as error:
        return [f"the simulator has nothing to say: {error}"]


def _one_more_each(plan: GraphPlan, profile: Profile) -> Iterator[str]:
    """Yield what one more replica of each node is worth, the best first."""
    now = simulate(graph_of(plan), profile, steps=STEPS, detail="causes").samples_per_s
    yield f"simulated from this run's profile: {now:,.3g} samples/s as it is"
    gains: dict[str, float] = {}
    for node in plan.nodes:
        graph = _with_one_more(plan, node)
        if graph is not None:
            gains[node] = simulate(graph, profile, steps=STEPS, detail="causes").samples_per_s / now - 1
    worth = sorted((node for node, gain in gains.items() if gain >= WORTH_SAYING), key=lambda node: -gains[node])
    for node in worth:
        config = plan.nodes[node].arguments["config"]
        yield f"--set {node}.replicas={config['replicas'] + 1} is worth {gains[node]:+.0%}{_cost(config)}"
    if not worth:
        yield "one more replica is worth nothing, of any node; --graph FILE has staleness, batch and more searched"


def _with_one_more(plan: GraphPlan, node: str) -> Graph | None:
    """Return the graph with one more replica of a node, or None where the node's state or the graph forbids it."""
    old = plan.nodes[node]
    config = old.arguments.get("config", {})
    if "replicas" not in config:
        return None
    new = msgspec.structs.replace(
        old, arguments={**old.arguments, "config": {**config, "replicas": config["replicas"] + 1}}
    )
    try:
        graph = graph_of(msgspec.structs.replace(plan, nodes={**plan.nodes, node: new}))
        graph.check()
    except FlowrlError:
        return None
    stage = graph.nodes[node]
    return None if stage.is_stateful or node in optional_nodes(graph) else graph


def _cost(config: dict[str, Any]) -> str:
    parts = [f"{config[what]:g} {name}" for what, name in (("cpus", "cores"), ("gpus", "GPUs")) if config.get(what)]
    return f", for {' and '.join(parts)} more" if parts else ""
