"""What is known of a run so far, folded from its events: the one model behind the live view and the report.

Invariants:
- a pure fold, with no clock, terminal or file of its own, so the same events give the same view whatever the batches;
- its size does not grow with the length of the run;
- a replica that was restarted goes on counting where its predecessor stopped.

`Sinks` feeds it; terminal.py and report.py only read it.

Tests: tests/unit/telemetry/test_view.py
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from flowrl.telemetry.events import HINT, Cause, EdgeStatus, Evaluation, Notice, Span, Status, Step

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from flowrl.telemetry.events import Event

RECENT_STEPS = 10  # intervals between steps behind the rate and the estimate of the end: they follow a change of pace
RECENT_STATUSES = 30  # statuses behind a replica's rate: half a minute at one a second
MOSTLY_CUT = 0.5  # of a step's responses: more than rambling explains
MOST_EVALUATIONS = 20  # held beside the first; metrics.jsonl has them all
MOST_REPEATED = 1000  # steps that a rollback takes back at most
NOT_WORKING = (Cause.START.value, Cause.RECOVERY.value)

Seconds = dict[str, float]  # by cause


class ReplicaView:
    """One replica: what it does now and where its time went."""

    def __init__(self, node: str, replica: int) -> None:
        self.node = node
        self.replica = replica
        self.cause = ""
        self.running = 0
        self.version = -1
        self.time_s = 0.0  # of the newest status
        self.observed_s = 0.0  # wall clock between the first and the newest status of each life
        self.charged_s = 0.0  # seconds charged to causes in the same time; the two agree if no second is lost
        self._seconds: Seconds = {}
        self._done = 0
        self._earlier_seconds: Counter[str] = Counter()  # of lives that ended in a restart
        self._earlier_done = 0
        self._filled_s: float | None = None
        self._earlier_filled_s = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_STATUSES + 1)

    @property
    def name(self) -> str:
        """Return node and replica as errors name them."""
        return f"{self.node}.{self.replica}"

    def fold(self, status: Status) -> None:
        """Take in a status; one that says less than the last means that the replica was started again."""
        age_s, last_age_s = sum(status.seconds.values()), sum(self._seconds.values())
        is_first = not self._recent
        if not is_first and age_s < last_age_s - 1e-6:
            self._earlier_seconds.update(self._seconds)
            self._earlier_done += self._done
            self._earlier_filled_s += self._filled_s or 0.0
            self._recent.clear()
            is_first = True
        if not is_first:
            self.observed_s += status.time_s - self.time_s
            self.charged_s += age_s - last_age_s
        self._seconds, self._done, self._filled_s = dict(status.seconds), status.done, status.filled_s
        self.cause, self.running, self.version, self.time_s = (
            status.cause,
            status.running,
            status.version,
            status.time_s,
        )
        self._recent.append((status.time_s, self.done))

    @property
    def done(self) -> int:
        """Return the groups finished over the whole run."""
        return self._earlier_done + self._done

    @property
    def seconds(self) -> Seconds:
        """Return the seconds charged to each cause over the whole run."""
        return dict(self._earlier_seconds + Counter(self._seconds))

    @property
    def filled_s(self) -> float | None:
        """Return the seconds over the whole run, each times the part of the decode slots filled; None: it has none."""
        return None if self._filled_s is None else self._earlier_filled_s + self._filled_s

    @property
    def occupancy(self) -> float | None:
        """Return the part of its decode slots filled, of the time since it started; None where it has none."""
        seconds = self.seconds
        up_s = sum(seconds.values()) - sum(seconds.get(cause, 0.0) for cause in NOT_WORKING)
        return None if self.filled_s is None else self.filled_s / up_s if up_s > 0 else 0.0

    @property
    def status(self) -> Status:
        """Return the newest status, with what earlier lives did added."""
        return Status(
            node=self.node,
            replica=self.replica,
            time_s=self.time_s,
            cause=self.cause,
            seconds=self.seconds,
            done=self.done,
            running=self.running,
            filled_s=self.filled_s,
            version=self.version,
        )

    @property
    def rate_per_s(self) -> float:
        """Return groups finished per second over the newest statuses; 0 before there are two."""
        (first_s, first), (last_s, last) = self._recent[0], self._recent[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    def starting_s(self, now_s: float) -> float | None:
        """Return for how long the replica has been starting, or None where it is not."""
        if self.cause != Cause.START:
            return None
        return self._seconds.get(Cause.START.value, 0.0) + max(0.0, now_s - self.time_s)


class RunView:
    """A run as far as its events tell."""

    def __init__(self, *, expected: Sequence[str] = ()) -> None:
        self.expected = tuple(expected)  # names of the nodes that will report, in the order to show them
        self.started_s: float | None = None  # the earliest time in any event
        self.now_s = 0.0  # the latest time in any event
        self.last_step: Step | None = None
        self.first_step: Step | None = None
        self.evaluations: dict[int, Evaluation] = {}
        self.edges: dict[str, EdgeStatus] = {}
        self.staleness: Counter[int] = Counter()  # learned groups by staleness
        self._counted: dict[int, Counter[int]] = {}  # the newest steps' part of it, taken back if one is done again
        self.num_steps_done = 0
        self.logprob_gap: tuple[float, float] | None = None  # mean |d| of the newest check, greatest of all checks
        self.path_nodes: set[str] = set()  # nodes that handle prompt groups
        self.generator_nodes: set[str] = set()
        self.num_warnings = 0
        self.hint = ""  # the newest: which setting would help
        self._replicas: dict[tuple[str, int], ReplicaView] = {}
        self._recent: deque[Step] = deque(maxlen=RECENT_STEPS + 1)
        self._totals: Counter[str] = Counter()  # tokens and samples of the steps
        self._at_first_step: dict[tuple[str, int], Seconds] = {}
        self._at_last_step: dict[tuple[str, int], Seconds] = {}
        self._filled_at_first: dict[tuple[str, int], float] = {}
        self._filled_at_last: dict[tuple[str, int], float] = {}

    def fold(self, events: Iterable[Event]) -> None:
        """Take in events in order of arrival."""
        for event in events:
            match event:
                case Span():
                    self._fold_span(event)
                case Step():
                    self._fold_step(event)
                case Status():
                    self._see(event.time_s)
                    key = (event.node, event.replica)
                    if key not in self._replicas:
                        self._replicas[key] = ReplicaView(*key)
                    self._replicas[key].fold(event)
                case EdgeStatus():
                    self._see(event.time_s)
                    self.edges[event.edge] = event
                case Evaluation():
                    self._see(event.time_s)
                    self._keep(event)
                case Notice():
                    self._see(event.time_s)
                    self.num_warnings += event.level != "info"
                    self.hint = event.text if event.where == HINT else self.hint

    def recall(self, evaluations: Iterable[Evaluation]) -> None:
        """Take in evaluations of the part of a resumed run that came before; they are no part of its time."""
        for evaluation in evaluations:
            self._keep(evaluation)

    def _keep(self, evaluation: Evaluation) -> None:
        """Keep an evaluation: the first one, and the newest `MOST_EVALUATIONS`."""
        self.evaluations[evaluation.version] = evaluation
        while len(self.evaluations) > MOST_EVALUATIONS + 1:
            del self.evaluations[sorted(self.evaluations)[1]]

    def _see(self, time_s: float) -> None:
        self.started_s = time_s if self.started_s is None else min(self.started_s, time_s)
        self.now_s = max(self.now_s, time_s)

    def _fold_span(self, span: Span) -> None:
        self._see(span.start_s)
        self._see(span.end_s)
        if span.groups:
            self.path_nodes.add(span.node)
        if span.name == "generate":
            self.generator_nodes.add(span.node)

    def _fold_step(self, step: Step) -> None:
        self._see(step.time_s)
        while self._recent and self._recent[-1].version >= step.version:
            self._recent.pop()  # the learner went back to a checkpoint: those steps are being done again
        self._recent.append(step)
        self.last_step = step
        self.num_steps_done += 1
        self.staleness.subtract(self._counted.pop(step.version, Counter()))
        self._counted[step.version] = Counter(step.staleness)
        self.staleness = +(self.staleness + self._counted[step.version])
        if len(self._counted) > MOST_REPEATED:
            del self._counted[next(iter(self._counted))]
        now = {key: replica.seconds for key, replica in self._replicas.items()}
        filled = {key: s for key, replica in self._replicas.items() if (s := replica.filled_s) is not None}
        if self.first_step is None:
            self.first_step, self._at_first_step, self._filled_at_first = step, now, filled
        else:  # what the first step learned was made before the window between the first and the last step
            self._totals.update({name: int(step.metrics.get(name, 0)) for name in ("tokens", "samples")})
        self._at_last_step, self._filled_at_last = now, filled
        if "logprob_gap.mean" in step.metrics:
            greatest = step.metrics.get("logprob_gap.max", 0.0)
            self.logprob_gap = (
                step.metrics["logprob_gap.mean"],
                max(greatest, self.logprob_gap[1] if self.logprob_gap else 0.0),
            )

    @property
    def replicas(self) -> list[ReplicaView]:
        """Return every replica, nodes in the expected order and then as they appeared."""
        nodes = self.nodes
        return sorted(self._replicas.values(), key=lambda r: (nodes.index(r.node), r.replica))

    @property
    def nodes(self) -> list[str]:
        """Return the names of the nodes that have reported, in the expected order and then as they appeared."""
        seen = dict.fromkeys(node for node, _ in self._replicas)
        return [n for n in self.expected if n in seen] + [n for n in seen if n not in self.expected]

    @property
    def silent_nodes(self) -> list[str]:
        """Return the expected nodes that have not reported yet."""
        return [node for node in self.expected if node not in self.nodes]

    def starting(self, now_s: float) -> str:
        """Say who is still starting: `generator.0 starting 12 s; not heard from yet: learner`; "" once all are up."""
        lines = [
            f"{replica.name} starting {format_duration(starting_s)}"
            for replica in self.replicas
            if (starting_s := replica.starting_s(now_s)) is not None
        ]
        if self.silent_nodes:
            lines.append(f"not heard from yet: {', '.join(self.silent_nodes)}")
        return "; ".join(lines)

    @property
    def cut_responses(self) -> str:
        """Say that most responses of the newest step were cut off, with the setting to raise; "" where not."""
        share = self.last_step.metrics.get("response_tokens.cut", 0.0) if self.last_step else 0.0
        if self.last_step is None or share < MOSTLY_CUT:
            return ""
        what = f"{share:.0%} of the responses in step {self.last_step.version} were cut off before their end"
        return f"{what}: raise sampling.max_tokens"

    @property
    def step_interval_s(self) -> float | None:
        """Return the mean time from step to step of late; None before the second step."""
        if len(self._recent) < 2:
            return None
        first, last = self._recent[0], self._recent[-1]
        return (last.time_s - first.time_s) / (last.version - first.version)

    @property
    def remaining_s(self) -> float | None:
        """Estimate how long after the last step the last one of the run will come, at the pace of late.

        Versions 10 and 12 of 40 at 100 s and 130 s: 28 steps of 15 s are 420 s.
        """
        interval_s = self.step_interval_s
        if interval_s is None or self.last_step is None:
            return None
        return interval_s * (self.last_step.num_steps - self.last_step.version)

    def recent_per_s(self, metric: str) -> float | None:
        """Return `metric` (tokens, samples) learned per second of late; None before the second step."""
        steps = list(self._recent)
        if len(steps) < 2 or steps[-1].time_s <= steps[0].time_s:
            return None
        return sum(step.metrics.get(metric, 0.0) for step in steps[1:]) / (steps[-1].time_s - steps[0].time_s)

    def steady_per_s(self, metric: str) -> float | None:
        """Return `metric` (tokens, samples) learned per second between the first and the last step."""
        if self.first_step is None or self.last_step is None or self.last_step.time_s <= self.first_step.time_s:
            return None
        return self._totals[metric] / (self.last_step.time_s - self.first_step.time_s)

    def overall_per_s(self, metric: str) -> float | None:
        """Return `metric` learned per second from the first event to the last step, the start included."""
        if self.first_step is None or self.last_step is None or self.started_s is None:
            return None
        elapsed_s = self.last_step.time_s - self.started_s
        total = self._totals[metric] + self.first_step.metrics.get(metric, 0.0)
        return total / elapsed_s if elapsed_s > 0 else None

    def node_seconds(self, node: str) -> Seconds:
        """Return the seconds of all of a node's replicas by cause, over the run."""
        return _summed(replica.seconds for replica in self.replicas if replica.node == node)

    def steady_seconds(self, node: str) -> Seconds:
        """Return a node's seconds by cause between the first and the last step; all but its start where they are one.

        Read from the statuses that had arrived at either step, so its ends are about a second wide.
        """
        spans = [
            _difference(seconds, self._at_first_step[key])
            for key, seconds in self._at_last_step.items()
            if key[0] == node and key in self._at_first_step
        ]
        steady = _summed(spans)
        if sum(steady.values()) > 0:
            return steady
        return {cause: spent for cause, spent in self.node_seconds(node).items() if cause not in NOT_WORKING}

    def slot_occupancy(self, node: str) -> float | None:
        """Return the part of a generator's decode slots filled between the first and the last step, all replicas alike.

        None where the node has none, or there was no such time.
        """
        keys = [key for key in self._filled_at_last if key[0] == node and key in self._at_first_step]
        spent_s = sum(self._filled_at_last[key] - self._filled_at_first.get(key, 0.0) for key in keys)
        total_s = sum(sum(_difference(self._at_last_step[key], self._at_first_step[key]).values()) for key in keys)
        return spent_s / total_s if total_s > 0 else None


def shares(seconds: Seconds) -> Seconds:
    """Return each cause's part of the whole; they add up to 1, or are empty where no time was charged."""
    total = sum(seconds.values())
    return {cause: spent / total for cause, spent in seconds.items()} if total > 0 else {}


def words(cause: str) -> str:
    """Return a cause as people read it: `waiting_for_input` is "waiting for input"."""
    return cause.replace("_", " ")


def format_duration(seconds: float) -> str:
    """Return a duration in one or two units: 12 s, 3m10s, 2h05m, 3d04h."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def _summed(many: Iterable[Seconds]) -> Seconds:
    total: Seconds = {}
    for seconds in many:
        for cause, spent in seconds.items():
            total[cause] = total.get(cause, 0.0) + spent
    return total


def _difference(later: Seconds, earlier: Seconds) -> Seconds:
    return {cause: max(0.0, spent - earlier.get(cause, 0.0)) for cause, spent in later.items()}
