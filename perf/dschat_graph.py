"""graphs/ppo_async.py with a reward model in place of the reward function, for `flowrl bench dschat`.

DeepSpeed-Chat's step scores with four models; so that flowrl does the same work, its run must too. Everything else is
that graph, so what is measured is what users run.
"""

from dataclasses import fields
from typing import Any

from flowrl.graph.edges import Edge
from flowrl.graph.graph import Graph
from flowrl.graph.stage import Stage
from flowrl.stages.reward import RewardModel
from graphs import ppo_async


class Settings(ppo_async.Settings):
    reward_model: str = "SmolLM2-135M-Instruct"  # a sequence classifier with one label
    scorer: RewardModel.Config = RewardModel.Config(share="learner")


def build(s: Settings) -> Graph:
    graph = ppo_async.build(s)
    old, new = graph.nodes["reward"], RewardModel(s.scorer, model=s.reward_model)
    nodes = {**graph.nodes, "reward": new}
    return Graph(nodes=nodes, edges=[_rejoined(edge, old, new) for edge in graph.edges], until=graph.until)


def _rejoined(edge: Edge, old: Stage, new: Stage) -> Edge:
    """Return the edge with its ends at `old` moved to the ports of the same names at `new`."""
    parts: dict[str, Any] = {field.name: getattr(edge, field.name) for field in fields(edge)}
    for end in ("source", "target"):
        if parts[end].owner is old:
            parts[end] = new.ports[parts[end].name]
    kind: Any = type(edge)
    return kind(parts.pop("source"), parts.pop("target"), **parts)
