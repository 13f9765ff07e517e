"""The command line: `flowrl run | check | plan | show | report | inspect | watch | scale | verify | retrain`,
and `export | eval | compare | simulate | tune | bench | data | judge | feedback | graphs | init | doctor`.

Bad input is one line on standard error (where, what, what to do) and exit code 2; a failed run is one line and exit
code 1; a run the user stopped twice is 130, a command that a signal ended 128 and the signal's number. `--debug` adds
the traceback. Nothing heavier than msgspec is imported before a command needs it: `flowrl --help` answers at once.

Tests: tests/graphs/test_commands.py
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl import __version__
from flowrl.errors import FlowrlError, files_named, hold_output, let_go_of_output, shortened
from flowrl.errors import say as _say
from flowrl.stops import Interrupted, interrupted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.graph.program import Program

ABORTED = 130  # as a shell reports a process ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    is_debugged = False
    try:
        with interrupted(), files_named():
            hold_output()
            options = _parser().parse_args(arguments)
            is_debugged = options.debug
            return options.command(options)
    except FlowrlError as error:
        if is_debugged:
            raise
        _say_aside(f"flowrl: {error}")
        return error.exit_code
    except Interrupted as stop:
        _say_aside(f"flowrl: {stop}")
        return stop.exit_code
    except KeyboardInterrupt:
        _say_aside("flowrl: aborted")
        return ABORTED
    finally:
        let_go_of_output()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowrl", description="Reinforcement learning from human feedback as a streaming dataflow graph."
    )
    parser.set_defaults(debug=False)
    parser.add_argument("--version", action="version", version=f"flowrl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a graph to its end")
    _graph_options(run)
    run.add_argument("--name", help="of the run; its directory is RUNS_DIR/NAME (default: graph and time)")
    run.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    run.add_argument("--resume", type=Path, metavar="RUN", help="continue this run from its newest checkpoint")
    run.add_argument("--from-start", action="store_true", help="with --resume: from the beginning, not a checkpoint")
    run.add_argument("--address", help="of a running Ray cluster (default: start Ray on this machine)")
    run.set_defaults(command=_run)

    check = commands.add_parser("check", help="load and validate a graph, print the plan, start nothing")
    _graph_options(check)
    check.add_argument("--address", help="of a running Ray cluster: hold its nodes against the graph too")
    check.set_defaults(command=_check)

    plan = commands.add_parser("plan", help="say where a graph's processes go and what lies in memory there")
    _graph_options(plan)
    machines = "8x80GB,host=1TB, 2x8xH100, cpu,cores=8 or a YAML file (default: here)"
    plan.add_argument("--on", default="", metavar="MACHINES", help=machines)
    configs = "config.json of a model that is not here; may be repeated"
    plan.add_argument("--model-config", action="append", default=[], metavar="[MODEL=]FILE", help=configs)
    plan.set_defaults(command=_plan)

    show = commands.add_parser("show", help="print a graph's edges")
    _graph_options(show)
    show.add_argument("--mermaid", action="store_true", help="as a Mermaid flowchart")
    show.set_defaults(command=_show)

    verify = commands.add_parser("verify", help="prove from a run's files that nothing was lost or learned twice")
    verify.add_argument("run", type=Path, help="the run's directory")
    verify.add_argument("--debug", action="store_true", help="show tracebacks")
    verify.set_defaults(command=_verify)

    report = commands.add_parser("report", help="write what a run did as one HTML file")
    report.add_argument("run", type=Path, help="the run's directory; it may be running still")
    report.add_argument("--out", type=Path, metavar="FILE", help="where to write it (default: RUN/report.html)")
    report.add_argument("--graph", type=Path, metavar="FILE", help="the run's graph: tune its settings for advice")
    report.add_argument("--debug", action="store_true", help="show tracebacks")
    report.set_defaults(command=_report)

    compare = commands.add_parser("compare", help="write runs side by side as one HTML file, and print a table")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the runs' directories, two or more")
    page = "where to write it (default: comparison.html)"
    compare.add_argument("--out", type=Path, default=Path("comparison.html"), metavar="FILE", help=page)
    compare.add_argument("--debug", action="store_true", help="show tracebacks")
    compare.set_defaults(command=_compare)

    inspect = commands.add_parser("inspect", help="list the rollouts that an expression chooses, or show a group")
    inspect.add_argument("run", type=Path, help="the run's directory")
    inspect.add_argument("--where", default="", metavar="EXPRESSION", help="e.g. 'reward < 0 and staleness > 0'")
    inspect.add_argument("--columns", default="", metavar="NAME,...", help="what to list of each")
    inspect.add_argument("--limit", type=_number, default=20, help="samples to list (default: 20)")
    inspect.add_argument("--json", action="store_true", help="print one JSON object a line")
    inspect.add_argument(
        "--group", type=_number, metavar="ID", help="show this group in full: samples, tokens, rewards"
    )
    inspect.add_argument("--debug", action="store_true", help="show tracebacks")
    inspect.set_defaults(command=_inspect)

    watch = commands.add_parser("watch", help="show the live table of a run that goes on in another process")
    watch.add_argument("run", type=Path, help="the run's directory")
    watch.add_argument("--debug", action="store_true", help="show tracebacks")
    watch.set_defaults(command=_watch)

    scale = commands.add_parser("scale", help="give nodes of a run that goes on more or fewer replicas")
    scale.add_argument("run", type=Path, help="the run's directory")
    scale.add_argument("asked", nargs="+", metavar="NODE=N", help="such as generator=6")
    scale.add_argument("--debug", action="store_true", help="show tracebacks")
    scale.set_defaults(command=_scale)

    retrain = commands.add_parser("retrain", help="train again from what a run recorded, without generators")
    retrain.add_argument("run", type=Path, help="the run's directory")
    steps = "train these steps only, beginning from a checkpoint (default: all)"
    retrain.add_argument("--steps", type=_steps, default=(0, None), metavar="FIRST:END", help=steps)
    retrain.add_argument("--diff", action="store_true", help="name the first step and tensor that differ; exit 1 if so")
    retrain.add_argument("--name", help="of the new run; its directory lies beside the run's (default: run and time)")
    retrain.add_argument("--debug", action="store_true", help="show tracebacks")
    retrain.set_defaults(command=_retrain)

    export = commands.add_parser("export", help="write a run's model as a Hugging Face directory")
    export.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run, a checkpoint, or a peft adapter")
    export.add_argument("out", type=Path, metavar="OUT", help="directory to write; must be empty or not there")
    export.add_argument("--version", type=_number, help="of the run's checkpoint (default: the newest sound one)")
    export.add_argument("--best", action="store_true", help="the version that scored best")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="", help="of the weights")
    export.add_argument("--adapter", action="store_true", help="only the adapter of a LoRA run, in peft's format")
    export.add_argument("--node", default="", help="whose model, such as critic (default: the learner's)")
    export.add_argument("--debug", action="store_true", help="show tracebacks")
    export.set_defaults(command=_export)

    evaluation = commands.add_parser("eval", help="answer benchmarks with a run, a model or a server")
    evaluation.add_argument("target", metavar="RUN|MODEL|URL", help="a run, a model, or https://host/v1")
    asked = evaluation.add_mutually_exclusive_group(required=True)
    tasks = "of lm-eval, a task's YAML file, or a directory of such files"
    asked.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help=tasks)
    asked.add_argument("--mt-bench", type=Path, metavar="DIR", help="with question.jsonl, as FastChat's data/mt_bench")
    asked.add_argument("--alpaca-eval", type=Path, metavar="FILE", help="the baseline's outputs, as alpaca_eval's JSON")
    evaluation.add_argument("--against", default="", metavar="RUN|MODEL|URL", help="compare with it, item by item")
    evaluation.add_argument(
        "--out", type=Path, metavar="DIR", help="for results and answers (default: evaluations/NAME)"
    )
    evaluation.add_argument("--limit", type=_number, default=0, metavar="N", help="items of each task (default: all)")
    evaluation.add_argument(
        "--num-fewshot", type=_number, metavar="N", help="worked examples (default: as the task says)"
    )
    evaluation.add_argument("--seed", type=_number, default=0, help="of examples, sampling and resampling (default: 0)")
    evaluation.add_argument("--chat", action="store_true", help="ask through the chat template, or chat completions")
    evaluation.add_argument("--model", default="", metavar="NAME", help="of a URL: as the server names it")
    evaluation.add_argument("--tokenizer", default="", metavar="MODEL", help="of a URL: its model's directory or id")
    evaluation.add_argument("--unsafe-code", action="store_true", help="run tasks that execute what a model wrote")
    _settings_option(
        evaluation,
        help="one setting of the engine or the judge, e.g. max_model_len=2048, "
        "judge.url=https://host/v1; may be repeated",
    )
    evaluation.add_argument("--debug", action="store_true", help="show tracebacks")
    evaluation.set_defaults(command=_eval)

    simulate = commands.add_parser("simulate", help="predict how a graph runs, from the profile of a run")
    _graph_options(simulate)
    _profile_option(simulate)
    simulate.add_argument("--steps", type=_number, default=12, help="policy versions to measure (default: 12)")
    simulate.add_argument("--json", action="store_true", help="print the prediction as JSON")
    simulate.set_defaults(command=_simulate)

    tune = commands.add_parser("tune", help="simulate many settings of a graph and recommend one")
    _graph_options(tune)
    _profile_option(tune)
    settings = "settings=N to simulate at most (default: 200)"
    devices = "cpus=N and gpus=N that may be reserved (default: the profile's cores, the graph's GPUs)"
    budget = f"{settings}, {devices}; may be repeated"
    tune.add_argument("--budget", action="append", default=[], metavar="WHAT=NUMBER", help=budget)
    tune.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw throughput over staleness there")
    tune.add_argument("--verify", type=_number, default=0, metavar="N", help="run the N best settings for real")
    tune.add_argument("--verify-steps", type=_number, default=6, help="of each of these runs (default: 6)")
    tune.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where they are kept (default: runs)")
    tune.add_argument("--json", action="store_true", help="print what was found as JSON")
    tune.set_defaults(command=_tune)

    bench = commands.add_parser("bench", help="run a benchmark of a checkout; without a name: list them")
    bench.add_argument("name", nargs="?", metavar="NAME", help="such as paper; `flowrl bench NAME --help` says more")
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="the benchmark's own options")
    bench.set_defaults(command=_bench)

    data = commands.add_parser("data", help="look at training data").add_subparsers(required=True, metavar="COMMAND")
    look = data.add_parser("check", help="say what a data set holds and what a run would make of it")
    look.add_argument(
        "source", metavar="PATH", help="a file (JSONL, JSON, CSV, Parquet, ...), a directory, or a Hugging Face id"
    )
    look.add_argument("--model", default="", help="whose tokenizer and chat template to use (default: the bundled one)")
    look.add_argument("--format", help="take the data as this format (default: found out from the columns)")
    _settings_option(look, help="one setting as in a graph, e.g. data.max_tokens=512; may be repeated")
    look.add_argument("--debug", action="store_true", help="show tracebacks")
    look.set_defaults(command=_check_data)

    judge = commands.add_parser("judge", help="say how far a judge agrees with preferences that people labelled")
    judge.add_argument("source", metavar="PATH", help="preferences: a file, a directory, or a Hugging Face id")
    _settings_option(judge, help="one setting: server.url, server.model, rubric.way, ...; may be repeated")
    judge.add_argument("--debug", action="store_true", help="show tracebacks")
    judge.set_defaults(command=_judge)

    feedback = commands.add_parser("feedback", help="serve a page at which people judge a run's answers")
    feedback.add_argument("run", type=Path, help="the run's directory; it may be running still")
    feedback.add_argument("--host", default="127.0.0.1", help="to listen on (default: 127.0.0.1, this machine alone)")
    feedback.add_argument("--name", action="append", default=[], metavar="HOST",
                          help="another name that browsers ask for, such as a proxy's; may be repeated")  # fmt: skip
    feedback.add_argument("--port", type=_number, default=8791, help="to listen on; 0: any (default: 8791)")
    way = "how recorded rollouts are judged; a humans node says it itself"
    feedback.add_argument("--way", choices=["pairs", "ratings"], default="pairs", help=way)
    formats = ["jsonl", "trl", "labelstudio", "argilla"]
    export_to = "write what was said instead: jsonl, trl, labelstudio or argilla"
    feedback.add_argument("--export", choices=formats, metavar="FORMAT", help=export_to)
    feedback.add_argument("--out", type=Path, metavar="FILE", help="where to write it")
    feedback.add_argument("--debug", action="store_true", help="show tracebacks")
    feedback.set_defaults(command=_feedback)

    graphs = commands.add_parser("graphs", help="list the graphs and recipes that come with flowrl")
    graphs.add_argument("--debug", action="store_true", help="show tracebacks")
    graphs.set_defaults(command=_graphs)

    init = commands.add_parser("init", help="write them to a directory, to run and to edit")
    init.add_argument("directory", type=Path, metavar="DIR", help="they are written to DIR/graphs")
    init.add_argument("--debug", action="store_true", help="show tracebacks")
    init.set_defaults(command=_init)

    doctor = commands.add_parser("doctor", help="say what this machine has and lacks, or each node of a cluster")
    doctor.add_argument("--address", help="of a running Ray cluster: say it of each of its nodes")
    doctor.add_argument("--runs-dir", type=Path, default=Path("runs"), help="that all nodes must see (default: runs)")
    doctor.add_argument("--debug", action="store_true", help="show tracebacks")
    doctor.set_defaults(command=_doctor)
    return parser


def _settings_option(parser: argparse.ArgumentParser, *, help: str) -> None:
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="PATH=VALUE", help=help)


def _graph_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("graph", type=Path, help="a graph file such as graphs/ppo_async.py")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings by path; --set wins over it")
    _settings_option(parser, help="one setting, e.g. learner.lr=1e-6; may be repeated")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _profile_option(parser: argparse.ArgumentParser) -> None:
    help = "a run that has ended, or a profile file (JSON or YAML)"
    parser.add_argument("--profile", type=Path, required=True, metavar="RUN", help=help)


def _load(options: argparse.Namespace) -> Program:
    from flowrl.graph.program import load_program

    return load_program(options.graph, config=options.config, overrides=options.overrides)


def _show(options: argparse.Namespace) -> int:
    from flowrl.graph.show import edge_table, mermaid

    program = _load(options)
    _say(mermaid(program.graph) if options.mermaid else edge_table(program.graph))
    return 0


def _check(options: argparse.Namespace) -> int:
    from flowrl.errors import ResourceError
    from flowrl.graph.program import load_program
    from flowrl.runtime.launch import check_program, describe, load_for_cluster
    from flowrl.runtime.placement import check_computes
    from flowrl.tuning.companion import Advised

    advised = Advised()
    if options.address is None:
        placing = advised.placing()
        program = load_program(options.graph, config=options.config, overrides=options.overrides, placing=placing)
    else:
        program = load_for_cluster(
            options.graph, options.config, options.overrides, address=options.address, companion=advised, say=_say
        )
    _say(describe(program))
    try:
        if options.address is None:
            check_computes(program.graph)
    except ResourceError as error:  # of this installation, not of the graph
        _say(f"warning: a run would be refused: {error}")
    check_program(program, say=_say, address=options.address)
    if options.address is not None:
        from flowrl.runtime.examination import check_cluster

        check_cluster(program, options.address, _say)
    for line in advised.foretell(program, Path("runs")):
        _say(line)
    _say("ok: nothing was started")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from flowrl.engines.base import check_engine
    from flowrl.graph.program import load_program
    from flowrl.runtime.devices import check_usable
    from flowrl.tuning.machines import parse_site, this_site
    from flowrl.tuning.planner import Planner
    from flowrl.tuning.shapes import parse_configs

    site = parse_site(options.on) if options.on else this_site()
    if not options.on:
        check_usable(site.machine)
    planner = Planner(site, parse_configs(options.model_config))
    program = load_program(options.graph, config=options.config, overrides=options.overrides, placing=planner)
    for name, stage in program.graph.nodes.items():
        if asked := getattr(stage.config, "engine_options", None):
            check_engine(stage.config.engine, asked, name)  # pyright: ignore[reportAttributeAccessIssue]
    for line in planner.lines(whole=True):
        _say(line)
    return 1 if planner.plan is not None and not planner.plan.fits else 0


def _run(options: argparse.Namespace) -> int:
    from flowrl.runtime.launch import RunRequest, launch
    from flowrl.tuning.companion import Advised

    request = RunRequest(
        graph=options.graph,
        config=options.config,
        overrides=options.overrides,
        name=options.name,
        runs_dir=options.runs_dir,
        resume=options.resume,
        address=options.address,
        from_start=options.from_start,
    )
    launch(request, say=_say, companion=Advised())
    return 0


def _verify(options: argparse.Namespace) -> int:
    from flowrl.runs.verify import describe, verify_run

    verdict = verify_run(options.run)
    _say(describe(verdict, options.run))
    return 0 if verdict.is_clean else 1


def _report(options: argparse.Namespace) -> int:
    from flowrl.runs.review import write_review

    path = write_review(options.run, options.out, options.graph, say=_say)
    _say(f"written: {path} ({path.stat().st_size / 1024:,.0f} KiB)")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from flowrl.runs.page.comparison import compare

    compare(options.runs, options.out, _say)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from flowrl.runs.review import inspect_group, inspect_rollouts

    if options.group is not None:
        lines = inspect_group(options.run, options.group)
    else:
        columns = [name.strip() for name in options.columns.split(",") if name.strip()]
        lines = inspect_rollouts(
            options.run, options.where, columns=columns, limit=options.limit, as_lines=options.json
        )
    for line in lines:
        _say(line)
    return 0


def _watch(options: argparse.Namespace) -> int:
    from flowrl.runs.watch import watch
    from flowrl.runtime.rundir import existing_run, is_held

    run_dir = existing_run(options.run)
    return 1 if watch(run_dir, is_held=lambda: is_held(run_dir), say=_say) == "killed" else 0


def _scale(options: argparse.Namespace) -> int:
    from flowrl.runtime.scaling import scale

    _say(f"asked for: {scale(options.run, options.asked)}; the run takes it up within seconds")
    return 0


def _feedback(options: argparse.Namespace) -> int:
    from flowrl.errors import ConfigError

    if (options.export is None) != (options.out is None):
        raise ConfigError("feedback", "--export and --out go together", "give both, or neither to serve the page")
    if options.export is not None:
        from flowrl.runs.feedback.exports import export

        export(options.run, options.out, options.export, way=options.way, say=_say)
        return 0
    from flowrl.runs.feedback.server import serve

    serve(options.run, host=options.host, port=options.port, way=options.way, say=_say, names=options.name)
    return 0


def _number(text: str) -> int:
    """Read a whole number that native code can hold."""
    if not re.fullmatch(r"\s*[+-]?[0-9]{1,19}\s*", text) or not -(1 << 63) <= int(text) < 1 << 63:
        raise argparse.ArgumentTypeError(f"{shortened(text, 40)!r} is not a whole number of 64 bits")
    return int(text)


def _steps(text: str) -> tuple[int, int | None]:
    """Read FIRST:END; either may be left out."""
    first, colon, end = text.partition(":")
    if not colon or not all(part.isdecimal() or not part for part in (first, end)):
        raise argparse.ArgumentTypeError(f"{shortened(text, 40)!r} is not FIRST:END, such as 4:8, 4: or :8")
    return _number(first or "0"), _number(end) if end else None


def _retrain(options: argparse.Namespace) -> int:
    from flowrl.runs.retrain import RetrainRequest, retrain

    first, last = options.steps
    request = RetrainRequest(run=options.run, first=first, last=last, name=options.name, compares=options.diff)
    return retrain(request, say=_say)


def _export(options: argparse.Namespace) -> int:
    from flowrl.runs.export import ExportRequest, export

    request = ExportRequest(
        source=options.source,
        out=options.out,
        version=options.version,
        best=options.best,
        dtype=options.dtype,
        adapter=options.adapter,
        node=options.node,
    )
    export(request, say=_say)
    return 0


def _eval(options: argparse.Namespace) -> int:
    from flowrl.errors import ConfigError
    from flowrl.runs import alpaca_eval, evaluation, mt_bench
    from flowrl.runs.answering import EvalRequest

    if options.limit < 0:
        raise ConfigError(
            "--limit", f"{options.limit} is not a number of items", "give 1 or more, or leave it out for all"
        )
    request = EvalRequest(
        target=options.target,
        tasks=options.tasks,
        mt_bench=options.mt_bench,
        alpaca_eval=options.alpaca_eval,
        against=options.against,
        out=options.out,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        seed=options.seed,
        chat=options.chat,
        model=options.model,
        tokenizer=options.tokenizer,
        unsafe_code=options.unsafe_code,
        overrides=options.overrides,
    )
    asked = mt_bench if request.mt_bench else alpaca_eval if request.alpaca_eval else evaluation
    asked.evaluate(request, _say)
    return 0


def _simulate(options: argparse.Namespace) -> int:
    import msgspec

    from flowrl.errors import ConfigError
    from flowrl.simulation.costs import load_profile
    from flowrl.simulation.prediction import table
    from flowrl.simulation.run import simulate

    if options.steps < 1:
        raise ConfigError("--steps", f"{options.steps} steps cannot be measured", "give 1 or more")
    profile, program = load_profile(options.profile), _load(options)
    prediction = simulate(program.graph, profile, steps=options.steps)
    asked = getattr(program.settings, "steps", options.steps)
    _say(msgspec.json.encode(prediction).decode() if options.json else table(prediction, steps=asked))
    return 0


def _tune(options: argparse.Namespace) -> int:
    import msgspec

    from flowrl.tuning.picture import picture
    from flowrl.tuning.tune import describe, parse_budget, tune
    from flowrl.tuning.verification import chosen, settled, verify

    request = parse_budget(
        options.budget,
        graph=options.graph,
        profile=options.profile,
        config=options.config,
        overrides=options.overrides,
    )
    tuning = tune(request)
    say = _say_aside if options.json else _say
    if not options.json:
        _say(describe(tuning))
    if options.verify:
        settings = [trial.setting for trial in chosen(tuning, options.verify)]
        verified = [*verify(request, settings, steps=options.verify_steps, runs_dir=options.runs_dir, say=say)]
        tuning, lines = settled(tuning, verified)
        for line in lines:
            say(line)
    if options.json:
        _say(msgspec.json.encode(tuning).decode())
    if options.picture is not None:
        options.picture.write_text(picture(tuning))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from flowrl.bench import benchmarks, run_benchmark

    if options.name is not None:
        return run_benchmark(options.name, options.rest)
    for name, what in benchmarks().items():
        _say(f"{name:<12} {what}")
    return 0


def _check_data(options: argparse.Namespace) -> int:
    from flowrl.data.inspection import check_data, check_settings
    from flowrl.data.models import DEFAULT_MODEL, prepare_model
    from flowrl.data.prompts import load_tokenizer

    data = check_settings(options.source, format=options.format, overrides=options.overrides)
    tokenizer = load_tokenizer(prepare_model(options.model or DEFAULT_MODEL, say=_say))
    check_data(data, tokenizer, _say, colour=sys.stdout.isatty())
    return 0


def _judge(options: argparse.Namespace) -> int:
    from flowrl.runs.judges import judge_preferences

    judge_preferences(options.source, options.overrides, _say)
    return 0


def _graphs(options: argparse.Namespace) -> int:
    from flowrl.shipped import folder, graphs

    found = graphs()
    width = max(map(len, found))
    for path, what in found.items():
        _say(f"{path:<{width}}  {what}")
    _say(f"\nthey are in {folder()}; `flowrl init DIR` copies them to DIR/graphs, to run and to edit")
    return 0


def _init(options: argparse.Namespace) -> int:
    from flowrl.shipped import init

    written = init(options.directory)
    _say(f"written: {len(written)} files to {options.directory / 'graphs'}")
    _say(f"try: cd {options.directory} && flowrl check graphs/ppo_async.py")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from flowrl.doctor import diagnose, diagnose_cluster

    return diagnose(_say) if options.address is None else diagnose_cluster(options.address, options.runs_dir, _say)


def _say_aside(line: str) -> None:
    _say(line, aside=True)


if __name__ == "__main__":
    sys.exit(main())
