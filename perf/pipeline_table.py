"""The table of scripts/pipeline.sh: what each step did, on problems that no step learned from.

    python -m perf.pipeline_table DIR

Reads the runs in DIR: `sft` and `reward` (their own held-out examples), `ppo` (its training curve) and `eval-*`, each
policy's samples of the held-out prompts, scored by the reward model and by the true verifier, with their log-probs
under the SFT model. Prints the table and writes curves.csv, reward and true score against KL from the SFT model for
every checkpoint, and ppo-steps.csv, PPO's training samples step by step. Reward that rises with the KL while the true
score does not is the reward model being exploited. Intervals are 95 % t intervals over prompts (or examples).
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.errors import DataError
from flowrl.telemetry.intervals import Interval, mean_interval, paired_interval, prompt_means
from flowrl.telemetry.metrics import read_evaluations, read_steps

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

TRUE, REWARD = "score.reasoning_gym_score", "score.reward_model_0"


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """One policy's samples of the held-out prompts, [prompt][sample], the same prompts in the same order."""

    name: str  # "ppo-000008": the run and the checkpoint's version
    reward: list[list[float]]
    true: list[list[float]]
    kl: list[list[float]]  # log-prob under the policy less that under the SFT model, nats a response

    @property
    def method(self) -> str:
        """Return the run it comes from."""
        return self.name.partition("-")[0]


def read_policy(directory: Path, name: str) -> Policy:
    """Read what graphs/generate.py wrote.

    Raises:
        DataError: there is nothing.
    """
    decode = msgspec.json.Decoder().decode
    prompts: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((directory / "data").glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            row = decode(line)
            prompts.setdefault(row["row"]["prompt"], []).append(row)
    if not prompts:
        raise DataError(str(directory), "holds no samples", "run scripts/pipeline.sh again")
    groups = [prompts[prompt] for prompt in sorted(prompts)]
    return Policy(
        name=name,
        reward=[[row[REWARD] for row in group] for group in groups],
        true=[[row[TRUE] for row in group] for group in groups],
        kl=[[row["logprob"] - row["ref_logprob"] for row in group] for group in groups],
    )


def read_policies(runs: Path) -> list[Policy]:
    """Read every policy that was judged, the SFT model first."""
    names = [path.name.removeprefix("eval-") for path in runs.glob("eval-*") if path.is_dir()]
    return [read_policy(runs / f"eval-{name}", name) for name in sorted(names, key=lambda name: (name != "sft", name))]


def table(sft: Sequence[Any], reward: Sequence[Any], policies: Sequence[Policy]) -> str:
    """Return the table as text; `sft` and `reward` are those runs' evaluations, the first policy is the SFT model."""
    before, after = ([[-score for score in row] for row in each.scores] for each in (sft[0], sft[-1]))
    rows: list[tuple[str, ...]] = [("step", "held-out figure", "value", "95 % interval", "change", "95 % interval")]
    rows += [
        ("SFT", "NLL a token, before", *cells(mean_interval(prompt_means(before))), "", ""),
        ("", "NLL a token, after", *cells(mean_interval(prompt_means(after))), *cells(paired_interval(before, after))),
        ("reward model", f"accuracy on {len(reward[-1].scores)} pairs (chance 0.5)",
         *cells(mean_interval(prompt_means(reward[-1].scores))), "", ""),
    ]  # fmt: skip
    base = policies[0]
    newest = {policy.method: policy for policy in policies}
    for policy in newest.values():
        for label, figure in (("reward-model score", "reward"), ("true score", "true"), ("KL from SFT, nats", "kl")):
            found, start = getattr(policy, figure), getattr(base, figure)
            change = cells(paired_interval(start, found)) if policy is not base and figure != "kl" else ("", "")
            heading = policy.name if figure == "reward" else ""
            rows.append((heading, label, *cells(mean_interval(prompt_means(found))), *change))
    return aligned(rows)


def curve_rows(policies: Iterable[Policy]) -> list[tuple[str, ...]]:
    """Return one row a policy: KL, reward-model score and true score with their intervals."""
    rows: list[tuple[str, ...]] = [
        ("policy", "kl", "reward", "reward_low", "reward_high", "true", "true_low", "true_high")
    ]
    for policy in policies:
        reward, true = (mean_interval(prompt_means(scores)) for scores in (policy.reward, policy.true))
        figures = (fmean(prompt_means(policy.kl)), reward.mean, reward.low, reward.high, true.mean, true.low, true.high)
        rows.append((policy.name, *(f"{figure:.4f}" for figure in figures)))
    return rows


def cells(interval: Interval | None) -> tuple[str, str]:
    """Return mean and interval as text; `cells(Interval(mean=1, half_width=0.5, num=4))` begins with "1.000"."""
    if interval is None:
        return "", "not the same prompts"
    return f"{interval.mean:.3f}", f"[{interval.low:.3f}, {interval.high:.3f}]"


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as lines with columns flush left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write rows, the header first."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def step_rows(steps: Mapping[int, Mapping[str, float | None]]) -> list[tuple[object, ...]]:
    """Return PPO's training curve: KL and reward-model score of each step's samples."""
    rows: list[tuple[object, ...]] = [("step", "kl", "reward")]
    rows += [(version, figures.get("kl"), figures.get(REWARD)) for version, figures in sorted(steps.items())]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    runs = parser.parse_args(argv).directory
    policies = read_policies(runs)
    sft, reward = (read_evaluations(runs / name / "metrics.jsonl") for name in ("sft", "reward"))
    curves = curve_rows(policies)
    text = f"{table(sft, reward, policies)}\n\nreward against KL, by checkpoint\n{aligned(curves)}\n"
    (runs / "table.txt").write_text(text)
    write_csv(runs / "curves.csv", curves)
    write_csv(runs / "ppo-steps.csv", step_rows(read_steps(runs / "ppo" / "metrics.jsonl")))
    print(text)


if __name__ == "__main__":
    main()
