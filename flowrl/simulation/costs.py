"""Profiles: how long each part of a graph takes, so that other settings can be simulated before they are run.

A profile holds costs, not the speeds of a run: seconds of a device that a call would have to itself. A call costs
`call_s + token_s * tokens`, a decoding step `step_s + sample_s * running`. Every run measures one (profiler.py) and
leaves it as profile.json; one may also be typed in by hand, as YAML or JSON. `flowrl simulate` and `tune` read them,
and the engines of simulation/fake.py take the time they say.

Tests: tests/unit/simulation/test_timed.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import msgspec

from flowrl.config import Config, Meta, read_yaml
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = 1

PARALLEL = 0.9  # part of a call that more threads share (Amdahl); what is left stays with one of them

NonNegative = Annotated[float, Meta(ge=0)]


class CallCost(Config):
    """Seconds of a device for one call, `call_s + token_s * tokens`, times a log-normal factor of mean 1."""

    call_s: NonNegative = 0.0
    token_s: NonNegative = 0.0  # for each token, prompts included
    log_sigma: NonNegative = 0.0
    num_calls: int = 0  # measured; 0: typed in

    def seconds(self, tokens: float) -> float:
        """Return the mean cost of a call on so many tokens; call_s=1 and token_s=0.01 give 3 s for 200."""
        return self.call_s + self.token_s * tokens


class DecodeCost(Config):
    """Seconds of a device for one decoding step, in which every running sample gets one token."""

    step_s: NonNegative = 0.0  # however many samples run
    sample_s: NonNegative = 0.0  # more for each running sample
    prompt_token_s: NonNegative = 0.0  # reading one token of a new prompt, while decoding stands still
    log_sigma: NonNegative = 0.0  # a request takes a log-normal factor of mean 1 as many steps
    running: tuple[float, float] = (0.0, 0.0)  # samples that ran in 90 % of the time it was measured in

    def tokens_per_s(self, running: float) -> float:
        """Return the speed of all samples together; step_s=0.01 and sample_s=0.001 give 500 tokens/s with 10."""
        step_s = self.step_s + self.sample_s * running
        return running / step_s if step_s > 0 else math.inf

    def at_speed(self, speed: float) -> DecodeCost:
        """Return the costs where everything takes a `speed`-th of the time."""
        step_s, sample_s, prompt_token_s = (c / speed for c in (self.step_s, self.sample_s, self.prompt_token_s))
        return msgspec.structs.replace(self, step_s=step_s, sample_s=sample_s, prompt_token_s=prompt_token_s)


class NodeProfile(Config):
    """What one replica's work costs, by kind of call.

    Kinds: score (a group or a batch of them), train (one optimizer step), publish and checkpoint (a version of the
    learner); transfer (until a version's bytes have left), update_transfer and update_pause (of a generator).
    """

    decode: DecodeCost | None = None
    calls: dict[str, CallCost] = {}
    ranks: Annotated[int, Meta(ge=1)] = 1  # that marched together when it was measured
    threads: Annotated[int, Meta(ge=1)] = 1  # of each of them


class Spread(Config):
    """A distribution by evenly spaced quantiles; one value is a constant."""

    quantiles: Annotated[tuple[float, ...], Meta(min_length=1)] = (1.0,)
    shared: Annotated[float, Meta(ge=0, le=1)] = 0.0  # correlation between the samples of a group

    def at(self, share: float) -> float:
        """Return the value below which `share` of the distribution lies; [0, 10, 40] at 0.75 gives 25."""
        place = share * (len(self.quantiles) - 1)
        low = min(int(place), len(self.quantiles) - 1)
        high = min(low + 1, len(self.quantiles) - 1)
        return self.quantiles[low] + (place - low) * (self.quantiles[high] - self.quantiles[low])


class Profile(Config):
    """What a machine and a model take for each part of a graph."""

    format: int
    machine: str = ""
    cores: Annotated[float, Meta(gt=0)] = 1.0  # that nodes without GPUs share
    slowdown: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # part of its speed that a core loses while all the others work
    message_s: NonNegative = 0.0  # for a message to reach a queue or to come out of it
    prompt_tokens: Spread = Spread()
    response_tokens: Spread = Spread()
    learned: Annotated[float, Meta(gt=0, le=1)] = 1.0  # part of the groups that is; the rest is filtered on the way
    heldout: Annotated[int, Meta(ge=0)] = 0  # prompts of an evaluation, further sets' too; 0: none was seen
    nodes: dict[str, NodeProfile]


def speedup(threads: int) -> float:
    """Return how much faster than one so many threads are taken to be; 2 are 1.82 times as fast, 4 are 3.08."""
    return 1 / (1 - PARALLEL + PARALLEL / threads)


def pace(width: float, cores: float, slowdown: float) -> float:
    """Return the speed of each of `width` threads that compute at once on so many cores; one alone has 1.

    Beyond the cores they take turns. Within them each is slower the more of the others work, by `slowdown` where all do
    (they share caches, memory and often their arithmetic). Two on two cores with slowdown 0.2 have 0.8.
    """
    if width <= 0:
        return 1.0
    others = (min(width, cores) - 1) / (cores - 1) if cores > 1 else 0.0
    return min(1.0, cores / width) * (1 - slowdown * max(0.0, others))


def load_profile(path: Path) -> Profile:
    """Read a profile, or the one of a run's directory.

    Raises:
        ConfigError: there is none, it is of another format, or a value in it is wrong.
    """
    file = path / "profile.json" if path.is_dir() else path
    where = str(file)
    tree = read_yaml(file, "name a run that has ended, or a profile file")
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != FORMAT:
        what = f"is of profile format {found}, this flowrl reads {FORMAT}"
        raise ConfigError(where, what, "measure it again: every run writes its profile.json at its end")
    try:
        return msgspec.convert(tree, Profile, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(where, str(error), "see flowrl/simulation/costs.py for the fields") from error
