"""The data of scripts/pipeline.sh: reasoning-gym's arithmetic as prompts and demonstrations, split once for all steps.

    python -m perf.pipeline_data DIR [--train 208 --heldout 48 --seed 0]

Writes prompts-train.jsonl, prompts-heldout.jsonl and demonstrations.jsonl, which answers the training prompts only: no
step ever learns from a held-out problem, in whatever words it is asked. Preference pairs are not made here but sampled,
from the model that has learned the demonstrations.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.data.prompts import DEFAULT_TASKS, PromptData
from flowrl.data.tasks import make_rows
from flowrl.data.written import asked_and_answered, write_rows

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--train", type=int, default=208, help="questions to train on")
    parser.add_argument("--heldout", type=int, default=48, help="questions kept for the table")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rows = [
        row.columns for row in make_rows(DEFAULT_TASKS, num_rows=options.train + options.heldout, seed=options.seed)
    ]
    train, heldout = split(rows, options.heldout, options.seed)
    write_rows(options.directory / "prompts-train.jsonl", train)
    write_rows(options.directory / "prompts-heldout.jsonl", heldout)
    answered = [asked_and_answered(PromptData(), row, f" {row['answer']}.") for row in train]
    demonstrations = ({"prompt": prompt, "completion": completion} for prompt, completion in answered)
    write_rows(options.directory / "demonstrations.jsonl", demonstrations)
    print(f"{options.directory}: {len(train)} questions to train on, {len(heldout)} held out")


def split(
    rows: Sequence[dict[str, Any]], num_heldout: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what is trained on and what is held out, `num_heldout` rows or a few more: problems go whole."""
    problems: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        problems.setdefault(row["entry"]["metadata"]["expression"], []).append(row)
    order = sorted(problems)
    random.Random(seed).shuffle(order)
    train: list[dict[str, Any]] = []
    heldout: list[dict[str, Any]] = []
    for problem in order:
        (heldout if len(heldout) < num_heldout else train).extend(problems[problem])
    return train, heldout


if __name__ == "__main__":
    main()
