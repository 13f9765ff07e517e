"""What the critic and the advantage node share: loading an algorithm, and its advantages of groups, step by step.

Invariant: the advantages of a step follow from settings that follow from the groups of the steps before it alone, in
prompt order. So an adaptive KL coefficient and running score normalisation are the same whatever the timing.

A checkpoint of version v needs the settings of step v, which a node that runs ahead still knows.

Tests: tests/unit/stages/test_estimation.py
"""

from __future__ import annotations

import math
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.errors import ConfigError, DataError
from flowrl.messages import Buffer, R, Referenced, narrowed
from flowrl.stages.tokens import mask_of, padded, unpadded

if TYPE_CHECKING:
    from pathlib import Path

    from flowrl.algorithms.base import AdvantageBatch, Algorithm, Objective
    from flowrl.config import Select
    from flowrl.messages import FloatArray, Sample

STATE = "estimation.json"  # beside the node's other state


def load_algorithm(
    choice: Select, *, group_size: int | None = None, has_critic: bool | None = None, has_greedy: bool | None = None
) -> Algorithm:
    """Load an algorithm; the stage that credits groups with it also says what the graph gives it.

    Raises:
        ConfigError: it needs a critic, a group of samples or a greedy response that the graph does not have, or has no
            use for what it has, or an option is wrong.
    """
    from flowrl.algorithms.base import Algorithm

    algorithm = choice.load("algorithm")
    if not isinstance(algorithm, Algorithm):
        raise ConfigError("algorithm", f"{choice.use} is not an Algorithm", "subclass flowrl.algorithms.base:Algorithm")
    if algorithm.needs_critic and has_critic is False:
        raise ConfigError(
            "algorithm", f"{choice.use} needs a critic, which this graph does not have", "use graphs/ppo_async.py"
        )
    if has_critic and not algorithm.needs_critic and not algorithm.is_blank:
        what = f"{choice.use} gives the critic of this graph nothing to learn"
        raise ConfigError("algorithm", what, "use graphs/group_async.py")
    if algorithm.needs_greedy and has_greedy is False:
        what = f"{choice.use} takes off the score of the likeliest response, which this graph does not sample"
        raise ConfigError("algorithm", what, "set greedy_baseline=true in graphs/group_async.py")
    if has_greedy and not algorithm.needs_greedy and not algorithm.is_blank:
        what = f"{choice.use} has no use for the likeliest response"
        raise ConfigError("greedy_baseline", what, "leave it false, or take algorithm=remax")
    if algorithm.needs_group and group_size is not None and group_size < 2:
        what = f"{choice.use} compares the samples of a group, but group_size is {group_size}"
        raise ConfigError("group_size", what, "set generator.group_size (or agent.group_size) to 2 or more")
    return algorithm


STALE = 4  # versions at which the kinds of correction were measured to differ (docs/learning.md)
MEASURED = 8  # the greatest staleness there
SHORT = 2  # optimizer steps a version in which a policy hardly leaves the one that sampled


def advice(objective: Objective, *, max_staleness: int = 0, num_updates: int = 1) -> list[str]:
    """Return what a user of these settings ought to know before a run."""
    found: list[str] = []
    if getattr(objective, "needs_critic", False) and not getattr(objective, "needs_reference", True):
        text = "algorithm.kl.coef is 0: nothing keeps the policy near the reference, and PPO without any KL term tends "
        found.append(f"{text}to drift into text that only the reward likes; set algorithm.kl.coef=0.01")
    kind = getattr(getattr(objective, "correction", None), "kind", "")
    what = better = ""
    if max_staleness <= 1 and kind == "interpolated":
        what, better = "is behaviour where no sample is more than one version old", "behaviour"
    elif max_staleness > MEASURED and kind in ("truncated", "behaviour"):
        what = f"was measured up to {MEASURED} only"
        better = "divergence or second_moment, whose papers go further"
    elif max_staleness >= STALE and kind == "truncated":
        what, better = "bounds no token's distance from the policy that sampled it", "behaviour"
    elif max_staleness >= STALE and kind == "behaviour" and num_updates > SHORT:
        what = f"may stop many tokens in {num_updates} optimizer steps a version, as clip_frac_* tell"
        better = "interpolated where that is above a tenth"
    if better:
        text = f"max_staleness is {max_staleness} and correction.kind {kind}, which {what}"
        found.append(f"{text}; take algorithm.correction.kind={better} (docs/learning.md)")
    return found


def settled(choice: Select, max_tokens: int) -> Select:
    """Return the choice with the longest response filled in where its settings leave it open (0).

    That is `sampling.max_tokens`, written once; `max_tokens` 0 leaves everything as it is.
    """
    from flowrl.algorithms.policy import PolicyGradient

    algorithm = choice.load("algorithm")
    if not isinstance(algorithm, PolicyGradient) or not max_tokens:
        return choice
    filled: dict[str, Any] = {}
    if algorithm.normalisation == "constant" and not algorithm.constant_tokens:
        filled["constant_tokens"] = max_tokens
    if algorithm.shaping.overlong_buffer and not algorithm.shaping.max_tokens:
        filled["shaping.max_tokens"] = max_tokens
    return choice.changed(filled)


def check_sampling(algorithm: Algorithm, *, is_cut: bool) -> None:
    """Insist on a correction where tokens were drawn from a part of the distribution only.

    Raises:
        ConfigError: top-p or top-k is set and no token's loss is weighted with pi / pi_old.
    """
    remedy = "set top_p=1 and top_k=0, or algorithm.correction.kind=truncated"
    if is_cut and algorithm.needs_full_sampling:
        what = "top_p or top_k cuts the distribution that is sampled, the learner's is whole, and nothing in the loss "
        raise ConfigError("sampling", f"{what}makes up for it", remedy)


class Estimation:
    """Finds the advantages of groups in prompt order, with an algorithm that may change from step to step."""

    def __init__(self, choice: Select, algorithm: Algorithm, *, version: int = 0) -> None:
        self.algorithm = algorithm
        self._choice = choice
        self._version = version
        # By step, its values of the settings that change.
        self._changes = {version: {path: float(attrgetter(path)(algorithm)) for path in algorithm.adapting}}
        self._rewards: list[float] = []  # of this step's samples
        self._kls: list[float] = []  # mean over each group's samples
        self.figures: dict[str, float] = {}  # further ones, given to every group of a step

    def advantages(
        self,
        group: Referenced,
        values: list[FloatArray] | None,
        after: list[float] | None = None,
        greedy: Referenced | None = None,
    ) -> dict[str, Any]:
        """Return the fields that turn a Referenced group into Samples; `after` has the values behind cut answers."""
        fields = group_fields(self.algorithm, group, values, after, greedy)
        if self.algorithm.adapting:
            self._rewards += group.rewards
            self._kls += [fields["metrics"].get("kl", math.nan)] * len(group.samples)
        fields["metrics"] = group.metrics | fields["metrics"] | self.figures | self._changes[self._version]
        return fields

    def end_step(self) -> None:
        """Begin the next step, with the settings that follow from this one."""
        changes = self._changes[self._version]
        if self.algorithm.adapting:
            import torch

            from flowrl.algorithms.base import StepFigures

            kl = math.fsum(self._kls) / len(self._kls)
            figures = StepFigures(torch.tensor(self._rewards, dtype=torch.float32), kl)
            changes = self.algorithm.adapted(figures)
            self._use(changes)
        self._version += 1
        self._changes[self._version] = changes
        self._rewards, self._kls = [], []

    def save(self, directory: Path, version: int) -> None:
        """Write the settings of step `version`; earlier steps are forgotten."""
        for old in [known for known in self._changes if known < version]:
            del self._changes[old]
        directory.mkdir(parents=True, exist_ok=True)
        state = {"settings": self._changes[version], "figures": self.figures}
        (directory / STATE).write_bytes(msgspec.json.encode(state))

    def load(self, directory: Path) -> None:
        """Go on with what `save` wrote.

        Raises:
            DataError: it is not there, and the algorithm adapts something from step to step.
        """
        if not (directory / STATE).is_file():
            if not self.algorithm.adapting:
                return
            where, what = str(directory / STATE), "is not there, so what the algorithm has adapted would be lost"
            raise DataError(where, what, "resume from another checkpoint, or begin again with --from-start")
        state = msgspec.json.decode((directory / STATE).read_bytes(), type=dict[str, dict[str, float]])
        known = {name: value for name, value in state["settings"].items() if name in self.algorithm.adapting}
        self._changes[self._version] |= known
        self.figures = state["figures"]
        self._use(self._changes[self._version])

    def _use(self, changes: dict[str, float]) -> None:
        if changes:
            self.algorithm = self._choice.changed(changes).load("algorithm")


def keeps_group(algorithm: Algorithm, group: Referenced, greedy: Referenced | None = None) -> bool:
    """Return whether the algorithm wants to learn this group."""
    if algorithm.is_blank:
        return algorithm.keeps_unseen(group.group_id)
    return algorithm.keeps(advantage_batch(group, greedy=greedy))


def is_cut(sample: Sample) -> bool:
    """Return whether an answer was cut before its end, by a limit of tokens or turns."""
    return sample.finish == "length"


def advantage_batch(
    group: Referenced,
    values: list[FloatArray] | None = None,
    after: list[float] | None = None,
    greedy: Referenced | None = None,
) -> AdvantageBatch:
    """Return what an algorithm takes of one group, and of the greedy response to its prompt."""
    import torch

    from flowrl.algorithms.base import AdvantageBatch

    behaviour_BT, _ = padded([sample.logprobs for sample in group.samples])
    mask_BT, _ = padded([mask_of(sample) for sample in group.samples])
    return AdvantageBatch(
        rewards_B=torch.tensor(group.rewards, dtype=torch.float32),
        mask_BT=mask_BT,
        behaviour_BT=behaviour_BT,
        reference_BT=padded(group.ref_logprobs)[0] if group.ref_logprobs else None,
        values_BT=None if values is None else padded(values)[0],
        placed_BT=None if group.placed is None else padded(group.placed)[0],
        cut_B=torch.tensor([float(is_cut(sample)) for sample in group.samples]),
        greedy=None if greedy is None else advantage_batch(greedy),
        after_B=None if after is None else torch.tensor(after, dtype=torch.float32),
    )


def split_greedy(group: R) -> tuple[R, R | None]:
    """Return a group of the samples to learn, and one of the greedy response where there is one."""
    if not group.num_greedy:
        return group, None
    places = range(len(group.samples))
    sampled, greedy = places[: -group.num_greedy], places[-group.num_greedy :]
    return narrowed(group, sampled, num_greedy=0), narrowed(group, greedy, num_greedy=0)


def group_fields(
    algorithm: Algorithm,
    group: Referenced,
    values: list[FloatArray] | None,
    after: list[float] | None = None,
    greedy: Referenced | None = None,
) -> dict[str, Any]:
    """Return the fields that turn a Referenced group into Samples."""
    if algorithm.is_blank:
        zeros = [sample.logprobs for sample in group.samples]
        return {
            "advantages": zeros,
            **({"returns": zeros, "values": zeros} if values is not None else {}),
            "metrics": {},
        }
    found = algorithm.advantages(advantage_batch(group, values, after, greedy))
    returns = None if found.returns_BT is None else unpadded(found.returns_BT, group)
    return {
        "advantages": unpadded(found.advantages_BT, group),
        "returns": returns,
        "values": None if values is None else [Buffer.floats(row) for row in values],
        "metrics": found.metrics,
    }
