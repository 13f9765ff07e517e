"""What a timed run weighs and waits for: messages as heavy as the real ones, failures that end it."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import msgspec
import pytest

from flowrl.errors import ConfigError, FlowrlError
from flowrl.graph.program import graph_of, plan_of
from flowrl.graph.simulated import Itself
from flowrl.messages import Buffer, Credit, Prompt, Referenced, Rollouts, Sample, Samples, Scored, VersionSpan, encode
from flowrl.simulation.run import WEIGHED, simulate, weight_of
from flowrl.telemetry.events import Status
from tests.support.flows import Scorer
from tests.support.timed_past import events_of
from tests.unit.simulation.test_run import graph, profile


def group(kind: type[Any], *, samples: int, prompt: int, response: int) -> Any:
    """A group as a simulated stage makes it: zeros of full length."""
    zeros = Buffer.floats([0.0] * response)
    rest: dict[str, Any] = {}
    if issubclass(kind, Scored):
        rest["scores"] = {"reward": [0.0] * samples}
    if issubclass(kind, Referenced):
        rest["ref_logprobs"] = [zeros] * samples
    if issubclass(kind, Samples):
        rest |= {"advantages": [zeros] * samples, "values": [zeros] * samples, "returns": [zeros] * samples}
    each = Sample(token_ids=Buffer.ints([7] * response), logprobs=zeros, versions=[VersionSpan(3, 0, response)],
                  finish="stop", text="")  # fmt: skip
    return kind(group_id=70_000, token_ids=Buffer.ints([7] * prompt), columns={}, num_samples=samples, seed=70_000,
                samples=[each] * samples, generator="generator.0", **rest)  # fmt: skip


@pytest.mark.parametrize("kind", [Rollouts, Scored, Referenced, Samples])
@pytest.mark.parametrize(("samples", "prompt", "response"), [(8, 100, 300), (2, 20, 40), (16, 400, 1000)])
def test_a_parcel_weighs_about_what_its_message_takes_on_the_wire(
    kind: type[Any], samples: int, prompt: int, response: int
) -> None:
    message = group(kind, samples=samples, prompt=prompt, response=response)
    assert weight_of(message) == pytest.approx(len(encode(message)), rel=0.1)
    parcel = WEIGHED.encode(message)
    assert len(parcel) == parcel.size_bytes == weight_of(message)
    assert WEIGHED.decode(parcel) is message


def test_a_small_message_weighs_little() -> None:
    prompt = Prompt(group_id=7, token_ids=Buffer.ints([7] * 200), columns={}, num_samples=8, seed=7)
    assert weight_of(prompt) == pytest.approx(len(encode(prompt)), rel=0.1)
    assert weight_of(Credit(groups=[1])) < 200


class Idle(Scorer):
    """Takes nothing."""

    def simulated(self, costs: Any) -> Itself:
        return Itself({})

    async def run(self, context: Any) -> None:
        await asyncio.get_running_loop().create_future()


class Failing(Scorer):
    """Fails at its third group."""

    def simulated(self, costs: Any) -> Itself:
        return Itself({})

    async def run(self, context: Any) -> None:
        count = 0
        async for _ in self.rollouts:
            count += 1
            if count == 3:
                raise ConfigError("scorer", "has had enough")


def test_a_stage_that_fails_ends_the_run_with_its_error() -> None:
    plan = plan_of(graph(1))
    failing = msgspec.structs.replace(plan.nodes["scorer"], stage=f"{__name__}:Failing")
    with pytest.raises(ConfigError, match="has had enough"):
        simulate(graph_of(msgspec.structs.replace(plan, nodes={**plan.nodes, "scorer": failing})), profile())


def test_a_flow_that_moves_no_more_says_so_instead_of_going_on_for_ever() -> None:
    plan = plan_of(graph(1))
    idle = msgspec.structs.replace(plan.nodes["scorer"], stage=f"{__name__}:Idle")
    with pytest.raises(FlowrlError, match="scorer"):
        simulate(
            graph_of(msgspec.structs.replace(plan, nodes={**plan.nodes, "scorer": idle})), profile(), detail="causes"
        )


def test_a_replica_tells_its_state_as_often_as_it_is_asked_to() -> None:
    costs = profile()
    events = [event for event in events_of(graph(1), costs, steps=4) if isinstance(event, Status)]
    per_replica = [event for event in events if (event.node, event.replica) == ("learner", 0)]
    gaps_s = [later.time_s - earlier.time_s for earlier, later in itertools.pairwise(per_replica[:-1])]
    assert gaps_s == pytest.approx([0.5] * len(gaps_s))
    assert sum(per_replica[-1].seconds.values()) == pytest.approx(per_replica[-1].time_s)
