"""The cost of decoding, fitted by replaying a generator's requests on the model that the simulator uses.

A request's duration says nothing by itself: it waited for a place, read its prompt while others stood still, ran beside
a number of samples that changed all the time. So the recorded requests are put through continuous batching
(simulation/devices.py in outline, without an event loop). The three costs are those whose ends are nearest to the
recorded ones, scaled so that the replicas are busy as long. Times are seconds of work, the contention for cores already
taken out. Called by the profiler.

Tests: tests/unit/simulation/test_profiler.py
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from flowrl.simulation.costs import DecodeCost

if TYPE_CHECKING:
    from collections.abc import Sequence

FACTORS = (4.0, 2.0, 1.5, 1.2, 1.1, 1.05, 1.02)  # that a cost is tried to be greater or smaller by, one after the other
MAX_SWEEPS = 20  # with each factor
ROUNDING = 1e-6  # of a decoding step
SCALINGS = 4
LEAST_SHARE = 1e-4  # of the first guess; below it a cost is left out


class Arrival(NamedTuple):
    """A request, or with no lengths a pause."""

    at_s: float
    prompt_tokens: int
    lengths: Sequence[float]
    end_s: float  # when its last sample ended
    pause_s: float = 0.0
    rereads: bool = False  # what is running is read again after the pause


class ReplayedRequests(NamedTuple):
    """What a replay gave."""

    ends_s: list[float]  # one for each arrival
    running: list[tuple[int, float]]  # how many ran, and for how long


def replay(arrivals: Sequence[Arrival], cost: tuple[float, float, float], most: int) -> ReplayedRequests:
    """Put requests, in order of arrival, through continuous batching with `most` samples at a time."""
    step_s, sample_s, prompt_token_s = cost
    now = steps = standing_s = 0.0
    ends_s = [arrival.at_s for arrival in arrivals]
    running: list[tuple[float, int, float]] = []  # end, who, begin
    waiting: deque[tuple[int, float]] = deque()
    read: set[int] = set()
    seen: list[tuple[int, float]] = []
    place = 0
    while place < len(arrivals) or running:
        each_s = max(1e-12, step_s + sample_s * len(running))  # as the decoder has it
        next_s = now + standing_s + (running[0][0] - steps) * each_s if running else math.inf
        arrives_s = arrivals[place].at_s if place < len(arrivals) else math.inf
        until = min(next_s, arrives_s)
        if running:
            spent = until - now
            seen.append((len(running), spent))
            stood = min(spent, standing_s)
            standing_s -= stood
            steps = running[0][0] if next_s <= arrives_s else steps + (spent - stood) / each_s
        now = until
        if next_s <= arrives_s:
            while running and running[0][0] <= steps + ROUNDING:  # those of one step end before others begin
                _, who, _ = heapq.heappop(running)
                ends_s[who] = now
        else:
            arrival = arrivals[place]
            waiting.extend((place, length) for length in arrival.lengths)
            standing_s += arrival.pause_s if running else 0.0
            if arrival.rereads:
                standing_s += prompt_token_s * sum(arrivals[w].prompt_tokens + steps - begin for _, w, begin in running)
            place += 1
        while waiting and len(running) < most:
            who, length = waiting.popleft()
            if who not in read:
                read.add(who)
                standing_s += prompt_token_s * arrivals[who].prompt_tokens
            heapq.heappush(running, (steps + length, who, steps))
    return ReplayedRequests(ends_s, seen)


def fit_decoding(replicas: Sequence[Sequence[Arrival]], most: int) -> DecodeCost:
    """Return the costs whose replay ends nearest to what was recorded, relative to each request's duration."""

    def miss(cost: tuple[float, ...]) -> float:
        total = 0.0
        for arrivals in replicas:
            ends_s = replay(arrivals, (cost[0], cost[1], cost[2]), most).ends_s
            total += sum(
                abs(math.log(max(1e-9, end_s - a.at_s) / max(1e-9, a.end_s - a.at_s)))
                for end_s, a in zip(ends_s, arrivals, strict=True)
                if a.lengths
            )
        return total

    guess = _guess(replicas)
    best, least = guess, miss(guess)
    directions = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (1, -1, 0), (1, 0, -1), (0, 1, -1)]
    for factor in FACTORS:
        for _ in range(MAX_SWEEPS):
            before = least
            for direction in directions:
                for sign in (1, -1):
                    tried = tuple(c * factor ** (sign * d) for c, d in zip(best, direction, strict=True))
                    if (missed := miss(tried)) < least:
                        best, least = tried, missed
            if least >= before * (1 - 1e-4):
                break
    best = _scaled(best, replicas, most)
    step_s, sample_s, prompt_token_s = (c if c > LEAST_SHARE * g else 0.0 for c, g in zip(best, guess, strict=True))
    found = (step_s, sample_s, prompt_token_s)
    running = sorted(pair for arrivals in replicas for pair in replay(arrivals, found, most).running)
    low, high = (_quantile(running, share) for share in (0.05, 0.95))
    return DecodeCost(step_s=step_s, sample_s=sample_s, prompt_token_s=prompt_token_s, running=(low, high))


def _guess(replicas: Sequence[Sequence[Arrival]]) -> tuple[float, float, float]:
    """Return costs that each account for a third of the time, were every request alone with its samples."""
    busy_s = steps = tokens = prompts = 0.0
    for arrivals in replicas:
        busy_s += _busy_s(arrivals, [a.end_s for a in arrivals])
        steps += sum(max(a.lengths, default=0.0) for a in arrivals)
        tokens += sum(sum(a.lengths) for a in arrivals)
        prompts += sum(a.prompt_tokens for a in arrivals)
    return busy_s / 3 / max(1.0, steps), busy_s / 3 / max(1.0, tokens), busy_s / 3 / max(1.0, prompts)


def _scaled(cost: tuple[float, ...], replicas: Sequence[Sequence[Arrival]], most: int) -> tuple[float, ...]:
    """Return the costs, greater or smaller alike, so that the replicas are busy as long as they were recorded to be.

    The fit follows the typical request; the few that take much longer count here.
    """
    recorded_s = sum(_busy_s(arrivals, [a.end_s for a in arrivals]) for arrivals in replicas)
    for _ in range(SCALINGS):
        replayed = (replay(arrivals, (cost[0], cost[1], cost[2]), most).ends_s for arrivals in replicas)
        taken_s = sum(_busy_s(arrivals, ends_s) for arrivals, ends_s in zip(replicas, replayed, strict=True))
        cost = tuple(c * recorded_s / max(1e-9, taken_s) for c in cost)
    return cost


def _busy_s(arrivals: Sequence[Arrival], ends_s: Sequence[float]) -> float:
    """Return how long there was at least one request; arrivals are in order."""
    busy_s, until_s = 0.0, -math.inf
    for arrival, end_s in zip(arrivals, ends_s, strict=True):
        busy_s += max(0.0, end_s - max(until_s, arrival.at_s))
        until_s = max(until_s, end_s)
    return busy_s


def _quantile(running: Sequence[tuple[int, float]], share: float) -> float:
    """Return how many ran in the time below `share` of the whole; `running` is sorted."""
    left_s = share * sum(spent for _, spent in running)
    for count, spent in running:
        left_s -= spent
        if left_s <= 0:
            return float(count)
    return float(running[-1][0]) if running else 0.0
