"""The DeepSpeed-Chat-style baseline: every model on every device, one stage after the other, padded batches.

A step is what DeepSpeed-Chat's step 3 does with one generation batch and one epoch: prompts are padded on the left to
P, Hugging Face `generate` samples up to N tokens for all of them and waits for the longest, four forwards over the
padded width score them (policy, reference, critic, reward model), then the policy takes its step and the critic its
own. The design is theirs, the rest is as quick as plain PyTorch has it: KV cache, SDPA, inference mode, logits of the
response positions only, prompts padded no further than asked, generation that ends when the last response has, no
waiting for a switch of engines. AdamW works on float32 copies of bfloat16 weights as DeepSpeed's does.

With several ranks (RANK in the environment) the batch is split and gradients are summed, as data parallelism does it.
perf/dschat_baseline.py starts it as `python -m perf.dschat_loop ORDER.json ANSWER.json`.

Shapes: B sequences, P prompt positions, T response tokens, L = P + T, N generated at most, V vocabulary.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec
import torch
import torch.distributed as dist

from flowrl.data.prompts import load_prompts, load_tokenizer
from flowrl.engines.base import TrainingConfig
from flowrl.engines.models import choose_dtype, load_model
from flowrl.engines.vllm_settings import stop_token_ids
from flowrl.errors import ConfigError
from perf.dschat_baseline import Order
from perf.dschat_losses import advantages_and_returns, policy_loss_sum, step_rewards, value_loss_sum
from perf.dschat_workload import StepTimes

if TYPE_CHECKING:
    from torch import Tensor

BETAS = (0.9, 0.95)  # as flowrl's learners
MAX_GRAD_NORM = 1.0


class Batch(NamedTuple):
    """What is known of one rank's sequences, each of the last four [B, T]."""

    ids_BL: Tensor
    attended_BL: Tensor
    mask_BT: Tensor
    logprobs_BT: Tensor
    values_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor


class Trained:
    """A model that is trained: AdamW over float32 copies of its parameters."""

    def __init__(self, model: Any, lr: float) -> None:
        self.model = model
        self._live = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._masters = [parameter.detach().float().clone() for parameter in self._live]
        self._optimizer = torch.optim.AdamW(self._masters, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Sum the gradients over ranks, clip, step, copy the weights back."""
        for live, master in zip(self._live, self._masters, strict=True):
            master.grad = torch.zeros_like(master) if live.grad is None else live.grad.float()
            live.grad = None
            if dist.is_initialized():
                dist.all_reduce(master.grad)
        torch.nn.utils.clip_grad_norm_(self._masters, MAX_GRAD_NORM)
        self._optimizer.step()
        for live, master in zip(self._live, self._masters, strict=True):
            live.copy_(master)


class Baseline:
    """One rank of the serial system."""

    def __init__(self, order: Order, *, rank: int = 0) -> None:
        self.order, self.work = order, order.work
        self._rank = rank
        torch.set_num_threads(order.threads)
        torch.manual_seed(self.work.seed * order.ranks + rank)
        self.device = torch.device("cuda", rank) if self.work.gpus else torch.device("cpu")
        tokenizer = load_tokenizer(Path(self.work.model))
        self._prompts = load_prompts(self.work.data, tokenizer)
        self._stops = torch.tensor(stop_token_ids(self.work.model, tokenizer), device=self.device)
        pad: Any = self._stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._pad = int(pad)
        self.policy = Trained(self._load(self.work.model, "policy"), self.work.lr)
        self.critic = Trained(self._load(self.work.model, "value"), self.work.critic_lr)
        self.reference = self._load(self.work.model, "policy").requires_grad_(False)
        self.reward = self._load(self.work.reward_model, "reward").requires_grad_(False)
        self._sampling = self._generation_config()
        self._at_s = 0.0

    def _load(self, directory: str, head: Literal["policy", "value", "reward"]) -> Any:
        dtype = choose_dtype(self.work.dtype, self.device)
        config = TrainingConfig(model=directory, head=head)
        return load_model(config, where="baseline", dtype=dtype, device=self.device).eval()

    def _generation_config(self) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=True,
            temperature=self.work.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.work.max_tokens,
            eos_token_id=None if self.work.mode == "fixed" else self._stops.tolist(),
            pad_token_id=self._pad,
            use_cache=True,
            cache_implementation="static" if self.order.cache == "static" else None,
            disable_compile=True,
        )

    def step(self, number: int) -> StepTimes:
        """Do one whole step on the prompts that flowrl's step `number` has."""
        start_s = self._lap_from()
        ids_BP, attended_BP = self.prompts(number)
        prepared_s = self._lap()
        ids_BL, attended_BL, mask_BT = self.generate(ids_BP, attended_BP)
        generation_s = self._lap()
        scored = self.score(ids_BL, attended_BL, mask_BT)
        scoring_s = self._lap()
        batch = self.credit(ids_BL, attended_BL, mask_BT, *scored)
        credited_s = self._lap()
        self.train(batch)
        training_s = self._lap()
        lengths, fed_tokens = self._of_all_ranks(mask_BT, ids_BL.numel())
        return StepTimes(
            wall_s=self._at_s - start_s,
            generation_s=generation_s,
            scoring_s=scoring_s,
            training_s=training_s,
            other_s=prepared_s + credited_s,
            samples=len(lengths),
            tokens=sum(lengths),
            lengths=lengths,
            fed_tokens=fed_tokens,
        )

    def _of_all_ranks(self, mask_BT: Tensor, fed_tokens: int) -> tuple[tuple[int, ...], int]:
        """Return the lengths of the step's responses and the tokens that one scoring forward was fed."""
        mine = (mask_BT.sum(1).long().tolist(), fed_tokens)
        parts: list[Any] = [mine]
        if dist.is_initialized():
            parts = [None] * self.order.ranks
            dist.all_gather_object(parts, mine)
        return tuple(length for lengths, _ in parts for length in lengths), sum(fed for _, fed in parts)

    def _lap_from(self) -> float:
        self._at_s = time.perf_counter()
        return self._at_s

    def _lap(self) -> float:
        """Return the seconds since the last call, the device's work done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before_s = self._at_s
        return self._lap_from() - before_s

    def prompts(self, number: int) -> tuple[Tensor, Tensor]:
        """Return this rank's prompts of a step, padded on the left, and their attention mask; both [B, P]."""
        first = number * self.work.groups
        groups = [self._prompts.row_at(first + place).token_ids for place in range(self.work.groups)]
        rows = [row for row in groups for _ in range(self.work.group_size)][self._rank :: self.order.ranks]
        width = self.order.padding or max(map(len, rows))
        if max(map(len, rows)) > width:
            raise ConfigError("--padding", f"{width}, but a prompt has {max(map(len, rows))} tokens", "raise it")
        ids_BP = torch.tensor([[self._pad] * (width - len(row)) + row for row in rows], device=self.device)
        lengths_B1 = torch.tensor([[len(row)] for row in rows], device=self.device)
        return ids_BP, (torch.arange(width, device=self.device) >= width - lengths_B1).long()

    def generate(self, ids_BP: Tensor, attended_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sample responses; returns the sequences [B, L], their attention mask and the responses' mask [B, T]."""
        model = self.policy.model
        model.generation_config = self._sampling  # else what its directory says fills in what is None here
        with torch.inference_mode():
            drawn_BL = model.generate(ids_BP, attention_mask=attended_BP, generation_config=self._sampling)
        ids_BL = drawn_BL.clone()  # a tensor that may take part in a backward
        response_BT = ids_BL[:, ids_BP.shape[1] :]
        if self.work.mode == "fixed":
            mask_BT = torch.ones(response_BT.shape, device=self.device)
        else:
            is_stop_BT = torch.isin(response_BT, self._stops)
            mask_BT = (is_stop_BT.cumsum(1) - is_stop_BT.long() == 0).float()
        return ids_BL, torch.cat((attended_BP, mask_BT.long()), 1), mask_BT

    def score(self, ids_BL: Tensor, attended_BL: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log-probs, the reference's, values, each [B, T], and scores [B]: four forwards over the width."""
        found: list[tuple[Tensor, ...]] = []
        num_tokens = mask_BT.shape[1]
        with torch.inference_mode():
            for ids, attended, mask in _chunks(self.order.score_rows, ids_BL, attended_BL, mask_BT):
                logprobs_BT = self.logprobs(self.policy.model, ids, attended, num_tokens)
                reference_BT = self.logprobs(self.reference, ids, attended, num_tokens)
                values_BT = self.values(ids, attended, num_tokens)
                found.append((logprobs_BT, reference_BT, values_BT, self.scores(ids, attended, mask)))
        logprobs_BT, reference_BT, values_BT, scores_B = (torch.cat(parts) for parts in zip(*found, strict=True))
        return logprobs_BT.clone(), reference_BT.clone(), values_BT.clone(), scores_B.clone()

    def logprobs(self, model: Any, ids_BL: Tensor, attended_BL: Tensor, num_tokens: int) -> Tensor:
        """Return the log-probs of the last `num_tokens` tokens of every sequence, [B, T] float32."""
        output = model(**_inputs(ids_BL, attended_BL), logits_to_keep=num_tokens)
        logits_BTV = output.logits.float()
        if self.work.temperature != 1.0:
            logits_BTV = logits_BTV / self.work.temperature
        targets_BT = ids_BL[:, -num_tokens:]
        return -torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), targets_BT, reduction="none")

    def values(self, ids_BL: Tensor, attended_BL: Tensor, num_tokens: int) -> Tensor:
        """Return the critic's value before each of the last `num_tokens` tokens, [B, T] float32."""
        model = self.critic.model
        states_BLH = model.base_model(**_inputs(ids_BL, attended_BL)).last_hidden_state
        return model.score(states_BLH[:, -num_tokens:]).squeeze(-1).float()

    def scores(self, ids_BL: Tensor, attended_BL: Tensor, mask_BT: Tensor) -> Tensor:
        """Return the reward model's value at each sequence's last token, [B] float32."""
        inputs = {"input_ids": ids_BL, "attention_mask": attended_BL, "position_ids": _positions(attended_BL)}
        states_BLH = self.reward.base_model(**inputs, use_cache=False).last_hidden_state
        last_B = ids_BL.shape[1] - mask_BT.shape[1] + mask_BT.sum(1).long() - 1
        rows_B = torch.arange(len(ids_BL), device=self.device)
        return self.reward.score(states_BLH[rows_B, last_B]).squeeze(-1).float()

    def credit(self, ids_BL: Tensor, attended_BL: Tensor, mask_BT: Tensor, logprobs_BT: Tensor, reference_BT: Tensor,
               values_BT: Tensor, scores_B: Tensor) -> Batch:  # fmt: skip
        """Return what the sequences are trained with."""
        rewards_BT = step_rewards(scores_B, logprobs_BT, reference_BT, mask_BT)
        advantages_BT, returns_BT = advantages_and_returns(rewards_BT, values_BT, mask_BT)
        return Batch(ids_BL, attended_BL, mask_BT, logprobs_BT, values_BT, advantages_BT, returns_BT)

    def train(self, batch: Batch) -> None:
        """Take the policy's step, then the critic's."""
        count = batch.mask_BT.sum()
        if dist.is_initialized():
            dist.all_reduce(count)
        num_tokens = batch.mask_BT.shape[1]
        for part in map(Batch._make, _chunks(self.order.train_rows, *batch)):
            logprobs_BT = self.logprobs(self.policy.model, part.ids_BL, part.attended_BL, num_tokens)
            loss = policy_loss_sum(logprobs_BT, part.logprobs_BT, part.advantages_BT, part.mask_BT)
            (loss / count).backward()
        self.policy.step()
        for part in map(Batch._make, _chunks(self.order.train_rows, *batch)):
            values_BT = self.values(part.ids_BL, part.attended_BL, num_tokens)
            (value_loss_sum(values_BT, part.values_BT, part.returns_BT, part.mask_BT) / count).backward()
        self.critic.step()


def _positions(attended_BL: Tensor) -> Tensor:
    """Return each token's place among the attended ones; `[[0, 0, 1, 1]]` gives `[[0, 0, 0, 1]]`."""
    return (attended_BL.cumsum(1) - 1).clamp_min(0)


def _inputs(ids_BL: Tensor, attended_BL: Tensor) -> dict[str, Any]:
    """Return a forward's arguments for reading before each token: the last token is not fed."""
    inputs = {"input_ids": ids_BL, "attention_mask": attended_BL, "position_ids": _positions(attended_BL)}
    return {**{name: tensor[:, :-1] for name, tensor in inputs.items()}, "use_cache": False}


def _chunks(rows: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return the tensors cut into parts of at most so many rows."""
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def run(order: Order, *, rank: int = 0) -> list[StepTimes]:
    """Return every step's times on this rank, those of the warm-up first."""
    baseline = Baseline(order, rank=rank)
    return [baseline.step(number) for number in range(order.work.warmup + order.work.steps)]


def main(argv: list[str]) -> int:
    """Carry out the order in a file and write the answer of rank 0 into another."""
    order_path, answer_path = map(Path, argv)
    order = msgspec.json.decode(order_path.read_bytes(), type=Order)
    rank = int(os.environ.get("RANK", "0"))
    if order.ranks > 1:
        backend = "nccl" if order.work.gpus else "gloo"
        store = f"file://{answer_path.with_suffix('.store')}"
        dist.init_process_group(backend, init_method=store, rank=rank, world_size=order.ranks)
    times = run(order, rank=rank)
    if rank == 0:
        answer_path.write_bytes(msgspec.json.encode(times))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
