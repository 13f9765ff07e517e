"""The command line: `flowrl run | check | show | verify | doctor`.

Bad input is one line on standard error (where, what, what to do) and exit code 2; a failed run is one line and exit
code 1; a run the user stopped twice is 130. `--debug` adds the traceback. Nothing heavier than msgspec is imported
before a command needs it, so that `flowrl --help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.errors import FlowrlError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.graph.program import Program

ABORTED = 130  # as a shell reports a process ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except FlowrlError as error:
        if options.debug:
            raise
        print(f"flowrl: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("flowrl: aborted", file=sys.stderr)
        return ABORTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowrl", description="Reinforcement learning from human feedback as a streaming dataflow graph."
    )
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a graph to its end")
    _graph_options(run)
    run.add_argument("--name", help="of the run; its directory is RUNS_DIR/NAME (default: graph and time)")
    run.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    run.add_argument("--resume", type=Path, metavar="RUN", help="continue this run from its newest checkpoint")
    run.add_argument("--address", help="of a running Ray cluster (default: start Ray on this machine)")
    run.set_defaults(command=_run)

    check = commands.add_parser("check", help="load and validate a graph, print the plan, start nothing")
    _graph_options(check)
    check.set_defaults(command=_check)

    show = commands.add_parser("show", help="print a graph's edges")
    _graph_options(show)
    show.add_argument("--mermaid", action="store_true", help="as a Mermaid flowchart")
    show.set_defaults(command=_show)

    verify = commands.add_parser("verify", help="prove from a run's files that nothing was lost or learned twice")
    verify.add_argument("run", type=Path, help="the run's directory")
    verify.add_argument("--debug", action="store_true", help="show tracebacks")
    verify.set_defaults(command=_verify)

    doctor = commands.add_parser("doctor", help="say what this machine has and lacks")
    doctor.add_argument("--debug", action="store_true", help="show tracebacks")
    doctor.set_defaults(command=_doctor)
    return parser


def _graph_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("graph", type=Path, help="a graph file such as graphs/ppo_async.py")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings by path; --set wins over it")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE",
                        help="one setting, e.g. learner.lr=1e-6; may be repeated")  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _load(options: argparse.Namespace) -> Program:
    from flowrl.graph.program import load_program

    return load_program(options.graph, config=options.config, overrides=options.overrides)


def _show(options: argparse.Namespace) -> int:
    from flowrl.graph.show import edge_table, mermaid

    program = _load(options)
    print(mermaid(program.graph) if options.mermaid else edge_table(program.graph))
    return 0


def _check(options: argparse.Namespace) -> int:
    from flowrl.runtime.launch import check_program, describe

    program = _load(options)
    print(describe(program))
    check_program(program, say=_say, address=None)
    print("ok: nothing was started")
    return 0


def _run(options: argparse.Namespace) -> int:
    from flowrl.runtime.launch import RunRequest, launch

    request = RunRequest(
        graph=options.graph,
        config=options.config,
        overrides=options.overrides,
        name=options.name,
        runs_dir=options.runs_dir,
        resume=options.resume,
        address=options.address,
    )
    return launch(request, say=_say)


def _verify(options: argparse.Namespace) -> int:
    from flowrl.runtime.verify import describe, verify_run

    verdict = verify_run(options.run)
    print(describe(verdict, options.run))
    return 0 if verdict.is_clean else 1


def _doctor(options: argparse.Namespace) -> int:
    from flowrl.doctor import diagnose

    return diagnose(print)


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
