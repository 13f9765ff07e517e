"""Measures a profile from a run's events: the sink that writes profile.json, and the fits behind it.

Replicas that compute on the same cores slow each other down. So a span's duration is first turned into what it would
have been alone (`costs.pace`, the law that the simulator puts back; devices.py). Costs are least squares with no
negative part, scaled so that their sum over the run is what the run took. What came before the first step was learned
is warm-up and left out. `Sinks` feeds it; simulation/costs.py says what a profile holds.

Tests: tests/unit/simulation/test_profiler.py
"""

from __future__ import annotations

import bisect
import math
import os
import platform
import statistics
from collections import defaultdict, deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from flowrl.messages import FIRST_HELDOUT
from flowrl.simulation.costs import FORMAT, CallCost, DecodeCost, NodeProfile, Profile, Spread, pace
from flowrl.simulation.decoding import Arrival, fit_decoding
from flowrl.telemetry.events import Cause, Evaluation, Span, Status, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.telemetry.events import Event

T = TypeVar("T")

MOVES = ("sleep", "wake")  # of an engine that has its devices in turns
ASIDE = ("examined v", "tasks v")  # begin names of what waits for others, and computes nothing itself
MAX_SPANS = 20_000  # newest ones kept of each node
MAX_STATUSES = 20_000  # newest ones kept of each node: hours at one a second
MAX_STEPS = 20_000  # newest ones kept
MAX_DECODING = 400  # newest requests that decoding is fitted to: the fit takes a few seconds
MAX_RUNNING = 1 << 20  # where the plan does not say
LEAST_CALLS = 5  # for a fit; with fewer after the first step, those of the warm-up are taken as well
LEAST_SPREAD = 0.2  # of the tokens in a call, against their mean, to tell what a token costs from what a call does
MAX_GROUPS = 100_000  # groups whose tokens are remembered
NUM_QUANTILES = 33
ROUNDING = 1e-18  # of the sum of squares: fits no further apart are equal
SCORING_SHARE = 1 / 3  # of a training pass: forward without backward
# Of a core's speed while all the others work. The first is from an overlapped and a synchronous GRPO run on two threads
# of one AMD core: their profiles predict each other within 4 % with it and within 21 % without. The second is a guess.
SHARED_SLOWDOWN = 0.3
OWN_SLOWDOWN = 0.05


class ReplicaDevice(NamedTuple):
    """Where a node's replicas compute."""

    device: str  # nodes on a device of one name share it; a GPU's name has the replica added
    width: float  # cores (or GPUs) that a computing replica keeps busy
    config: dict[str, Any]


def places(graph: dict[str, Any]) -> dict[str, ReplicaDevice]:
    """Return each node's place, from the plan that stands as graph.json in a run's directory."""
    configs = {name: node["arguments"].get("config", {}) for name, node in graph["nodes"].items()}
    found: dict[str, ReplicaDevice] = {}
    for name, config in configs.items():
        host = config.get("share") or name
        on_gpu = configs[host].get("gpus", 0) > 0
        found[name] = ReplicaDevice(
            host if on_gpu else "cores", 1.0 if on_gpu else float(config.get("threads", 1)), config
        )
    return found


class ProfileFile:
    """The sink: gathers spans while a run goes on and writes profile.json at its end, if it learned anything."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._profiler = Profiler()

    def consume(self, events: list[Event]) -> None:
        """Take in events in order of arrival."""
        self._profiler.consume(events)

    def close(self) -> None:
        """Write the profile; without two steps, or without a plan beside it, there is nothing to write."""
        plan = self._run_dir / "graph.json"
        if plan.exists() and self._profiler.num_steps > 1:
            profile = self._profiler.profile(places(msgspec.json.decode(plan.read_bytes())))
            (self._run_dir / "profile.json").write_bytes(msgspec.json.format(msgspec.json.encode(profile)))


class Profiler:
    """Events of one run, and the costs fitted to them."""

    def __init__(self) -> None:
        self._spans: defaultdict[str, deque[Span]] = defaultdict(lambda: deque(maxlen=MAX_SPANS))
        self._tokens: dict[int, int] = {}  # of a group's prompts and responses
        self._selected: dict[int, tuple[float, int]] = {}  # when samples of a group were selected, and their tokens
        self._steps_s: deque[float] = deque(maxlen=MAX_STEPS)
        self._num_heldout = 0  # prompts of the last evaluation
        self._charged: defaultdict[str, deque[tuple[float, float, float]]] = defaultdict(
            lambda: deque(maxlen=MAX_STATUSES)
        )  # time, compute, update

    @property
    def num_steps(self) -> int:
        """Return how many steps were seen."""
        return len(self._steps_s)

    def consume(self, events: Sequence[Event]) -> None:
        """Take in events in order of arrival."""
        for event in events:
            if isinstance(event, Span):
                if event.name == "select":  # takes no time, so it is no call with a cost
                    _keep(self._selected, event.groups[0], (event.end_s, _num_tokens(event)))
                    continue
                self._spans[event.node].append(event)
                if event.name == "generate" and event.groups:
                    _keep(self._tokens, event.groups[0], _num_tokens(event))
            elif isinstance(event, Step):
                self._steps_s.append(event.time_s)
            elif isinstance(event, Evaluation):
                self._num_heldout = len(event.scores) + sum(map(len, event.sets.values()))
            elif isinstance(event, Status) and event.replica == 0:
                spent = event.seconds
                row = (event.time_s, spent.get(Cause.COMPUTE, 0.0), spent.get(Cause.UPDATE, 0.0))
                self._charged[event.node].append(row)

    def profile(
        self, where: dict[str, ReplicaDevice], *, cores: float | None = None, slowdown: float | None = None
    ) -> Profile:
        """Return the costs; the machine that the run was on is by default this one."""
        import numpy as np

        total = cores or len(os.sched_getaffinity(0))
        self._places = where
        self._curves = {node: np.array(rows) for node, rows in self._charged.items()}
        slowdown = core_slowdown() if slowdown is None else slowdown
        self._work = Contention(self._spans, where, total, slowdown)
        nodes = {node: self._node(node, list(spans)) for node, spans in self._spans.items()}
        generated = [s for spans in self._spans.values() for s in spans if s.name == "generate"]
        return Profile(
            format=FORMAT,
            machine=machine_name(total),
            cores=total,
            slowdown=slowdown,
            message_s=self._message_s(generated),
            prompt_tokens=_spread([[s.args.get("prompt_tokens", 1)] for s in generated]),
            response_tokens=_spread([_lengths(s) for s in generated]),
            learned=self._learned(),
            heldout=self._num_heldout,
            nodes=nodes,
        )

    def _node(self, node: str, spans: list[Span]) -> NodeProfile:
        kinds: defaultdict[str, list[Span]] = defaultdict(list)
        for span in spans:
            kinds[_kind(span.name)].append(span)
        calls: dict[str, CallCost] = {}
        if kinds["score"]:
            calls["score"] = self._scoring(node, kinds["score"])
        if kinds["train"]:
            calls["train"] = self._training(node, kinds["train"], kinds["score"])
        if kinds["update"]:
            pauses = [s.args.get("pause_s", s.end_s - s.start_s) for s in kinds["update"][1:] or kinds["update"]]
            whole = [s.end_s - s.start_s for s in kinds["update"][1:] or kinds["update"]]
            calls["update_pause"] = _mean(pauses)
            calls["update_transfer"] = _mean([max(0.0, all_s - p) for all_s, p in zip(whole, pauses, strict=True)])
        if kinds["checkpoint"]:
            calls["checkpoint"] = _mean([self._work.of(s) for s in kinds["checkpoint"]])
        if kinds["publish"]:
            calls |= self._publishing(node, kinds)
        calls |= {name: _mean([s.end_s - s.start_s for s in kinds[name]]) for name in MOVES if kinds[name]}
        decoding = kinds["generate"][-MAX_DECODING:]
        config = self._places[node].config if node in self._places else {}
        return NodeProfile(
            decode=self._decoding(node, decoding) if decoding else None,
            calls=calls,
            ranks=config.get("ranks", 1),
            threads=config.get("threads", 1),
        )

    def _scoring(self, node: str, spans: list[Span]) -> CallCost:
        """Fit calls that score groups; an engine's cost is all its tokens' where every call had as many."""
        rows = [[1.0, self._sum(s.groups, s.start_s)] for s in spans]
        if _is_even(rows) and "engine" in (self._places[node].config if node in self._places else {}):
            rows = [[0.0, tokens] for _, tokens in rows]
        return self._fit(spans, rows)

    def _training(self, node: str, spans: list[Span], scored: list[Span]) -> CallCost:
        """Fit optimizer steps, one or several in a span; a span without groups trained on what was scored since."""
        config = self._places[node].config if node in self._places else {}
        passes, num = config.get("epochs", 1), config.get("epochs", 1) * config.get("minibatches", 1)
        passes += SCORING_SHARE if num > 1 else 0.0
        rows: list[list[float]] = []
        ends, since = [s.end_s for s in scored], 0
        for span in spans:
            until = bisect.bisect(ends, span.start_s + 1e-3)
            own = span.groups or [g for s in scored[since:until] for g in s.groups]
            since = until
            rows.append([float(num), passes * self._sum(own, span.start_s)])
        if _is_even(rows):
            return self._fit(spans, rows, token_s=self._forward_s(node) / SCORING_SHARE)
        return self._fit(spans, rows)

    def _forward_s(self, node: str) -> float:
        """Return what scoring a token costs in a node or, where it scores nothing, in the one where that is dearest."""
        found: dict[str, float] = {}
        for name, all_spans in self._spans.items():
            spans = [s for s in all_spans if _kind(s.name) == "score" and s.groups]
            if spans and "engine" in (self._places[name].config if name in self._places else {}):
                found[name] = self._scoring(name, spans).token_s
        return found.get(node, max(found.values(), default=0.0))

    def _publishing(self, node: str, kinds: dict[str, list[Span]]) -> dict[str, CallCost]:
        """Return what a version costs the learner besides its step: what it computed outside of any span."""
        first_s, last_s = self._known_since_s(node), self._steps_s[-1]
        inside = [s for s in [*kinds["train"], *kinds["checkpoint"]] if first_s < s.end_s <= last_s + 1e-3]
        computed_s = self._between(node, first_s, last_s, column=1)
        named_s = sum(s.end_s - s.start_s - self._between(node, s.start_s, s.end_s, column=2) for s in inside)
        rest_s = max(0.0, computed_s - named_s) / max(1, sum(step_s > first_s for step_s in self._steps_s))
        updates: defaultdict[str, float] = defaultdict(float)
        for spans in self._spans.values():
            for span in spans:
                if _kind(span.name) == "update":
                    version = span.name.rpartition(" ")[2]
                    updates[version] = max(updates[version], span.end_s - span.start_s)
        waits = [s.end_s - s.start_s - rest_s - updates[s.name.rpartition(" ")[2]] for s in kinds["publish"][1:]]
        median = sorted(waits)[len(waits) // 2] if waits else 0.0
        return {"publish": _mean([rest_s]), "transfer": _mean([max(0.0, median)])}

    def _known_since_s(self, node: str) -> float:
        """Return the step from which on nothing of a node is forgotten, at the earliest the first."""
        since_s = self._steps_s[0]
        if len(self._charged[node]) == MAX_STATUSES:
            since_s = max(since_s, self._charged[node][0][0])
        if len(self._spans[node]) == MAX_SPANS:
            since_s = max(since_s, self._spans[node][0].end_s)
        return next((step_s for step_s in self._steps_s if step_s >= since_s), self._steps_s[-1])

    def _between(self, node: str, start_s: float, end_s: float, *, column: int) -> float:
        """Return the seconds charged from one moment to another, between the statuses by proportion."""
        import numpy as np

        rows = self._curves[node] if node in self._curves else np.zeros((1, 3))
        low, high = np.interp([start_s, end_s], rows[:, 0], rows[:, column])
        return max(0.0, float(high - low))

    def _fit(self, spans: list[Span], rows: list[list[float]], *, token_s: float = 0.0) -> CallCost:
        """Fit seconds to (calls, tokens); waits for an update and, if there are enough, warm-up calls are left out.

        A `token_s` that is known from elsewhere is taken as it is, unless it alone would be more than was measured.
        """
        import numpy as np

        until_s = self._steps_s[0] if self._steps_s else -math.inf
        kept = [place for place, span in enumerate(spans) if span.start_s >= until_s]
        if len(kept) < LEAST_CALLS:
            kept = list(range(len(spans)))
        waited = {p: self._between(spans[p].node, spans[p].start_s, spans[p].end_s, column=2) for p in kept}
        shares = {p: max(0.0, 1 - waited[p] / max(1e-9, spans[p].end_s - spans[p].start_s)) for p in kept}
        seconds = np.array([self._work.of(spans[p]) * shares[p] for p in kept])
        measured = np.array([rows[p] for p in kept])
        calls, tokens = measured.sum(axis=0).tolist()
        if 0 < token_s * tokens < seconds.sum():
            call_s = float(seconds.sum() - token_s * tokens) / calls
        else:
            call_s, token_s = nonnegative(measured, seconds)
        fitted = measured @ [call_s, token_s]
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(seconds / fitted)
        sigma = float(np.std(logs[np.isfinite(logs)])) if np.isfinite(logs).any() else 0.0
        return CallCost(call_s=call_s, token_s=token_s, log_sigma=round(sigma, 4), num_calls=len(kept))

    def _decoding(self, node: str, spans: list[Span]) -> DecodeCost:
        """Fit the requests of all replicas, in the work that each replica had been given when they came and ended."""
        config = self._places[node].config if node in self._places else {}
        most = int(config.get("max_running", MAX_RUNNING))
        rereads = config.get("on_update", "keep") in ("keep", "resume") and not config.get("keep_cache", False)
        updates = [s for s in self._spans[node] if _kind(s.name) == "update"]
        replicas: list[list[Arrival]] = []
        for replica in {s.replica for s in spans}:
            own = sorted((s for s in spans if s.replica == replica), key=lambda s: s.start_s)
            pauses = [s for s in updates if s.replica == replica and own[0].start_s < s.start_s < own[-1].end_s]
            starts_s, ends_s = (
                self._work.at(own[0], [s.start_s for s in own]),
                self._work.at(own[0], [s.end_s for s in own]),
            )
            arrivals = [
                Arrival(at_s, s.args.get("prompt_tokens", 0), _lengths(s), end_s)
                for s, at_s, end_s in zip(own, starts_s, ends_s, strict=True)
            ]
            for pause, at_s in zip(pauses, self._work.at(own[0], [s.start_s for s in pauses]), strict=True):
                arrivals.append(Arrival(at_s, 0, (), at_s, pause.args.get("pause_s", 0.0), rereads))
            replicas.append(sorted(arrivals, key=lambda a: a.at_s))
        return fit_decoding(replicas, most)

    def _message_s(self, generated: list[Span]) -> float:
        """Return half the time from a group's last token to its first call downstream, where that was idle."""
        ends = {s.groups[0]: s.end_s for s in generated if s.groups}
        firsts: dict[int, float] = {}
        for spans in self._spans.values():
            for span in spans:
                for group in span.groups if span.name != "generate" else []:
                    firsts[group] = min(firsts.get(group, math.inf), span.start_s)
        waits = sorted(firsts[g] - end_s for g, end_s in ends.items() if g in firsts)
        return max(0.0, waits[len(waits) // 4] / 2) if waits else 0.0

    def _learned(self) -> float:
        """Return the part of the groups that was learned: the learner takes them in the order of their numbers."""
        trained = (s for spans in self._spans.values() for s in spans if _kind(s.name) == "train")
        learned = {group for s in trained for group in s.groups if group < FIRST_HELDOUT}
        return len(learned) / (max(learned) - min(learned) + 1) if learned else 1.0

    def _sum(self, groups: Sequence[int], at_s: float) -> float:
        """Return the tokens that groups had at a time, before or after the selection among their samples."""
        return float(sum(self._size(group, at_s) for group in groups))

    def _size(self, group: int, at_s: float) -> int:
        selected_s, num_tokens = self._selected.get(group, (math.inf, 0))
        return num_tokens if selected_s <= at_s else self._tokens.get(group, 0)


class Contention:
    """How fast each device's work went at any moment, by how much was computing on it (`costs.pace`)."""

    def __init__(
        self, spans: dict[str, deque[Span]], where: dict[str, ReplicaDevice], cores: float, slowdown: float = 0.0
    ) -> None:
        import numpy as np

        changes: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        self._device: dict[tuple[str, int], str] = {}
        self._alone: dict[tuple[str, int], float] = {}
        for node, own in spans.items():
            place = where.get(node, ReplicaDevice("cores", 1.0, {}))
            if place.config and "engine" not in place.config:
                continue  # it waits for other processes or does next to nothing: its time is latency, not work
            for replica in {s.replica for s in own}:
                device = place.device if place.device == "cores" else f"{place.device}.{replica}"
                self._device[node, replica] = device
                on_cores = device == "cores"
                self._alone[node, replica] = pace(place.width, cores, slowdown) if on_cores else 1.0
                for start_s, end_s in _union([s for s in own if s.replica == replica and _computes(s)]):
                    changes[device] += [(start_s, place.width), (end_s, -place.width)]
        self._curves: dict[str, tuple[Any, Any]] = {}
        for device, moves in changes.items():
            times, widths = np.array(sorted(moves)).T
            computing = [*map(float, np.cumsum(widths)[:-1])]
            known = {w: pace(w, cores, slowdown) if device == "cores" else pace(w, 1.0, 0.0) for w in set(computing)}
            rates = np.array([known[w] for w in computing])
            self._curves[device] = times, np.concatenate([[0.0], np.cumsum(rates * np.diff(times))])

    def of(self, span: Span) -> float:
        """Return the seconds that a span would have taken alone on its device."""
        start_s, end_s = self.at(span, [span.start_s, span.end_s])
        return end_s - start_s

    def at(self, span: Span, times: Sequence[float]) -> list[float]:
        """Return how many seconds of work the span's replica could have had done at these times."""
        import numpy as np

        who = span.node, span.replica
        known, done = self._curves.get(self._device.get(who, ""), ([0.0], [0.0]))
        asked = np.asarray(times, dtype=float)
        outside = np.maximum(0.0, asked - known[-1]) - np.maximum(0.0, known[0] - asked)  # alone there
        return (np.interp(asked, known, done) / self._alone.get(who, 1.0) + outside).tolist()


def _num_tokens(span: Span) -> int:
    """Return the tokens of a span's group, the prompt counted with each sample."""
    return span.args.get("tokens", 0) + span.args.get("prompt_tokens", 0) * span.args.get("samples", 1)


def _keep(sizes: dict[int, T], group: int, size: T) -> None:
    """Note a group's size, and forget the one noted longest ago where there are many."""
    sizes[group] = size
    if len(sizes) > MAX_GROUPS:
        del sizes[next(iter(sizes))]


def _kind(name: str) -> str:
    """Return what kind of call a span was."""
    if name in ("generate", "evaluate"):
        return "generate"
    if name in MOVES:
        return name
    if name.startswith(ASIDE):
        return "aside"
    for start, kind in (("weight update", "update"), ("publish", "publish"), ("checkpoint", "checkpoint")):
        if name.startswith(start):
            return kind
    return "train" if name.startswith(("step ", "critic step")) else "score"


def _computes(span: Span) -> bool:
    return _kind(span.name) not in ("update", "publish", "aside", *MOVES)


def _union(spans: list[Span]) -> list[tuple[float, float]]:
    """Return the time covered by spans, as intervals that do not touch."""
    found: list[tuple[float, float]] = []
    for start_s, end_s in sorted((s.start_s, s.end_s) for s in spans):
        if found and start_s <= found[-1][1]:
            found[-1] = (found[-1][0], max(end_s, found[-1][1]))
        else:
            found.append((start_s, end_s))
    return found


def _is_even(rows: list[list[float]]) -> bool:
    """Return whether all calls had so nearly as many tokens that a fit cannot tell the tokens' cost from the calls'."""
    tokens = [row[1] for row in rows]
    return statistics.pstdev(tokens) < LEAST_SPREAD * statistics.fmean(tokens)


def _lengths(span: Span) -> list[float]:
    """Return each response's tokens; equal parts of the sum where the span does not say."""
    samples = max(1, span.args.get("samples", 1))
    return [max(1.0, n) for n in span.args.get("lengths", [span.args.get("tokens", 0) / samples] * samples)]


def _spread(groups: list[list[float]]) -> Spread:
    import numpy as np

    values = np.array([value for group in groups for value in group] or [1.0], dtype=float)
    quantiles = np.quantile(values, np.linspace(0.0, 1.0, NUM_QUANTILES)).round(2).tolist()
    size = len(values) / max(1, len(groups))
    shared = 0.0
    if size > 1 and values.var() > 0:
        within = float(np.mean([np.var(group, ddof=1) for group in groups if len(group) > 1]))
        between = float(np.var([np.mean(group) for group in groups])) - within / size
        shared = max(0.0, min(1.0, between / (between + within))) if between > 0 else 0.0
    return Spread(quantiles=tuple(quantiles), shared=round(shared, 3))


def nonnegative(rows: Any, seconds: Any) -> list[float]:
    """Return the least-squares parts of `seconds`, none of them negative, that add up to its sum.

    The best of all choices of parts is taken; parts that cannot be told apart share alike.
    """
    import numpy as np

    scale = np.abs(rows).mean(axis=0)
    best, least = np.zeros(rows.shape[1]), math.inf
    for choice in range(1, 1 << rows.shape[1]):
        columns = [c for c in range(rows.shape[1]) if choice >> c & 1 and scale[c] > 0]
        if not columns:
            continue
        part = np.linalg.lstsq(rows[:, columns] / scale[columns], seconds, rcond=1e-6)[0]
        error = float(np.sum((rows[:, columns] / scale[columns] @ part - seconds) ** 2))
        if (part >= 0).all() and error <= least * (1 + 1e-9) + ROUNDING * float(seconds @ seconds):
            best = np.zeros(rows.shape[1])
            best[columns], least = part / scale[columns], min(least, error)
    total = float((rows @ best).sum())
    return [float(b) for b in best * (float(seconds.sum()) / total if total > 0 else 1.0)]


def _mean(seconds: list[float]) -> CallCost:
    return CallCost(call_s=sum(seconds) / len(seconds), num_calls=len(seconds))


def core_slowdown() -> float:
    """Return what a core loses while all the others work: more where the "cores" are threads of the real ones.

    One run alone hardly tells: what is always beside it in that run is in its costs.
    """
    siblings = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    shares = siblings.exists() and not siblings.read_text().strip().isdigit()
    try:
        is_virtual = "hypervisor" in Path("/proc/cpuinfo").read_text()  # which shows threads as if they were cores
    except OSError:
        is_virtual = False
    return SHARED_SLOWDOWN if shares or is_virtual else OWN_SLOWDOWN


def machine_name(cores: float) -> str:
    """Return what a profile calls this machine: "AMD EPYC 7763, 2 cores"."""
    return f"{_processor()}, {cores:g} cores"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
