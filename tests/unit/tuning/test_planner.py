import re
from pathlib import Path

import pytest

from flowrl.cli import main
from flowrl.engines.base import Serving, Training
from flowrl.graph.program import load_program
from flowrl.simulation.run import simulate
from flowrl.tuning import search
from flowrl.tuning.machines import parse_site
from flowrl.tuning.planner import Planner
from tests.support.command import ROOT

GRAPHS = ROOT / "graphs"
LONG = ["data.max_prompt_tokens=1024", "sampling.max_tokens=1024", "generator.max_model_len=2048", "groups_per_step=64",
        "generator.group_size=1"]  # fmt: skip
pytestmark = pytest.mark.slow


def planned(graph, on, *settings, recipe=""):
    planner = Planner(parse_site(on), {})
    config = GRAPHS / "recipes" / f"{recipe}.yaml" if recipe else None
    program = load_program(GRAPHS / f"{graph}.py", config=config, overrides=[*settings], placing=planner)
    assert planner.plan is not None
    return planner.plan, program


def test_what_is_left_open_is_placed_and_what_the_user_sets_is_kept():
    kept = ["generator.replicas=1", "learner.zero_stage=3", "learner.gradient_checkpointing=false", "learner.ranks=6"]
    plan, program = planned("ppo_async", "8x80GB", "model=meta-llama/Meta-Llama-3-8B-Instruct", *LONG, *kept)
    nodes = program.graph.nodes
    assert (nodes["generator"].config.replicas, nodes["learner"].config.ranks) == (1, 6)
    assert (nodes["learner"].config.zero_stage, nodes["learner"].config.gradient_checkpointing) == (3, False)
    assert nodes["generator"].config.gpus
    assert not {"generator.replicas", "learner.ranks", "learner.zero_stage"} & plan.values.keys()
    assert plan.placed.configs == {name: stage.config for name, stage in nodes.items()}


def test_a_model_of_8b_on_8_devices_fits_and_says_so_in_three_lines():
    plan, _ = planned("ppo_async", "8x80GB", "model=meta-llama/Meta-Llama-3-8B-Instruct", *LONG)
    assert plan.fits
    assert max(plan.placed.devices) <= 0.97 * 80e9
    assert len(plan.lines(whole=False)) <= 3
    assert plan.samples_per_s > 0


def test_no_candidate_is_simulated_twice_to_tell_of_the_second_best(monkeypatch):
    simulated = []

    def noted(graph, profile, **settings):
        simulated.append([stage.config for stage in graph.nodes.values()])
        return simulate(graph, profile, **settings)

    monkeypatch.setattr(search, "simulate", noted)
    plan, _ = planned("ppo_async", "4x80GB")
    assert 1 < len(simulated) <= search.SIMULATED
    assert not [each for place, each in enumerate(simulated) if each in simulated[:place]]
    assert " gives " in plan.reasons[-1]


def test_the_same_request_gives_the_same_plan():
    one, other = (planned("group_async", "2x80GB", "model=Qwen/Qwen3-8B", *LONG)[0] for _ in range(2))
    assert one.lines() == other.lines()


@pytest.mark.parametrize(
    ("graph", "on", "model"),
    [
        ("ppo_async", "2x8x80GB,host=2TB", "meta-llama/Llama-2-70b-chat-hf"),  # OpenRLHF paper, table 1
        ("ppo_async", "4x24GB,host=512GB", "meta-llama/Llama-2-7b-chat-hf"),
        ("preference", "8x80GB,host=1TB", "codellama/CodeLlama-34b-hf"),
        ("group_async", "2xH800,host=1TB", "Qwen/Qwen3-8B"),  # verl, docs/perf/device_tuning.rst: 7B on 2
    ],
)  # fmt: skip
def test_what_others_publish_to_fit_fits(graph, on, model):
    settings = [] if graph == "preference" else LONG
    assert planned(graph, on, f"model={model}", *settings)[0].fits


@pytest.mark.parametrize(
    ("graph", "on", "settings"),
    [
        # 7B and 8B, every weight trained by Adam on one device of 80 GB: tatsu-lab/stanford_alpaca issue 56
        ("sft", "1x80GB", ["model=meta-llama/Llama-2-7b-chat-hf", "learner.offload_optimizer=false",
                           "learner.offload_parameters=false"]),
        # 70B, ZeRO-3 and everything offloaded, in 1 TB of host memory: axolotl-ai-cloud/axolotl issue 1439
        ("sft", "8x80GB,host=1TB", ["model=meta-llama/Llama-2-70b-chat-hf"]),
        # 8B, ZeRO-2 with the optimizer offloaded, on 2 x 40 GB: ZHZisZZ/dllm issue 9
        ("sft", "2xA100-40GB,host=1TB", ["model=meta-llama/Meta-Llama-3-8B-Instruct", "learner.zero_stage=2",
                                         "learner.offload_optimizer=false"]),
    ],
)  # fmt: skip
def test_what_others_found_not_to_fit_does_not_and_something_that_would_is_named(graph, on, settings):
    plan, _ = planned(graph, on, *settings)
    assert not plan.fits
    assert plan.remedies


SAYS_WHERE = re.compile(r"`flowrl plan --on (\S+)` its memory.*graphs/(\w+)\.py", re.DOTALL)
WHERE = {
    path.stem: found for path in (GRAPHS / "recipes").glob("*.yaml") if (found := SAYS_WHERE.search(path.read_text()))
}


@pytest.mark.parametrize("recipe", sorted(WHERE))
def test_a_recipe_fits_where_it_says_as_it_is(recipe):
    on, graph = WHERE[recipe].groups()
    plan, _ = planned(graph, on, recipe=recipe)
    assert plan.fits, plan.placed.lacks
    saved = {"zero_stage", "gradient_checkpointing", "offload_optimizer", "ranks", "tensor_parallel"}
    assert not {path for path in plan.values if path.rpartition(".")[2] in saved}


def test_recipes_say_where_what_others_publish_to_fit_does():
    assert {"llama2-70b-ppo", "codellama-34b-dpo", "mixtral-8x7b-ppo"} <= WHERE.keys()


def test_a_smaller_critic_is_among_what_would_fit():
    plan, _ = planned("ppo_async", "2x8x80GB,host=1TB", "model=meta-llama/Llama-2-70b-chat-hf", *LONG)
    assert not plan.fits
    assert any("critic_model" in remedy for remedy in plan.remedies)


def test_on_two_cores_each_role_gets_both():
    """Measured, GRPO on SmolLM2-135M: 18.6 s a step with two threads each, 20.9 with a core each."""
    plan, program = planned("group_async", "cpu,cores=2,host=24GB")
    threads = {stage.config.threads for stage in program.graph.nodes.values()
               if isinstance(stage.config, Serving | Training)}  # fmt: skip
    assert threads == {2}
    assert plan.fits
    assert "2 threads" in plan.lines(whole=False)[0]


def test_a_generator_beside_training_has_its_cache_in_bytes_and_one_alone_what_vllm_finds():
    beside, program = planned("ppo_async", "1x80GB")
    generator = program.graph.nodes["generator"].config
    assert generator.share
    assert not generator.turns
    held = sum(process.need.device_bytes for process in beside.placed.processes)
    assert generator.kv_cache_bytes > 1e9
    assert held <= 0.97 * 80e9
    _, program = planned("ppo_async", "2x80GB", "generator.gpus=1")
    assert program.graph.nodes["generator"].config.kv_cache_bytes == 0


def test_several_generators_on_a_gpu_and_stages_of_a_pipeline_are_counted():
    plan, program = planned("ppo_async", "2x80GB", "generator.share=learner", "generator.replicas=4")
    assert plan.fits
    assert program.graph.nodes["generator"].config.gpu_memory_utilization <= 0.47
    piped = "generator.engine_options.pipeline_parallel_size=2"
    plan, program = planned("ppo_async", "8x80GB", piped)
    assert plan.fits
    of_replica = [len(each.devices) for each in plan.placed.processes if each.node == "generator"]
    assert set(of_replica) == {2 * program.graph.nodes["generator"].config.tensor_parallel}


def test_settings_that_do_not_go_with_the_rules_cost_no_remedy():
    odd = ["learner.ranks=8", "learner.gpus=1", "generator.share=learner", "generator.turns=true"]
    split = ["generator.replicas=3", "generator.tensor_parallel=3"]
    plan, _ = planned("ppo_async", "8x80GB", "model=meta-llama/Llama-2-70b-chat-hf", *odd, *split, *LONG)
    assert {f"leave generator.{name} to the plan" for name in ("replicas", "tensor_parallel")} <= set(plan.remedies)


def test_replicas_that_share_a_devices_time_gain_nothing_by_it():
    shared = ["model=Qwen/Qwen3-8B", "generator.share=learner", "generator.turns=true", "generator.tensor_parallel=2"]
    one, two = (
        planned("group_async", "2xH800,host=1TB", *shared, f"generator.replicas={replicas}", *LONG)[0].samples_per_s
        for replicas in (1, 2)
    )
    assert two <= 1.02 * one


def test_where_nothing_fits_something_is_said(capsys):
    graph = str(GRAPHS / "ppo_async.py")
    assert main(["plan", graph, "--on", "1x24GB", "--set", "model=meta-llama/Llama-2-70b-chat-hf"]) == 1
    assert "would fit: " in capsys.readouterr().out


def test_a_plan_refuses_what_the_engine_does_not_take(capsys):
    graph, option = str(GRAPHS / "ppo_async.py"), "generator.engine_options.kv_cach_dtype=fp8"
    assert main(["plan", graph, "--on", "1x80GB", "--set", option]) == 2
    assert "did you mean 'kv_cache_dtype'" in capsys.readouterr().err


def test_given_placement_is_left_alone():
    planner = Planner(parse_site("8x80GB"), {})
    program = load_program(GRAPHS / "group_async.py", overrides=["placement=given"], placing=planner)
    assert program.graph.nodes["learner"].config.gpus == 0
    assert planner.plan is None
    assert planner.lines(whole=True)


@pytest.mark.parametrize("graph", sorted(path.stem for path in GRAPHS.glob("*.py")))
def test_every_shipped_graph_has_a_plan_that_splits_no_model_into_parts_of_heads(graph):
    plan, program = planned(graph, "4x24GB,host=1TB")
    assert plan.placed.processes
    parts = [
        stage.config.tensor_parallel for stage in program.graph.nodes.values() if isinstance(stage.config, Serving)
    ]
    assert not [each for each in parts if 9 % each]  # heads of SmolLM2-135M, the default


LARGE = ["falcon-7b-rloo", "llama2-7b-ppo", "llama3-8b-ppo", "mistral-7b-dapo", "qwen3-8b-grpo"]


@pytest.mark.parametrize(
    "recipe", [pytest.param(each, marks=[] if "mistral" in each else pytest.mark.long) for each in LARGE]
)
def test_every_large_recipe_has_a_plan_without_fetching_anything(recipe):
    graph = "ppo_async" if recipe.endswith("ppo") else "group_async"
    plan, _ = planned(graph, "2x8x80GB,host=2TB", recipe=recipe)
    assert plan.fits, plan.placed.lacks


def test_a_run_goes_on_by_the_rules_where_nothing_is_known_of_its_model(tmp_path):
    planner = Planner(parse_site("2x80GB"), {}, is_for_run=True)
    program = load_program(GRAPHS / "sft.py", overrides=[f"model={tmp_path}/none"], placing=planner)
    assert program.graph.nodes["learner"].config.gpus == 1
    assert "is not here" in planner.lines(whole=True)[0]


def test_the_command_says_what_fits_by_its_exit_code(capsys):
    command = ["plan", str(GRAPHS / "sft.py"), "--set", "model=meta-llama/Llama-2-7b-chat-hf"]
    assert main([*command, "--on", "4x80GB"]) == 0
    assert "GPU 0-3  learner" in capsys.readouterr().out
    assert main([*command, "--on", "1x16GB,host=32GB"]) == 1
    assert "does not fit: " in capsys.readouterr().out
    assert main([*command, "--on", "many"]) == 2
    assert main([*command, "--on", "8x80GB", "--model-config", str(Path("none.json"))]) == 2
