"""A few of a run's rollouts, with what is known of each token, for the page.

Steps are taken evenly over the run, the first and the last among them; of a step the group whose rewards differ most
and the one that is oldest; of a group the best and the worst sample. So what is shown is chosen to be looked at and is
no random sample, which the page says.

Invariants:
- at most `MOST_STEPS * GROUPS_A_STEP * SAMPLES_A_GROUP` samples of `MOST_TOKENS` tokens each;
- a file that cannot be read is left out.

Called by page.py.

Tests: tests/unit/runs/page/test_page.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.runs.inspection import ENVIRONMENT, token_ratios
from flowrl.telemetry.charts import number
from flowrl.telemetry.records import step_files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    Pieces = Callable[[Sequence[int]], list[str]]  # token ids -> the text of each

MOST_STEPS = 6
GROUPS_A_STEP = 2
SAMPLES_A_GROUP = 2
MOST_TOKENS = 400  # of a response; more would make the page slow on a phone
PROMPT_CHARACTERS = 1500
OLDEST = 3  # policy versions: the colour of tokens that old or older
RATIO_BOUNDS = (0.5, 0.8, 0.95, 1.05, 1.25, 2.0)  # between the colours of importance ratios


class Token(msgspec.Struct, frozen=True):
    """A token as it is drawn."""

    text: str
    kinds: str  # classes: a0 to a3 by age, or env; r0 to r6 by importance ratio, where it is known
    says: str


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """A sample."""

    place: int
    reward: str
    scores: list[tuple[str, str]]
    facts: str
    tokens: list[Token]
    num_left_out: int


class ShownGroup(msgspec.Struct, frozen=True, kw_only=True):
    """A group, with the samples of it that are shown."""

    step: int
    group_id: int
    prompt: str
    num_samples: int
    samples: list[Shown]


def shown_groups(run_dir: Path, pieces: Pieces | None) -> list[ShownGroup]:
    """Return the rollouts to show, by step; none where the run recorded none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [*step_files(run_dir / "rollouts").values()]
    found: list[ShownGroup] = []
    for path in evenly(paths, MOST_STEPS):
        try:
            file = pq.ParquetFile(path)
            table = file.read(columns=[name for name in file.schema_arrow.names if name != "message"])
        except (OSError, pa.ArrowInvalid):
            continue
        groups: dict[int, list[dict[str, Any]]] = {}
        for row in table.to_pylist():
            groups.setdefault(row["group_id"], []).append(row)
        found += [_shown_group(rows, pieces) for rows in _telling(list(groups.values()))]
    return found


def has_ratios(groups: Sequence[ShownGroup]) -> bool:
    """Return whether the importance ratio of any token is known."""
    return any(" r" in t.kinds for group in groups for sample in group.samples for t in sample.tokens)


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _telling(groups: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Return the group whose rewards differ most and, of the others, the stalest."""
    spread = sorted(groups, key=lambda rows: min(r["reward"] for r in rows) - max(r["reward"] for r in rows))
    old = sorted(spread[1:], key=lambda rows: -max(row["staleness"] for row in rows))
    return [*spread[:1], *old[: GROUPS_A_STEP - 1]]


def _shown_group(rows: list[dict[str, Any]], pieces: Pieces | None) -> ShownGroup:
    ordered = sorted(rows, key=lambda row: -row["reward"])
    first = rows[0]
    prompt = "".join(pieces(first["prompt_token_ids"])) if pieces else first["prompt"] or ""
    return ShownGroup(
        step=first["learned_in_step"],
        group_id=first["group_id"],
        prompt=_end(prompt),
        num_samples=len(rows),
        samples=[_shown(row, pieces) for row in evenly(ordered, SAMPLES_A_GROUP)],
    )


def _end(text: str) -> str:
    """Return the end of a prompt: the question stands there, behind whatever every prompt begins with."""
    return text if len(text) <= PROMPT_CHARACTERS else "... " + text[-PROMPT_CHARACTERS:]


def _shown(row: dict[str, Any], pieces: Pieces | None) -> Shown:
    ids = row["token_ids"][:MOST_TOKENS]
    texts = pieces(ids) if pieces else [f"{token} " for token in ids]
    ratios = token_ratios(row)
    versions = sorted({version for version in row["token_versions"] if version != ENVIRONMENT})
    spread = " to ".join(str(version) for version in versions[:1] + versions[1:][-1:])
    facts = [
        f"sampled by version {spread}",
        f"staleness {row['staleness']}",
        f"{len(row['token_ids'])} tokens",
        f"ended by {row['finish']}",
        row["generator"],
    ]
    if row["advantage_mean"] is not None:
        facts.insert(0, f"mean advantage {number(row['advantage_mean'])}")
    scores = {name.removeprefix("score."): value for name, value in row.items() if name.startswith("score.")}
    return Shown(
        place=row["sample"],
        reward=number(row["reward"]),
        scores=[(name, number(value)) for name, value in scores.items() if value is not None],
        facts=", ".join(facts),
        tokens=[
            _token(text, version, logprob, ratio, row["learned_in_step"])
            for text, version, logprob, ratio in zip(
                texts, row["token_versions"], row["logprobs"], ratios, strict=False
            )
        ],
        num_left_out=len(row["token_ids"]) - len(ids),
    )


def _token(text: str, version: int, logprob: float, ratio: float | None, learned_in: int) -> Token:
    if version == ENVIRONMENT:
        return Token(text, "env", "of the environment")
    kinds, says = f"a{min(OLDEST, learned_in - version)}", f"version {version}, p {math.exp(logprob):.3g}"
    if ratio is not None:
        kinds += f" r{ratio_class(ratio)}"
        says += f", ratio {ratio:.3g}"
    return Token(text, kinds, says)


def ratio_class(ratio: float) -> int:
    """Return 0 for a ratio below the first bound, and 6 above the last; 3 is about 1."""
    return sum(ratio >= bound for bound in RATIO_BOUNDS)
