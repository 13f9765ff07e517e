"""The flow's queue, credits and ledger under any order of operations, as a Hypothesis state machine.

A model of plain sets says where each group must be; the machine admits, delivers, hands on, learns, rejects, kills and
revives in whatever order Hypothesis comes up with, and the two must agree after every step.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flowrl.messages import Credit, encode
from flowrl.runtime.flow import MAX_DEATHS, Flow
from flowrl.runtime.ledger import Ledger
from flowrl.simulation.clock import VirtualClockLoop
from tests.support.flows import flow
from tests.support.recovery import faulty_settings

INITIAL = 6
GROUPS = 2  # of a version
WINDOW = 2
DEPTH = 3


class FlowMachine(RuleBasedStateMachine):
    """One source, two generators, one scorer, one learner; every call is made only where it can be served at once."""

    @initialize()
    def begin(self) -> None:
        shape = replace(faulty_settings(0), initial=INITIAL, groups_per_step=GROUPS, window=WINDOW, depth=DEPTH,
                        generators=2, scorers=1, max_staleness=3, is_finite=False)  # fmt: skip
        self.loop = VirtualClockLoop()
        self.flow = Flow(flow(shape), Ledger(None))
        self.prompts: list[int] = []  # waiting for a generator
        self.generating: dict[int, str] = {}
        self.rollouts: list[int] = []
        self.scoring: set[int] = set()
        self.samples: set[int] = set()
        self.learning: list[int] = []
        self.learned: set[int] = set()  # credit not yet returned
        self.returned: set[int] = set()
        self.ended: set[int] = set()
        self.deaths: dict[int, int] = {}
        self.admitted = self.num_learned = 0

    def do(self, method: str, *arguments: Any) -> Any:
        async def body() -> Any:
            return await asyncio.wait_for(getattr(self.flow, method)(*arguments), 1.0)

        return self.loop.run_until_complete(body())

    @property
    def out(self) -> int:
        return self.admitted - len(self.returned)

    @precondition(lambda self: self.out < INITIAL and len(self.prompts) < DEPTH)
    @rule()
    def admit(self) -> None:
        group = self.do("acquire", "prompts.0", "prompts.credits")
        assert group == self.admitted, "in order, each once"
        self.do("put", "prompts.0", "prompts.prompts", group, b"p%d" % group)
        self.admitted += 1
        self.prompts.append(group)

    @precondition(lambda self: self.out == INITIAL)
    @rule()
    def a_further_credit_is_not_there(self) -> None:
        with pytest.raises(TimeoutError):
            self.do("acquire", "prompts.0", "prompts.credits")

    def suspect(self, group: int) -> bool:
        return self.deaths.get(group, 0) == MAX_DEATHS - 1

    @precondition(lambda self: bool(self.prompts))
    @rule(replica=st.sampled_from(["generator.0", "generator.1"]))
    def generate(self, replica: str) -> None:
        holding = [group for group, holder in self.generating.items() if holder == replica]
        if any(self.suspect(group) for group in holding):
            return
        takable = [group for group in self.prompts if not holding or not self.suspect(group)]
        if not takable:
            return
        oldest = min(takable)
        (body,) = self.do("get", replica, "generator.prompts", 1)
        assert body == b"p%d" % oldest
        self.prompts.remove(oldest)
        self.generating[oldest] = replica

    @precondition(lambda self: bool(self.generating) and len(self.rollouts) < DEPTH)
    @rule(pick=st.integers(0, 100))
    def hand_on(self, pick: int) -> None:
        group = sorted(self.generating)[pick % len(self.generating)]
        replica = self.generating.pop(group)
        stranger = "generator.1" if replica == "generator.0" else "generator.0"
        self.do("put", stranger, "generator.rollouts", group, b"not mine")  # refused: it does not hold the group
        self.do("put", replica, "generator.rollouts", group, b"r%d" % group)
        self.do("put", replica, "generator.rollouts", group, b"again")  # refused: it holds it no more
        self.rollouts.append(group)

    @precondition(lambda self: bool(self.generating) and len(self.rollouts) == DEPTH)
    @rule()
    def a_full_queue_takes_nothing(self) -> None:
        group, replica = next(iter(self.generating.items()))
        with pytest.raises(TimeoutError):
            self.do("put", replica, "generator.rollouts", group, b"too many")

    @precondition(lambda self: bool(self.rollouts))
    @rule()
    def score(self) -> None:
        holding = bool(self.scoring)
        if any(self.suspect(group) for group in self.scoring):
            return
        takable = [group for group in self.rollouts if not holding or not self.suspect(group)]
        if not takable:
            return
        oldest = min(takable)
        (body,) = self.do("get", "scorer.0", "scorer.rollouts", 1)
        assert body == b"r%d" % oldest
        self.rollouts.remove(oldest)
        self.scoring.add(oldest)

    @precondition(lambda self: bool(self.scoring))
    @rule(pick=st.integers(0, 100), is_kept=st.booleans())
    def advantages(self, pick: int, is_kept: bool) -> None:
        group = sorted(self.scoring)[pick % len(self.scoring)]
        self.scoring.discard(group)
        if is_kept:
            self.do("put", "scorer.0", "scorer.samples", group, b"s%d" % group)
            self.samples.add(group)
        else:
            self.do("reject", "scorer.0", "scorer.rollouts", group, "filtered", "for a test")
            self.returned.add(group)
            self.ended.add(group)

    @property
    def head(self) -> int:
        gone = self.learned | self.ended | set(self.learning)
        return next(group for group in range(self.admitted + 1) if group not in gone)

    @rule()
    def learn(self) -> None:
        ready = sorted(group for group in self.samples if group < self.head + WINDOW)
        if not ready:
            with pytest.raises(TimeoutError):
                self.do("get", "learner.0", "learner.samples", 1)
            return
        (body,) = self.do("get", "learner.0", "learner.samples", 1)
        assert body == b"s%d" % ready[0]
        self.samples.discard(ready[0])
        self.learning.append(ready[0])

    @precondition(lambda self: bool(self.learning))
    @rule()
    def finish_learning(self) -> None:
        groups, self.learning = self.learning, []
        for group in groups:
            step = self.num_learned // GROUPS  # the flow stops a learner that takes another number into a version
            self.do("done", "learner.0", "learner.samples", [group], step, [step])
            self.num_learned += 1
        self.learned |= set(groups)

    @precondition(lambda self: bool(self.learned))
    @rule()
    def give_back(self) -> None:
        self.do("give_back", "learner.0", "learner.released", encode(Credit(groups=sorted(self.learned))))
        self.returned |= self.learned
        self.ended |= self.learned
        self.learned = set()

    @rule(replica=st.sampled_from(["generator.0", "generator.1", "scorer.0", "prompts.0"]))
    def die(self, replica: str) -> None:
        if replica.startswith("generator"):
            held = {group for group, holder in self.generating.items() if holder == replica}
        else:
            held = set(self.scoring) if replica == "scorer.0" else set()
        for group in held:
            self.deaths[group] = self.deaths.get(group, 0) + 1
        poisonous = {group for group in held if self.deaths[group] >= MAX_DEATHS}
        released = self.flow.release(replica)
        assert sorted(released.reissued) == sorted(held - poisonous)
        assert sorted(group for group, _ in released.poisonous) == sorted(poisonous)
        self.ended |= poisonous
        self.returned |= poisonous
        self.generating = {g: holder for g, holder in self.generating.items() if holder != replica}
        if replica == "scorer.0":
            self.scoring = set()
            self.rollouts = sorted(held - poisonous) + self.rollouts
        elif replica != "prompts.0":
            self.prompts = sorted(held - poisonous) + self.prompts

    @invariant()
    def every_group_is_in_one_place(self) -> None:
        if not hasattr(self, "flow"):
            return
        totals = self.flow.ledger.totals()
        ended = self.ended | self.learned
        assert totals["admitted"] == self.admitted
        assert totals["unfinished"] == self.admitted - len(ended)
        places = [*self.prompts, *self.generating, *self.rollouts, *self.scoring, *self.samples, *self.learning, *ended]
        assert sorted(places) == list(range(self.admitted))

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.close()


TestFlowMachine = pytest.mark.slow(FlowMachine.TestCase)  # a second of drawing schedules
TestFlowMachine.settings = settings(max_examples=40, stateful_step_count=60, deadline=None, database=None)
