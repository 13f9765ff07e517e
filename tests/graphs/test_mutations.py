"""No copy of a shipped graph with one line removed or one number changed runs as something else than it says.

Under the same settings each mutant is refused before it starts, or it is the same program: equal plans. So what a law
depends on can neither be forgotten in a graph file nor be said there in a second, other way.
"""

from __future__ import annotations

import io
import tokenize
from typing import TYPE_CHECKING

import pytest
import yaml

from flowrl.config import to_tree
from flowrl.errors import FlowrlError
from flowrl.graph.program import load_program, plan_of
from tests.support.command import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

GRAPHS = sorted((ROOT / "graphs").glob("*.py"))
# Every part that a graph has only where it is asked for.
WHOLE = {
    "generate": ["reward_models=[a, b]", "reference_model=c"],
    "group_async": ["reward_models=[a, b]", "texts.per_step=2", "replay.ratio=0.5"],
    "humans_dpo": ["offline.data.source=pairs.jsonl"],
    "iterative_dpo": ["reward_models=[a, b]"],
    "ppo_async": ["reward_models=[a, b]", "texts.per_step=2"],
}


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Yield what was changed, and the text that came of it."""
    lines = source.splitlines(keepends=True)
    for place, line in enumerate(lines):
        yield f"without line {place + 1}: {line.strip()}", "".join(lines[:place] + lines[place + 1 :])
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NUMBER:
            (row, first), last = token.start, token.end[1]
            for other in (f"({token.string} + 1)", f"({token.string} * 3)", "0"):
                line = lines[row - 1]
                changed = [*lines[: row - 1], line[:first] + other + line[last:], *lines[row:]]
                yield f"{other} for {token.string} in line {row}: {line.strip()}", "".join(changed)


CASES = [(path.stem, []) for path in GRAPHS] + list(WHOLE.items())


@pytest.mark.parametrize(("name", "overrides"), CASES, ids=[f"{name}{'-whole' * bool(more)}" for name, more in CASES])
def test_every_mutant_of_a_graph_is_refused_or_the_same_program(
    name: str, overrides: list[str], tmp_path: Path
) -> None:
    path = ROOT / "graphs" / f"{name}.py"
    original = load_program(path, overrides=overrides)
    plan = plan_of(original.graph)
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(to_tree(original.settings)))
    refused, survivors = 0, list[str]()
    for number, (change, text) in enumerate(mutants(path.read_text())):
        copy = tmp_path / f"mutant_{number}.py"
        copy.write_text(text)
        try:
            mutant = load_program(copy, config=settings).graph
        except FlowrlError:
            refused += 1
            continue
        if plan_of(mutant) != plan:
            survivors.append(change)
    assert not survivors, "\n".join(survivors)
    assert refused > 10
