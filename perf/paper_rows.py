"""The paper's rows as graphs and profiles: what `flowrl bench paper` and `flowrl bench scale` simulate.

The data (paper_tables.json) are tables 2 to 6 of the OpenRLHF paper, arXiv 2405.11143: seconds of each stage for 1024
prompts on NVIDIA A800, for DeepSpeed-Chat and for OpenRLHF, and the GPUs of each role. Both systems are given as
settings of graphs/ppo_async.py with one reward model, and a profile whose costs add up to the row's own stages.
Invariant: no cost here has another source than the row, and what the paper does not say is assumed to our cost:

- All responses are equally long, so overlap gains nothing from a long tail.
- The whole of `sync` stops the generators; none of it hides behind decoding.
- The four forwards of `logits_reward` (policy, critic, reference, reward model) are equally much work. OpenRLHF's run
  beside each other, each on its role's GPUs, and the slowest is the stage; DeepSpeed-Chat's one after the other. The
  graph needs no forward of the policy, since the generators' log-probs serve; here the reference takes its time.
- Policy and critic train beside each other in OpenRLHF and one after the other in DeepSpeed-Chat.
- A stage is as many times faster as it has data-parallel replicas; a generator's tokens/s do not depend on how many
  samples it decodes. A frozen model's replica takes as many GPUs as the paper's vLLM engine of that size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from flowrl.config import Config
from flowrl.simulation.costs import CallCost, DecodeCost, NodeProfile, Profile, Spread

TABLES = Path(__file__).with_name("paper_tables.json")
SOURCE = "arXiv 2405.11143"
PROMPT_TOKENS = 32  # the paper gives no lengths; costs are per token of these, so that the figures do not matter
RESPONSE_TOKENS = 32
MESSAGE_S = 0.001  # into a queue or out of it; what ends at one moment then travels on in the prompts' order
FORWARDS = 4  # of one sample before it is learned

System = Literal["dschat", "openrlhf"]
Tree = dict[str, Any]


class Stages(Config):
    """Seconds for one batch of prompts, one stage after the other."""

    generation: float
    sync: float
    logits_reward: float
    training: float
    total: float

    @property
    def bound_s(self) -> float:
        """Return the least that overlap leaves, where nothing hides `sync`; 5, 1, 2, 4 give 6."""
        return max(self.generation, self.logits_reward, self.training) + self.sync


class Engine(Config):
    """A generation engine's shape: `dp` replicas of `tp` GPUs."""

    dp: int
    tp: int
    micro_batch: int


class Roles(Config):
    """GPUs of each role."""

    actor: int
    critic: int
    ref: int
    rm: int
    vllm: Engine


class Row(Config):
    """One size of model."""

    size: str
    gpus: int
    dschat: Stages
    openrlhf: Stages
    speedup: float
    openrlhf_gpus: Roles
    dschat_engine: Engine


class Tables(Config):
    """Everything that paper_tables.json holds."""

    source: str
    rows: tuple[Row, ...]
    hyperparameters: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def batch(self) -> int:
        """Return the prompts that the stages' seconds are for."""
        return int(self.hyperparameters["rollout_batch"])


def read_tables(path: Path = TABLES) -> Tables:
    """Return the paper's tables."""
    return msgspec.json.decode(path.read_bytes(), type=Tables)


def num_messages(tables: Tables, row: Row) -> int:
    """Return the messages that carry one batch: a sample of the simulation stands for a micro-batch of vLLM's.

    Since all responses are equally long, what ends together there ends together here.
    """
    return tables.batch // row.openrlhf_gpus.vllm.micro_batch


def settings(tables: Tables, row: Row, system: System, *, max_staleness: int) -> Tree:
    """Return settings of graphs/ppo_async.py: the paper's batch, and its GPUs for each role."""
    groups = num_messages(tables, row)
    engine = row.openrlhf_gpus.vllm if system == "openrlhf" else row.dschat_engine
    tree: Tree = {
        "reward": {"function": ""},
        "reward_models": ["the paper's"],
        "groups_per_step": groups,
        "max_staleness": max_staleness,
        "sampling": {"max_tokens": RESPONSE_TOKENS},
        "depths": {"reward_model_0": {"rollouts": groups}, "reference": {"scored": groups}},
        "generator": {"group_size": 1, "max_groups": groups // engine.dp, "max_running": groups // engine.dp,
                      "tensor_parallel": engine.tp},
    }  # fmt: skip
    place = _split if system == "openrlhf" else _colocated
    for node, placement in place(row).items():
        tree[node] = {**tree.get(node, {}), "cpus": 0, **placement}
    return tree


def _split(row: Row) -> dict[str, Tree]:
    """Return OpenRLHF's placement: GPUs of its own for each role."""
    roles, each = row.openrlhf_gpus, row.openrlhf_gpus.vllm.tp
    own = {"share": "", "gpus": 1}
    return {
        "generator": {"replicas": roles.vllm.dp, "gpus": each},
        "reward_model": {"share": "", "replicas": roles.rm // each, "gpus": each},
        "reference": {"share": "", "replicas": roles.ref // each, "gpus": each},
        "critic": {**own, "ranks": roles.critic},
        "learner": {**own, "ranks": roles.actor},
    }


def _colocated(row: Row) -> dict[str, Tree]:
    """Return DeepSpeed-Chat's placement: every GPU to each role in its turn."""
    on_learner = {"share": "learner", "gpus": 0}
    return {
        "generator": {**on_learner, "replicas": row.dschat_engine.dp},
        "reward_model": on_learner,
        "reference": on_learner,
        "critic": on_learner,
        "learner": {"ranks": row.gpus, "gpus": 1},
    }


def profile(tables: Tables, row: Row, system: System) -> Profile:
    """Return the costs of a row's stages on its own placement."""
    stages: Stages = getattr(row, system)
    roles, each = row.openrlhf_gpus, row.openrlhf_gpus.vllm.tp
    if system == "openrlhf":
        slowest = stages.logits_reward * min(roles.actor, roles.critic, roles.ref, roles.rm)  # GPU-seconds of a forward
        dp, training_s, learner_ranks, critic_ranks = roles.vllm.dp, stages.training, roles.actor, roles.critic
        reward_s = reference_s = slowest / each  # of one replica
        value_s = slowest / roles.critic
    else:
        dp, training_s, learner_ranks, critic_ranks = row.dschat_engine.dp, stages.training / 2, row.gpus, 1
        reward_s = value_s = stages.logits_reward / FORWARDS
        reference_s = 2 * stages.logits_reward / FORWARDS
    num = num_messages(tables, row)
    tokens = num * (PROMPT_TOKENS + RESPONSE_TOKENS)
    decode = DecodeCost(sample_s=stages.generation * dp / (num * RESPONSE_TOKENS))

    def of(seconds: float) -> CallCost:
        return CallCost(token_s=seconds / tokens)

    return Profile(
        format=1,
        machine=f"{row.size} on {row.gpus} A800, from the tables of {SOURCE}",
        message_s=MESSAGE_S,
        prompt_tokens=Spread(quantiles=(PROMPT_TOKENS,)),
        response_tokens=Spread(quantiles=(RESPONSE_TOKENS,)),
        nodes={
            "generator": NodeProfile(decode=decode, calls={"update_pause": CallCost(call_s=stages.sync)}),
            "reward_model_0": NodeProfile(calls={"score": of(reward_s)}),
            "reference": NodeProfile(calls={"score": of(reference_s)}),
            "critic": NodeProfile(calls={"score": of(value_s), "train": of(training_s)}, ranks=critic_ranks),
            "learner": NodeProfile(calls={"train": of(training_s)}, ranks=learner_ranks),
        },
    )
