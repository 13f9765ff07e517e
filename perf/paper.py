"""`flowrl bench paper`: the paper's table 2 with flowrl simulated on the same GPUs, from the paper's own stage times.

    flowrl bench paper                                # all four sizes, with a search for the best placement
    flowrl bench paper --sizes 7B --settings 0        # no search

For each size: the serial runs of both systems are simulated on their stages and must come out at the paper's totals
(tables 5 and 6), or nothing that follows from them would be worth anything; then asynchronous flowrl on OpenRLHF's GPUs
and placement, beside max(generation, logits + reward, training) + sync, and on the best placement of as many GPUs that
`flowrl tune`'s search finds. Everything is simulated: nothing here has run on such GPUs. paper_rows.py has the
assumptions, paper_report.py the tables.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from flowrl.graph.program import load_program
from flowrl.simulation.run import simulate
from flowrl.tuning.tune import TuneRequest, tune
from perf.paper_report import Found, Placed, Report, markdown
from perf.paper_rows import System, Tables, num_messages, profile, read_tables, settings
from perf.runs import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from perf.paper_rows import Row

GRAPH = ROOT / "graphs/ppo_async.py"
SERIAL_STEPS = 2  # every one takes as long as the other
STEPS = 4
SETTINGS = 300  # looked at by the search, for each size
KNOBS = [".replicas", ".ranks"]  # how many GPUs each role has; nothing else may change


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate and print what was found."""
    options = _parser().parse_args(argv)
    tables = read_tables()
    rows = [row for row in tables.rows if row.size in options.sizes]
    found = [compare(tables, row, num_settings=options.settings) for row in rows]
    report = Report(source=tables.source, notes=tables.notes, sizes=tuple(found))
    print(markdown(report))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    return 0


def _parser() -> argparse.ArgumentParser:
    sizes = [row.size for row in read_tables().rows]
    parser = argparse.ArgumentParser(
        prog="flowrl bench paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=sizes, help="(default: all)")
    parser.add_argument("--settings", type=int, default=SETTINGS, metavar="N",
                        help="placements to look at for each size; 0: no search (default: %(default)s)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


def compare(tables: Tables, row: Row, *, num_settings: int) -> Found:
    """Return what a row's simulations give; without `num_settings` no placement is searched."""
    return Found(
        row=row,
        dschat_s=step_s(tables, row, "dschat", max_staleness=0),
        openrlhf_s=step_s(tables, row, "openrlhf", max_staleness=0),
        same=Placed(step_s=step_s(tables, row, "openrlhf", max_staleness=1), gpus=_gpus(_tree(tables, row))),
        best=_best(tables, row, num_settings) if num_settings else None,
    )


def step_s(tables: Tables, row: Row, system: System, *, max_staleness: int) -> float:
    """Return the simulated seconds for one batch on a row's placement; 0 for `max_staleness` is one stage at a time."""
    with tempfile.TemporaryDirectory() as directory:
        config = write_settings(Path(directory), settings(tables, row, system, max_staleness=max_staleness))
        graph = load_program(GRAPH, config=config).graph
    steps = STEPS if max_staleness else SERIAL_STEPS
    return 1 / simulate(graph, profile(tables, row, system), steps=steps, detail="causes").steps_per_s


def _tree(tables: Tables, row: Row) -> dict[str, Any]:
    return settings(tables, row, "openrlhf", max_staleness=1)


def _best(tables: Tables, row: Row, num_settings: int) -> Placed:
    """Return the fastest placement that the tuner's search finds within the row's GPUs."""
    tree = _tree(tables, row)
    with tempfile.TemporaryDirectory() as directory:
        costs = Path(directory) / "profile.json"
        costs.write_bytes(msgspec.json.encode(profile(tables, row, "openrlhf")))
        config = write_settings(Path(directory), tree)
        request = TuneRequest(graph=GRAPH, profile=costs, config=config, budget=num_settings, gpus=row.gpus, only=KNOBS)
        tuning = tune(request)
    best = max(tuning.front, key=lambda trial: trial.samples_per_s)
    for path, value in best.setting.items():
        node, _, name = path.partition(".")
        tree[node] = {**tree[node], name: value}
    return Placed(
        step_s=num_messages(tables, row) / best.samples_per_s, gpus=_gpus(tree), num_settings=tuning.num_trials
    )


def _gpus(tree: dict[str, Any]) -> dict[str, int]:
    """Return the GPUs that a settings' tree gives each node that has some."""
    nodes = {name: part for name, part in tree.items() if isinstance(part, dict) and part.get("gpus")}
    return {name: int(part["gpus"] * part.get("replicas", 1) * part.get("ranks", 1)) for name, part in nodes.items()}


def write_settings(directory: Path, tree: dict[str, Any]) -> Path:
    """Write a settings' tree where a graph can be loaded with it."""
    import yaml

    config = directory / "settings.yaml"
    config.write_text(yaml.safe_dump(tree))
    return config


if __name__ == "__main__":
    raise SystemExit(main())
