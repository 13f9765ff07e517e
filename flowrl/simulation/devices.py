"""Time on shared devices, without anything computed: cores that slow each other down, and continuous batching.

Event-driven on the event loop's clock, nothing polls.

Invariants:
- a device's work is conserved (while those computing on it ask for more than it has, all go on at the same lower
  speed);
- a decoding step gives every running sample one token and costs `step_s + sample_s * running` seconds of work, so speed
  follows the number running at every moment.

Used by the timed engines (timed.py).

Tests: tests/unit/simulation/test_timed.py
"""

from __future__ import annotations

import asyncio
import bisect
import heapq
import math
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowrl.messages import VersionSpan
from flowrl.simulation.costs import pace
from flowrl.telemetry.events import Slots

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from flowrl.simulation.costs import DecodeCost

ROUNDING = 1e-9  # seconds of a device's work: a timer may ring this much too early
SLACK = 4  # roundings that add up until a sample ends


class Device:
    """Cores or a GPU: `capacity` units, of which every busy replica asks for its width; owned by one event loop.

    `progress` is how far a replica that has been busy all along has come, in seconds of one unit's work. What a replica
    of a width does alone in a second is `alone(width)` of it.
    """

    def __init__(self, capacity: float, slowdown: float = 0.0) -> None:
        self.capacity = capacity
        self._slowdown = slowdown
        self.busy_s = 0.0  # seconds of the whole capacity
        self._width = 0.0
        self._progress = 0.0
        self._since: float | None = None
        self._alarms: list[tuple[float, int, list[Callable[[], None]]]] = []
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timed: tuple[float, float] | None = None  # the progress at which the timer rings, and the rate it assumes
        self._loop: asyncio.AbstractEventLoop | None = None

    def progress(self) -> float:
        """Return the seconds of work that a busy replica has had so far."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        if self._since is None:
            self._since = now
        elif now > self._since:
            spent_s, self._since = now - self._since, now
            self._progress += spent_s * self._rate
            self.busy_s += spent_s * min(1.0, self._width / self.capacity)
        return self._progress

    def alone(self, width: float) -> float:
        """Return the speed of a replica of this width while no other computes here."""
        return pace(width, self.capacity, self._slowdown)

    @property
    def _rate(self) -> float:
        return self.alone(self._width)

    @contextmanager
    def busy(self, width: float) -> Generator[None]:
        """Take a share of the device for the duration of the block."""
        self.occupy(width)
        try:
            yield
        finally:
            self.occupy(-width)

    def occupy(self, width: float) -> None:
        """Ask for `width` more, or less, from now on."""
        self.progress()
        self._width = max(0.0, self._width + width)
        self._arm()

    def call_after(self, work_s: float, callback: Callable[[], None]) -> list[Callable[[], None]]:
        """Call back once a busy replica has had so much more work done; clearing the returned list cancels it."""
        alarm = [callback]
        self._count += 1
        heapq.heappush(self._alarms, (self.progress() + work_s, self._count, alarm))
        if self._alarms[0][2] is alarm:
            self._arm()
        return alarm

    async def take(self, work_s: float, width: float = 1.0) -> None:
        """Do what takes so long alone, and longer while others are busy here."""
        if work_s <= 0:
            return
        work_s *= self.alone(width)
        done = asyncio.get_running_loop().create_future()
        with self.busy(width):
            alarm = self.call_after(work_s, lambda: None if done.done() else done.set_result(None))
            try:
                await done
            finally:
                alarm.clear()

    def _arm(self) -> None:
        while self._alarms and not self._alarms[0][2]:
            heapq.heappop(self._alarms)
        timed = (self._alarms[0][0], self._rate) if self._alarms else None
        if timed == self._timed:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timed, self._timer = timed, None
        if timed is not None:
            wait_s = max(0.0, timed[0] - self._progress) / timed[1]
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._ring)

    def _ring(self) -> None:
        due = self.progress() + ROUNDING
        self._timed = self._timer = None
        while self._alarms and self._alarms[0][0] <= due:
            for callback in heapq.heappop(self._alarms)[2]:
                callback()
        self._arm()


@dataclass
class _Request:
    """What one call of `decode` waits for."""

    num_left: int
    prompt_tokens: int
    done: asyncio.Future[None]
    spans: list[list[VersionSpan]]
    factor: float  # steps of a token
    is_read: bool = False  # its prompt is in the cache


class Decoder:
    """Continuous batching: all running samples advance together, one token in each decoding step."""

    def __init__(self, cost: DecodeCost, device: Device, *, max_running: int, width: float = 1.0) -> None:
        self._cost = cost
        self._scale = device.alone(width)  # of the cost, which is that of a decoder alone, to the device's progress
        self._device = device
        self._max_running = max_running
        self.slots = Slots(max_running, lambda: asyncio.get_running_loop().time())
        self._width = width
        self._steps = 0.0  # decoding steps so far
        self._reading_s = 0.0  # prompts still to read, before the next step
        self._at = 0.0  # the device's progress when these were true
        self._running: list[tuple[float, int, float, int, int, _Request]] = []  # end, count, start, place, length
        self._waiting: deque[tuple[int, int, _Request]] = deque()
        self._count = 0
        self._marks = [(0.0, -1)]  # from which step on which version
        self._alarm: list[Callable[[], None]] = []
        self._is_busy = False
        self._is_paused = False
        self._is_draining = False
        self._drained: asyncio.Future[None] | None = None

    @property
    def num_running(self) -> int:
        """Return how many samples are decoded now."""
        return len(self._running)

    async def decode(
        self, lengths: Sequence[int], prompt_tokens: int, factor: float = 1.0, *, enough: int | None = None
    ) -> list[list[VersionSpan]]:
        """Decode samples of these lengths; returns which version sampled which tokens of each.

        A token takes `factor` steps. When `enough` have ended the others are given up, and have no versions.
        """
        done = asyncio.get_running_loop().create_future()
        num_left = len(lengths) if enough is None else enough
        request = _Request(num_left, prompt_tokens, done, [[] for _ in lengths], factor)
        self._settle()
        self._waiting.extend((place, length, request) for place, length in enumerate(lengths))
        self._admit()
        try:
            await request.done
        finally:
            if num_left < len(lengths) or not request.done.done() or request.done.cancelled():
                self._give_up(request)
        return request.spans

    def _give_up(self, request: _Request) -> None:
        """Let what is left of a request go on no longer."""
        self._settle()
        self._waiting = deque(entry for entry in self._waiting if entry[2] is not request)
        self._running = [entry for entry in self._running if entry[5] is not request]
        heapq.heapify(self._running)
        self._admit()

    @contextmanager
    def paused(self) -> Generator[None]:
        """Let nothing advance for the duration of the block."""
        self._settle()
        self._is_paused = True
        self._occupy()
        try:
            yield
        finally:
            self._settle()
            self._is_paused = self._is_draining = False
            self._admit()

    async def drain(self) -> None:
        """Start nothing more until the next pause has ended, and wait for what is running."""
        self._is_draining = True
        while self._running:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    def serve(self, version: int, *, again: bool = False, rereads: bool = False) -> None:
        """Sample with `version` from here on; `again` starts what is running anew.

        `rereads` has the new weights read what is running, prompts and tokens, before the next step.
        """
        if rereads:
            running = sum(e[5].prompt_tokens + (self._steps - e[2]) / e[5].factor for e in self._running)
            self._reading_s += self._scale * self._cost.prompt_token_s * running
        self._marks.append((self._steps, version))
        oldest = min((start for _, _, start, *_ in self._running), default=self._steps)
        del self._marks[: bisect.bisect(self._marks, (oldest, math.inf)) - 1]  # nothing that runs was begun before
        if again:
            stopped, self._running = self._running, []
            self._waiting.extendleft((e[3], e[4], e[5]) for e in sorted(stopped, key=lambda e: -e[1]))

    def _settle(self) -> None:
        """Bring the count of steps up to the device's progress."""
        progress = self._device.progress()
        spent, self._at = progress - self._at, progress
        if self._running and not self._is_paused:
            reading = min(spent, self._reading_s)
            self._reading_s -= reading
            self._steps += (spent - reading) / self._step_s

    @property
    def _step_s(self) -> float:
        return max(1e-12, self._scale * (self._cost.step_s + self._cost.sample_s * len(self._running)))

    def _admit(self) -> None:
        """End what is finished, start what there is room for."""
        if self._is_paused:
            return
        due = self._steps + SLACK * ROUNDING / self._step_s + ROUNDING
        while self._running and self._running[0][0] <= due:
            self._finish(heapq.heappop(self._running))
        while self._waiting and len(self._running) < self._max_running and not self._is_draining:
            place, length, request = self._waiting.popleft()
            if not request.is_read:
                request.is_read = True
                self._reading_s += self._scale * self._cost.prompt_token_s * request.prompt_tokens
            self._count += 1
            entry = (self._steps + length * request.factor, self._count, self._steps, place, length, request)
            heapq.heappush(self._running, entry)
        if not self._running and self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._occupy()

    def _occupy(self) -> None:
        """Take or leave the device, and set the alarm for the next end."""
        self._alarm.clear()
        is_busy = bool(self._running) and not self._is_paused
        self.slots.fill(len(self._running) if is_busy else 0)
        if is_busy != self._is_busy:
            self._is_busy = is_busy
            self._device.occupy(self._width if is_busy else -self._width)
        if is_busy:
            work_s = self._reading_s + (self._running[0][0] - self._steps) * self._step_s
            self._alarm = self._device.call_after(max(0.0, work_s), self._wake)

    def _wake(self) -> None:
        self._settle()
        self._admit()

    def _finish(self, entry: tuple[float, int, float, int, int, _Request]) -> None:
        _, _, start, place, length, request = entry
        since, version = self._marks[-1]
        if since <= start:
            request.spans[place] = [VersionSpan(version, 0, length)]
        else:
            request.spans[place] = self._spans(start, length, request.factor)
        request.num_left -= 1
        if request.num_left == 0 and not request.done.done():
            request.done.set_result(None)

    def _spans(self, start: float, length: int, factor: float) -> list[VersionSpan]:
        """Return which version sampled which tokens of a response that was begun at step `start`."""
        first = max(0, bisect.bisect(self._marks, (start, math.inf)) - 1)
        begins = [max(0, min(length, round((at - start) / factor))) for at, _ in self._marks[first:]]
        ends = [*begins[1:], length]
        return [
            VersionSpan(version, begin, end)
            for (_, version), begin, end in zip(self._marks[first:], begins, ends, strict=True)
            if end > begin
        ]
