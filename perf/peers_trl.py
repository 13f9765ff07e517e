"""TRL's side of `flowrl bench peers`: GRPOTrainer, SFTTrainer or DPOTrainer for a few steps, each step timed.

Started as `python -m perf.peers_trl ORDER.json ANSWER.json` by a Python that has the extra `peers`. The trainers are
TRL's own, untouched: a callback reads the clock after each optimizer step, and the collator is wrapped to count the
tokens that are fed and those that are padding. TRL is given what costs it least here: no gradient checkpointing, no
logging, no saving, its fused AdamW, and of the ways to hold the weights the caller takes the quickest.
"""

from __future__ import annotations

import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch
from transformers import TrainerCallback

from perf.peers_data import contains_answer
from perf.peers_order import PeerOrder, PeerStep, PeerWork

if TYPE_CHECKING:
    from collections.abc import Callable


class Counts(NamedTuple):
    """What has been fed so far."""

    sampled: int = 0
    tokens: int = 0
    fed: int = 0

    def plus(self, *, sampled: int = 0, tokens: int, fed: int) -> Counts:
        """Return the counts with more added."""
        return Counts(self.sampled + sampled, self.tokens + tokens, self.fed + fed)


class Clock(TrainerCallback):
    """Notes when each optimizer step was done, and what had been fed until then."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.tokenizer: Any = None  # the trainer's, once there is one
        self._marks: list[tuple[float, Counts]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Take a mark."""
        self._marks.append((time.perf_counter(), self.counts))

    def counting(self, collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
        """Return the collator, counted."""

        def collate_and_count(rows: list[Any]) -> dict[str, Any]:
            batch = collate(rows)
            for name, mask in batch.items():
                if name.endswith("attention_mask"):
                    self.counts = self.counts.plus(tokens=int(mask.sum()), fed=mask.numel())
            return batch

        return collate_and_count

    def reward(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        """Score, and count what GRPO feeds: every sequence is padded to the longest prompt and response."""
        lengths = [len(ids) for ids in completion_ids]
        prompt_lengths = [len(ids) for ids in self.tokenizer(prompts)["input_ids"]]
        self.counts = self.counts.plus(
            sampled=sum(lengths),
            tokens=sum(lengths) + sum(prompt_lengths),
            fed=len(prompts) * (max(lengths) + max(prompt_lengths)),
        )
        return contains_answer(completions=completions, **columns)

    def steps(self, work: PeerWork) -> list[PeerStep]:
        """Return the measured steps."""
        marks = self._marks[work.warmup - 1 :]
        return [
            PeerStep(
                wall_s=end_s - start_s,
                sequences=work.sequences,
                sampled_tokens=after.sampled - before.sampled,
                tokens=after.tokens - before.tokens,
                fed_tokens=after.fed - before.fed,
            )
            for (start_s, before), (end_s, after) in pairwise(marks)
        ]


def arguments(order: PeerOrder, directory: str) -> dict[str, Any]:
    """Return the training arguments that all three trainers share."""
    work = order.work
    dtype = {"autocast": "float32", "bfloat16": "bfloat16", "float32": "float32"}[order.way]
    num_rows = min(order.rows, work.sequences)
    return dict(
        output_dir=directory,
        model_init_kwargs={"dtype": dtype},
        max_steps=work.warmup + work.steps,
        per_device_train_batch_size=num_rows,
        gradient_accumulation_steps=work.sequences // num_rows,
        learning_rate=work.lr,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=order.way == "autocast",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        seed=work.seed,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def make_trainer(order: PeerOrder, directory: str, clock: Clock) -> Any:
    """Return TRL's trainer for the method."""
    import trl  # pyright: ignore[reportMissingImports]
    from datasets import Dataset

    work = order.work
    rows = [msgspec.json.decode(line) for line in Path(work.data).read_bytes().splitlines()]
    common = arguments(order, directory)
    given: dict[str, Any] = {"model": work.model, "train_dataset": Dataset.from_list(rows), "callbacks": [clock]}
    if work.method == "sft":
        return trl.SFTTrainer(args=trl.SFTConfig(**common, completion_only_loss=True), **given)
    if work.method == "dpo":
        return trl.DPOTrainer(args=trl.DPOConfig(**common, beta=work.beta), **given)
    settings = trl.GRPOConfig(
        **common,
        num_generations=work.group_size,
        max_completion_length=work.max_tokens,
        temperature=1.0,
        beta=work.beta,
        epsilon=0.2,
        loss_type="grpo",
        scale_rewards="group",
        num_iterations=1,
        generation_kwargs={"min_new_tokens": work.max_tokens} if work.is_fixed else None,
    )
    return trl.GRPOTrainer(args=settings, reward_funcs=clock.reward, **given)


def run(order: PeerOrder) -> list[PeerStep]:
    """Train and return the measured steps."""
    torch.set_num_threads(order.work.cores)
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(order, directory, clock)
        clock.tokenizer = trainer.processing_class
        if order.work.method != "grpo":
            trainer.data_collator = clock.counting(trainer.data_collator)
        trainer.train()
    return clock.steps(order.work)


def main(argv: list[str]) -> int:
    """Carry out the order in one file and write the steps to another."""
    order_path, answer_path = map(Path, argv)
    order = msgspec.json.decode(order_path.read_bytes(), type=PeerOrder)
    answer_path.write_bytes(msgspec.json.encode(run(order)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
