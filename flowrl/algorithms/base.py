"""What an algorithm is: pure functions of tensors, `advantages` and `loss`, held in a frozen Config.

Shapes: B sequences of one batch, T response tokens (right-padded); `mask_BT` is 1 on the tokens the policy sampled.

Invariants:
- nothing here reads a clock, a file, a random generator or a message;
- what stands under mask 0 never changes a result;
- a loss returns a sum and a count so that packing, padding, micro-batches and ranks cannot change what the engine
  divides once (law 7).

The critic and the advantage stage call `advantages`, training engines `loss`.

Tests: tests/contracts/test_algorithms.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from flowrl.config import Config, changed
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Head = Literal["policy", "value", "reward"]  # log-probs; values read before each token; values read after it
# What an example shows: responses to imitate, one better than another, single ones judged good or bad, judged steps.
Lesson = Literal["demonstrations", "pairs", "labelled responses", "labelled steps"]
Direction = Literal["forward", "reverse", "jsd"]  # of the divergence between teacher and student
REMEDIES = {  # for a column that is not there
    "drift_limit": "the learner gives it; a loss of your own asks for it with needs_drift",
    "reference": "use a graph with a reference node, such as graphs/preference.py",
    "label": "give every response a label in the data",
    "step_label": "give step labels in the data",
}


class AdvantageBatch(NamedTuple):
    """One group: B samples of one prompt, all float32."""

    rewards_B: Tensor
    mask_BT: Tensor
    behaviour_BT: Tensor  # log-probs of the sampling policy
    reference_BT: Tensor | None = None  # log-probs of the frozen reference
    values_BT: Tensor | None = None
    placed_BT: Tensor | None = None  # what part of a sample's reward was earned at which token; the rest is the last's
    cut_B: Tensor | None = (
        None  # 1 where an answer was cut before its end, by a limit of tokens or turns; None: nowhere
    )
    greedy: AdvantageBatch | None = None  # the greedy response to the prompt, one row; None: it was not sampled
    after_B: Tensor | None = None  # of cut answers the value behind their last token, 0 for others; None: not measured


class Advantages(NamedTuple):
    """What each token is worth; advantages are not yet whitened over the step."""

    advantages_BT: Tensor
    returns_BT: Tensor | None
    metrics: dict[str, float]


class StepFigures(NamedTuple):
    """What an algorithm may adapt to: one step's samples, in prompt order."""

    rewards_B: Tensor  # before shaping
    kl: float  # mean over samples of the sum over tokens of log(pi_old / pi_ref); nan without a reference


class MissingColumnError(ConfigError):
    """A loss reads a column that neither the data nor the graph gives it."""


class LossBatch(NamedTuple):
    """A micro-batch; `logprobs_BT` and `entropy_BT` carry gradient, the rest does not."""

    logprobs_BT: Tensor  # the policy's log-probs; for a value objective, the values
    mask_BT: Tensor
    # name -> [B, T]: behaviour, reference, advantages, age, drift_limit, values, returns; label, step_label,
    # reference_point; proximal, the policy at the start of the step, where that is not the one of `logprobs_BT`
    columns: dict[str, Tensor]
    entropy_BT: Tensor | None = None
    group_B: Tensor | None = None  # int64: which group a row belongs to, numbered within the engine's call
    sample_B: Tensor | None = None  # int64: which response of its group a row is
    divergence_BT: Tensor | None = None  # KL between a teacher's and the policy's distribution; carries gradient

    def column(self, name: str) -> Tensor:
        """Return a column.

        Raises:
            MissingColumnError: neither the data nor the graph gives it.
        """
        if name not in self.columns:
            given = ", ".join(sorted(self.columns)) or "none"
            raise MissingColumnError("objective", f"needs the column {name!r} (given: {given})", REMEDIES.get(name, ""))
        return self.columns[name]


@dataclass(frozen=True)
class Loss:
    """A sum and what to divide it by, both over this micro-batch; metrics likewise as (sum, count)."""

    total: Tensor
    count: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]]


class Objective(Config):
    """Something to minimise over a micro-batch."""

    @property
    def learns_from(self) -> Lesson:
        """Return the one kind of examples that the loss is meant for; a run with others is refused."""
        return "demonstrations"

    @property
    def head(self) -> Head:
        """Return what `logprobs_BT` is read off: a language model's log-probs, or one value per token."""
        return "policy"

    @property
    def needs_entropy(self) -> bool:
        """Return whether `entropy_BT` must be given."""
        return False

    @property
    def temperature(self) -> float | None:
        """Return what logits are divided by; None: what the samples were drawn with."""
        return None

    @property
    def teacher_model(self) -> str:
        """Return a frozen model whose distribution the loss compares with the policy's; "": none."""
        return ""

    @property
    def divergence(self) -> Direction:
        """Return which way round the KL to the teacher goes, or that it is the Jensen-Shannon divergence."""
        return "forward"

    @property
    def teacher_share(self) -> float:
        """Return the teacher's share in the mixture of the Jensen-Shannon divergence."""
        return 0.5

    @property
    def is_beside(self) -> bool:
        """Return whether its gradient is added to another loss's, which brings the router loss for both."""
        return False

    @property
    def needs_whole_groups(self) -> bool:
        """Return whether `loss` compares the responses of a group, so that a micro-batch must hold all of them."""
        return False

    @property
    def needs_mismatched(self) -> bool:
        """Return whether each example must bring another prompt's response, from which a step's KL is estimated."""
        return False

    @property
    def gives_score(self) -> bool:
        """Return whether a response's score is the value at its last token, whose mean and std a checkpoint states."""
        return False

    @property
    def score_metric(self) -> str:
        """Return the metric that is a held-out example's score, greater being better; "": the negative loss."""
        return ""

    @property
    def needs_proximal(self) -> bool:
        """Return whether, in a step of several updates, the loss needs the policy at the start of the step."""
        return False

    @property
    def needs_drift(self) -> bool:
        """Return whether each update needs the column "drift_limit", from log-probs of the whole of it."""
        return False

    def drift_limit(self, log_ratios_N: Tensor, advantages_N: Tensor) -> float:
        """Return the column "drift_limit" from log(pi / pi_old) and the advantages of an update's sampled tokens."""
        raise NotImplementedError

    @property
    def leaves_out_cut(self) -> bool:
        """Return whether answers that were cut before their end are not learned from."""
        return False

    def idle_settings(self, num_updates: int, *, is_fresh: bool = False) -> list[str]:
        """Return which settings have no effect, and why, where a version takes so many optimizer steps.

        `is_fresh`: the version that learns a sample is the one that sampled it.
        """
        return []

    def changed(self, *names: str) -> list[str]:
        """Return those of the settings that are not as they come."""
        return changed(self, names)

    def reference_point(self, log_ratios: Sequence[float]) -> float:
        """Return the column "reference_point" from the summed log ratios of a step's mismatched pairs."""
        raise NotImplementedError

    def loss(self, batch: LossBatch) -> Loss:
        """Return the loss of a micro-batch as a sum and a count."""
        raise NotImplementedError


class Algorithm(Objective):
    """An online algorithm: what each token is worth and what the policy minimises."""

    @property
    def needs_critic(self) -> bool:
        """Return whether `advantages` needs values."""
        return False

    @property
    def needs_group(self) -> bool:
        """Return whether `advantages` compares the samples of a group, so that one sample is not enough."""
        return False

    @property
    def needs_greedy(self) -> bool:
        """Return whether `advantages` needs the greedy response to the prompt."""
        return False

    @property
    def whitens(self) -> bool:
        """Return whether advantages are whitened over every token of the step before the loss."""
        return False

    @property
    def needs_full_sampling(self) -> bool:
        """Return whether samples drawn with top-p or top-k would bias the loss, for nothing in it weighs them."""
        return False

    @property
    def needs_after(self) -> bool:
        """Return whether `advantages` needs the value behind an answer that was cut."""
        return False

    @property
    def adapting(self) -> tuple[str, ...]:
        """Return the settings, by path, that change from step to step."""
        return ()

    def adapted(self, figures: StepFigures) -> dict[str, float]:
        """Return the next step's values of the settings in `adapting`, from this step's figures."""
        return {}

    @property
    def is_blank(self) -> bool:
        """Return whether every advantage is zero, as in a simulation: then no tensor is made."""
        return False

    def keeps_unseen(self, group_id: int) -> bool:
        """Return whether a group is worth learning, asked of a blank algorithm, for which no rewards are read."""
        return True

    def keeps(self, batch: AdvantageBatch) -> bool:
        """Return whether a group is worth learning; the others are filtered. There are no values yet."""
        return True

    def advantages(self, batch: AdvantageBatch) -> Advantages:
        """Return what each token of one group is worth."""
        raise NotImplementedError
