"""What the critic and the advantage node share: loading an algorithm and crediting one group with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowrl.errors import ConfigError
from flowrl.messages import Buffer, Referenced
from flowrl.stages.tokens import padded, unpadded

if TYPE_CHECKING:
    from flowrl.algorithms.base import Algorithm
    from flowrl.config import Select
    from flowrl.messages import FloatArray


def load_algorithm(choice: Select, *, group_size: int, has_critic: bool) -> Algorithm:
    """Load an algorithm and check that the graph gives it what it needs.

    Raises:
        ConfigError: it needs a critic or a group of samples that the graph does not have, or an option is wrong.
    """
    from flowrl.algorithms.base import Algorithm

    algorithm = choice.load("algorithm")
    if not isinstance(algorithm, Algorithm):
        raise ConfigError("algorithm", f"{choice.use} is not an Algorithm", "subclass flowrl.algorithms.base:Algorithm")
    if algorithm.needs_critic and not has_critic:
        raise ConfigError("algorithm", f"{choice.use} needs a critic, which this graph does not have",
                          "use graphs/ppo_async.py")  # fmt: skip
    if algorithm.needs_group and group_size < 2:
        what = f"{choice.use} compares the samples of a group, but group_size is {group_size}"
        raise ConfigError("generator.group_size", what, "set it to 2 or more")
    return algorithm


def keeps_group(algorithm: Algorithm, group: Referenced) -> bool:
    """Return whether the algorithm wants to learn this group."""
    import torch

    return algorithm.keeps(torch.tensor(group.rewards, dtype=torch.float32))


def credit_group(algorithm: Algorithm, group: Referenced, values: list[FloatArray] | None) -> dict[str, Any]:
    """Return the fields that turn a Referenced group into Samples."""
    import torch

    from flowrl.algorithms.base import CreditBatch

    behaviour_BT, mask_BT = padded([sample.logprobs for sample in group.samples])
    reference_BT, _ = padded(group.ref_logprobs)
    credited = algorithm.credit(
        CreditBatch(
            rewards_B=torch.tensor(group.rewards, dtype=torch.float32),
            mask_BT=mask_BT,
            behaviour_BT=behaviour_BT,
            reference_BT=reference_BT,
            values_BT=None if values is None else padded(values)[0],
        )
    )
    returns = None if credited.returns_BT is None else unpadded(credited.returns_BT, group)
    return {
        "advantages": unpadded(credited.advantages_BT, group),
        "returns": returns,
        "values": None if values is None else [Buffer.floats(row) for row in values],
        "metrics": credited.metrics,
    }
