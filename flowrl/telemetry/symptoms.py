"""Early warnings: what a run's figures show before its held-out score does, each told with its numbers and a remedy.

A symptom is a pure function of the steps so far (and the evaluations), oldest first, that returns a sentence or "".
Figures of single steps are noisy, so means over WINDOW steps are compared. `Symptoms` is the sink that asks them after
each step; what it finds is told once, and again only where it has gone and come back. It keeps the first steps and
evaluations and the newest, so its size does not grow with the length of the run.

Tests: tests/unit/telemetry/test_symptoms.py
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING

import msgspec

from flowrl.telemetry.events import Evaluation, Step
from flowrl.telemetry.intervals import paired_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from flowrl.telemetry.events import Event

WINDOW = 5  # steps; fewer are noise
MAX_KL = 0.05  # nats a token to the reference; a run that stays near it is below
MIN_ENTROPY = 0.2  # of what it was
MAX_DRIFT = 2.0  # times, or one so many-th, of the length that it was
MAX_IDLE = 0.7  # share of groups
ROUNDED = 1e-9  # of their mean, what equal rewards spread by rounding
MIN_SPREAD = 1e-4  # of rewards; whitening adds as much to their deviation
MAX_CUT = 0.5  # share of answers
NEARLY_ALL = 0.9  # share of a single step's answers: no noise
MAX_CLIPPED = 0.1  # share of scores
MIN_EXPLAINED = 0.05  # of the returns' variance
FIRST_STEPS = 5 * WINDOW  # kept: what a run began with
NEWEST_STEPS = 40 * WINDOW  # kept besides; a figure may be missing in many
MOST_EVALUATIONS = 20  # kept beside the first
CRITIC_STEPS = 10  # that a critic is given before it is judged


def recent(steps: Sequence[Step], name: str, *, ago: int = 0) -> float | None:
    """Return a figure's mean over WINDOW steps, the last or those `ago` windows before; None where there are fewer."""
    values = [step.metrics[name] for step in steps if name in step.metrics]
    end = len(values) - ago * WINDOW
    return fmean(values[end - WINDOW : end]) if end >= WINDOW else None


def at_first(steps: Sequence[Step], name: str) -> float | None:
    """Return a figure's mean over its first WINDOW steps; None where none has followed them yet."""
    values = [step.metrics[name] for step in steps if name in step.metrics]
    return fmean(values[:WINDOW]) if len(values) >= 2 * WINDOW else None


def kl_growth(steps: Sequence[Step]) -> str:
    """Say that the policy leaves the reference, in a few steps or faster and faster over many."""
    now, length = recent(steps, "kl"), recent(steps, "response_tokens.mean")
    if now is None or not length or now / length <= MAX_KL:
        return ""
    for ago in (1, 2, 4, 8, 16, 32):
        before, middle = recent(steps, "kl", ago=ago), recent(steps, "kl", ago=ago // 2)
        if before is None or middle is None:
            return ""
        slows_down = ago > 1 and (now - middle < 0.8 * (middle - before) or now / length <= 2 * MAX_KL)
        if now > 2.0 * max(before, 0.0) and not slows_down:
            found = f"the KL to the reference has grown from {before:.2f} to {now:.2f} nats a sample"
            found += "" if ago == 1 else f" in {ago * WINDOW} steps, and grows no slower"
            return f"{found}, {now / length:.2f} a token; raise algorithm.kl.coef or lower learner.lr"
    return ""


def entropy_collapse(steps: Sequence[Step]) -> str:
    """Say that the policy samples hardly anything but one answer any more."""
    first, now = at_first(steps, "sampled_entropy"), recent(steps, "sampled_entropy")
    if first is None or now is None or now >= MIN_ENTROPY * first:
        return ""
    found = f"the entropy of what is sampled has fallen from {first:.2f} to {now:.2f} nats a token"
    return f"{found}: soon all samples of a group are the same; set algorithm.entropy_coef or raise clip_high"


def length_drift(steps: Sequence[Step]) -> str:
    """Say that answers have become much longer or shorter."""
    first, now = at_first(steps, "response_tokens.mean"), recent(steps, "response_tokens.mean")
    if first is None or now is None or first / MAX_DRIFT <= now <= first * MAX_DRIFT:
        return ""
    found = f"answers have gone from {first:.0f} to {now:.0f} tokens"
    return f"{found}: read some (flowrl inspect RUN) and see whether the reward pays for length"


def equal_rewards(steps: Sequence[Step]) -> str:
    """Say that every sample earns the same, whatever it says: a critic's values then still give advantages."""
    spread, mean = recent(steps, "reward.std"), recent(steps, "reward.mean")
    if spread is None or mean is None or spread > ROUNDED * abs(mean):
        return ""
    found = f"every sample of the last {WINDOW} steps has earned {mean:g}"
    return f"{found}, so that no answer is better than another; read some (flowrl inspect RUN) and see what scores them"


def tiny_rewards(steps: Sequence[Step]) -> str:
    """Say that rewards hardly differ, so that penalties and epsilons count for more than they do."""
    spread, unit = recent(steps, "reward.std"), recent(steps, "shaping.std") or 1.0
    if spread is None or spread / unit >= MIN_SPREAD or equal_rewards(steps):
        return ""
    found = f"rewards differ by {spread:.1g} only (reward.std), less than a penalty or the epsilons of a division"
    return f"{found}; have the reward give more, or set algorithm.shaping.std={spread:.1g}"


def idle_groups(steps: Sequence[Step]) -> str:
    """Say that most groups teach nothing."""
    share = recent(steps, "groups.idle")
    if share is None or share <= MAX_IDLE:
        return ""
    found = f"{share:.0%} of the groups teach nothing: their samples are all worth the same"
    return f"{found}; take prompts that are neither too easy nor too hard, a finer reward, or a larger group_size"


def cut_answers(steps: Sequence[Step]) -> str:
    """Say that most answers are cut before their end."""
    newest = steps[-1].metrics.get("response_tokens.cut", 0.0) if steps else 0.0
    share = newest if newest >= NEARLY_ALL else recent(steps, "response_tokens.cut")
    if share is None or share <= MAX_CUT:
        return ""
    found = f"{share:.0%} of the answers are cut at their limit of tokens or turns and scored without an end"
    return f"{found}; raise sampling.max_tokens, or set algorithm.mask_cut or shaping.cut_penalty"


def clipped_scores(steps: Sequence[Step]) -> str:
    """Say that many scores are clipped, so that they do not differ."""
    share = recent(steps, "reward.clipped")
    if share is None or share <= MAX_CLIPPED:
        return ""
    return (
        f"{share:.0%} of the scores are clipped and teach no difference; raise algorithm.shaping.clip, or set it to 0"
    )


def idle_critic(steps: Sequence[Step]) -> str:
    """Say that the critic's values say hardly more of the returns than their mean does."""
    name = "critic.explained_variance"
    share = recent(steps, name)
    if share is None or share >= MIN_EXPLAINED or sum(name in step.metrics for step in steps) < CRITIC_STEPS:
        return ""
    found = f"the critic explains {share:.2f} of the returns' variance: advantages are returns less a constant"
    return f"{found}; raise critic.minibatches, critic.epochs or critic.lr, or take graphs/group_async.py"


def reward_hacking(rewards: Mapping[int, float | None], evaluations: Sequence[Evaluation]) -> str:
    """Say that the training reward, by version, rises while the held-out score falls beyond its interval."""
    if len(evaluations) < 2:
        return ""
    last = evaluations[-1]
    now = rewards[last.version]
    for earlier in evaluations[:-1]:
        change, before = paired_interval(earlier.scores, last.scores), rewards[earlier.version]
        if change is None or now is None or before is None or change.high >= 0 or now <= before:
            continue
        found = (
            f"the training reward has risen from {before:.3f} to {now:.3f} since version {earlier.version} while the "
        )
        found += f"held-out score fell by {-change.mean:.3f} [{-change.high:.3f}, {-change.low:.3f}]"
        return f"{found}: the reward pays for something else; read rollouts of high reward"
    return ""


def up_to(steps: Sequence[Step], version: int) -> list[Step]:
    """Return the steps that made the versions up to this one."""
    return [step for step in steps if step.version <= version]


SYMPTOMS: tuple[Callable[[Sequence[Step]], str], ...] = (
    kl_growth, entropy_collapse, length_drift, equal_rewards, tiny_rewards, idle_groups, cut_answers, clipped_scores,
    idle_critic,
)  # fmt: skip


class Symptoms:
    """Asks every symptom after each step and warns of those that are new."""

    def __init__(self, warn: Callable[[str, str], None]) -> None:
        self._warn = warn
        self._steps: list[Step] = []
        self._evaluations: list[Evaluation] = []
        self._rewards: dict[int, float | None] = {}  # of late, at the version of each evaluation
        self._told: dict[str, int] = {}  # how often each that was told has not been found since

    def recall(self, events: Iterable[Event]) -> None:
        """Take in what came before in a resumed run; what it shows is told with the first step that follows."""
        for event in events:
            self._take(event)

    def consume(self, events: list[Event]) -> None:
        """Take in steps and evaluations; after a rollback those of the lost versions are forgotten."""
        for event in events:
            if self._take(event):
                self._ask()

    def _take(self, event: Event) -> bool:
        if isinstance(event, Step):
            self._steps = [*up_to(self._steps, event.version - 1), msgspec.structs.replace(event, staleness=[])]
            del self._steps[FIRST_STEPS:-NEWEST_STEPS]
            if event.version in self._rewards:  # it was evaluated before its step was told
                self._rewards[event.version] = recent(self._steps, "reward.mean")
        elif isinstance(event, Evaluation):
            before = [e for e in self._evaluations if e.version < event.version]
            self._evaluations = [*before, msgspec.structs.replace(event, completions=[])]
            del self._evaluations[1:-MOST_EVALUATIONS]
            self._rewards[event.version] = recent(up_to(self._steps, event.version), "reward.mean")
            self._rewards = {e.version: self._rewards[e.version] for e in self._evaluations}
        return isinstance(event, Step | Evaluation)

    def close(self) -> None:
        """Do nothing: warnings are told as they are found."""

    def _ask(self) -> None:
        found = {symptom.__name__: symptom(self._steps) for symptom in SYMPTOMS}
        found["reward_hacking"] = reward_hacking(self._rewards, self._evaluations)
        for name, text in found.items():
            if text and name not in self._told:
                self._warn("learner", text)
            self._told[name] = 0 if text else self._told.get(name, WINDOW) + 1
        self._told = {name: times for name, times in self._told.items() if times < WINDOW}
