"""RemoteReward: adds a named score to every sample, asked of an HTTP server (flowrl.rewards.http has the contract).

Invariants:
- as for `Reward`, a group leaves with exactly one more named score per sample or is rejected as failed with its input
  on disk;
- where the server refuses a batch, its groups are asked for one by one, so that none fails for another's sake.

A server that stays away says nothing about the groups: by default the run stops and can be resumed.

Tests: tests/contracts/test_remote_rewards.py
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Literal

from flowrl.config import Count, Meta, widen
from flowrl.errors import ChannelClosed, RewardError
from flowrl.graph.ports import In, Out
from flowrl.graph.simulated import PassesOn
from flowrl.graph.stage import Stage, StageConfig
from flowrl.messages import Rollouts, Scored
from flowrl.rewards.http import Remote, RemoteScorer, Unreachable, check_server, connected, see_listening
from flowrl.stages.reward import Failures, add_scores
from flowrl.telemetry.events import Cause

if TYPE_CHECKING:
    from flowrl.graph.simulated import Costs
    from flowrl.graph.stage import Context, Say


class RemoteReward(Stage):
    """Scores by asking a server."""

    class Config(StageConfig):
        """Settings of a remote-reward node; those of the server are `flowrl.rewards.http.Remote`."""

        url: str = ""
        name: str = ""  # of the score; "" takes the node's name
        weight: float = 1.0  # the score is multiplied by it
        protocol: Literal["flowrl", "openrlhf"] = "flowrl"
        label_column: str = "answer"
        batch_groups: Annotated[int, Meta(ge=1)] = 8  # in one request, when they are ready
        concurrency: Count = 4  # requests under way in one replica
        timeout_s: Annotated[float, Meta(gt=0)] = 60.0
        retries: Annotated[int, Meta(ge=0)] = 5
        backoff_s: Annotated[float, Meta(gt=0)] = 1.0
        max_wait_s: Annotated[float, Meta(gt=0)] = 60.0
        on_error: Literal["skip", "stop"] = "stop"  # quarantine a group that cannot be scored, or end the run
        allow_plain_http: bool = False
        token_file: str = ""
        ca_file: str = ""

    rollouts: In[Rollouts]
    scored: Out[Scored]

    def __init__(self, config: Config) -> None:
        self.config: RemoteReward.Config = config

    def check(self, say: Say) -> None:
        """Check the address and the files; asks nothing."""
        check_server(widen(Remote, self.config), "remote reward", say)

    def simulated(self, costs: Costs) -> PassesOn:
        """Take the service's time."""
        return PassesOn("score", lanes=self.config.concurrency)

    async def run(self, context: Context) -> None:
        """Score groups until the edge closes."""
        remote = widen(Remote, self.config)
        async with AsyncExitStack() as stack:
            with context.clock.charge(Cause.START):
                post = await stack.enter_async_context(
                    connected(remote, context.where, num_connections=self.config.concurrency)
                )
                await see_listening(remote, context.where)
            scorer = RemoteScorer(remote, post, context.where, seed=context.replica)
            failures = Failures(context, on_error=self.config.on_error)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self.config.concurrency):
                    tasks.create_task(self._lane(context, scorer, failures))

    async def _lane(self, context: Context, scorer: RemoteScorer, failures: Failures) -> None:
        while True:
            try:
                groups = await self.rollouts.get_some(self.config.batch_groups)
            except ChannelClosed:  # raised further, it would cut off the other lanes' requests
                return
            await self._settle(context, scorer, groups, failures)

    async def _settle(self, context: Context, scorer: RemoteScorer, groups: list[Rollouts], failures: Failures) -> None:
        """Score a batch and send its groups on, or each that fails to quarantine."""
        start_s = context.now()
        try:
            with context.clock.charge(Cause.COMPUTE):
                scores = await scorer(groups)
        except RewardError as error:
            if len(groups) > 1 and not isinstance(error, Unreachable):
                for group in groups:
                    await self._settle(context, scorer, [group], failures)
                return
            for group in groups:
                await failures.give_up(self.rollouts, group, error)
            return
        failures.forget()
        name = self.config.name or context.node
        context.span("score", start_s, groups=[group.group_id for group in groups])
        for group, values in zip(groups, scores, strict=True):
            await self.scored.put(add_scores(group, name, [self.config.weight * value for value in values]))
            context.done += 1
