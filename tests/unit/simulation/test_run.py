"""Predictions against arithmetic: one simulated flow of the real stages, on costs that a reader can add up."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flowrl.cli import main
from flowrl.errors import ConfigError, RunError
from flowrl.graph.graph import Graph
from flowrl.graph.program import load_program
from flowrl.runtime.holder import LINGER_S
from flowrl.simulation.costs import CallCost, DecodeCost, NodeProfile, Profile, Spread
from flowrl.simulation.run import simulate
from flowrl.simulation.stand_ins import lacking
from flowrl.telemetry.events import Cause
from flowrl.tuning.tune import Trial, pareto
from tests.support.flows import FlowSettings, flow, random_settings

if TYPE_CHECKING:
    from flowrl.simulation.prediction import Prediction

GRAPH = Path(__file__).resolve().parents[3] / "graphs" / "ppo_async.py"
PLAIN = replace(
    random_settings(0), groups_per_step=4, window=1, generators=1, scorers=1, depth=8, filter_every=0, score_s=0.0
)
TAIL = Spread(quantiles=(1.0, 2.0, 3.0, 4.0, 8.0))


quick = functools.partial(simulate, detail="causes")


def graph(max_staleness: int, settings: FlowSettings = PLAIN) -> Graph:
    initial = (max_staleness + 1) * settings.groups_per_step
    return flow(replace(settings, max_staleness=max_staleness, initial=initial, window=1))


def profile(
    *, token_s: float = 0.1, train_s: float = 0.4, tokens: Spread | float = 8.0, cores: float = 16.0, **rest: Any
) -> Profile:
    """Costs of a decoding step, however many samples run, and of a training step."""
    spread = tokens if isinstance(tokens, Spread) else Spread(quantiles=(tokens,))
    generator = NodeProfile(decode=DecodeCost(step_s=token_s), calls=rest.pop("generator_calls", {}))
    learner = NodeProfile(calls={"train": CallCost(call_s=train_s), **rest.pop("learner_calls", {})})
    nodes = {"generator": generator, "learner": learner}
    return Profile(format=1, cores=cores, response_tokens=spread, nodes=nodes, **rest)


def test_a_synchronous_step_takes_the_sum_of_its_stages() -> None:
    found = quick(graph(0), profile())
    # two rounds of two groups (max_groups=2) of 8 tokens, then the training step
    assert found.steps_per_s == pytest.approx(1 / (2 * 0.8 + 0.4))
    assert found.shares["generator"][Cause.COMPUTE] == pytest.approx(0.8)
    assert found.shares["learner"][Cause.COMPUTE] == pytest.approx(0.2)
    assert found.staleness == {0: 4 * found.num_steps}


@pytest.mark.parametrize(("train_s", "slowest", "bottleneck"), [(0.4, 1.6, "generator"), (3.0, 3.0, "learner")])
def test_an_asynchronous_step_takes_as_long_as_the_slowest_stage(
    train_s: float, slowest: float, bottleneck: str
) -> None:
    found = quick(graph(1), profile(train_s=train_s))
    assert found.steps_per_s == pytest.approx(1 / slowest)
    assert found.bottleneck == bottleneck
    assert found.shares[bottleneck][Cause.COMPUTE] == pytest.approx(1.0)
    assert max(found.staleness) <= 1


def test_one_generator_of_fixed_speed_learns_as_many_tokens_as_it_makes() -> None:
    found = quick(graph(2), profile(token_s=0.05, train_s=0.0))
    assert found.tokens_per_s == pytest.approx(2 * 2 / 0.05)  # two groups of two samples at a time
    assert found.samples_per_s == pytest.approx(found.tokens_per_s / 8)


def test_two_generators_are_twice_as_fast_while_they_are_the_bottleneck() -> None:
    one = quick(graph(2), profile(train_s=0.0))
    two = quick(graph(2, replace(PLAIN, generators=2)), profile(train_s=0.0))
    assert two.samples_per_s == pytest.approx(2 * one.samples_per_s, rel=0.02)


def test_the_tail_costs_a_synchronous_run_more_than_an_asynchronous_one() -> None:
    mean = sum((*TAIL.quantiles[1:-1], 4.5)) / 4  # of the straight lines between the quantiles
    sync, ahead = (quick(graph(stale), profile(tokens=TAIL, train_s=0.0), steps=20) for stale in (0, 3))
    assert ahead.samples_per_s > 1.1 * sync.samples_per_s
    assert sync.tokens_per_s / sync.samples_per_s == pytest.approx(mean, rel=0.25)


def test_stages_on_one_core_slow_each_other_down() -> None:
    apart = quick(graph(1), profile(train_s=1.6))
    together = quick(graph(1), profile(train_s=1.6, cores=1.0))
    assert apart.steps_per_s == pytest.approx(1 / 1.6)
    assert together.steps_per_s == pytest.approx(1 / 3.2, rel=0.02)
    assert together.devices["cores"] == pytest.approx(1.0, abs=0.01)


def test_a_pause_for_new_weights_takes_its_time_from_generation() -> None:
    calls = {"update_pause": CallCost(call_s=0.5)}
    found = quick(graph(1), profile(generator_calls=calls))
    assert found.steps_per_s == pytest.approx(1 / (1.6 + 0.5), rel=0.05)


def test_what_a_version_costs_the_learner_besides_is_in_its_step() -> None:
    found = quick(graph(1), profile(train_s=2.0, learner_calls={"publish": CallCost(call_s=0.5)}))
    assert found.steps_per_s == pytest.approx(1 / 2.5)


def test_in_turns_a_step_takes_the_sum_of_its_stages_and_of_going_to_sleep_and_waking() -> None:
    moves = {"sleep": CallCost(call_s=0.5), "wake": CallCost(call_s=0.25)}
    costs = profile(generator_calls=moves, learner_calls=moves)
    found = quick(graph(0, replace(PLAIN, turn_limit_s=900.0)), costs)
    assert found.steps_per_s == pytest.approx(1 / (2 * 0.8 + 0.4 + 2 * (0.5 + 0.25 + LINGER_S)), rel=0.01)
    assert found.shares["learner"][Cause.WAIT_DEVICES] > 2 * found.shares["learner"][Cause.COMPUTE]
    ahead = quick(graph(1, replace(PLAIN, turn_limit_s=900.0)), costs)
    beside = quick(graph(1), costs)
    assert ahead.steps_per_s < beside.steps_per_s, "whoever takes turns overlaps nothing"
    assert max(ahead.staleness) <= 1


def test_a_message_takes_its_time_on_every_queue() -> None:
    found = quick(graph(0), profile(token_s=0.0, train_s=0.0, message_s=0.1))
    assert found.steps_per_s <= 1 / 0.6 + 1e-6  # into and out of three queues


def test_a_whole_run_ends_after_its_steps_and_admits_no_more() -> None:
    found = quick(graph(1), profile(), steps=5, is_whole=True)
    assert (found.num_warmup, found.num_steps) == (1, 4)
    assert found.time_s(5) == pytest.approx(found.first_step_s + 4 / found.steps_per_s)


def test_queues_are_looked_at_and_stay_within_their_depth() -> None:
    found = simulate(graph(3), profile(train_s=3.0))
    fill = found.queues["scorer.samples -> learner.samples"]
    assert 0 < fill.mean <= fill.max <= fill.depth == 16
    assert fill.mean_bytes > 0


def predicted(seed: int) -> Prediction:
    generator = profile().nodes["generator"]
    learner = NodeProfile(calls={"train": CallCost(call_s=0.7, log_sigma=0.4)})
    nodes = {"generator": generator, "learner": learner}
    costs = Profile(format=1, cores=2, message_s=0.001, response_tokens=TAIL, nodes=nodes)
    return quick(graph(1, random_settings(seed)), costs, steps=6)


@pytest.mark.parametrize("seed", range(6))
def test_the_same_setting_gives_the_same_prediction_and_keeps_the_bound(seed: int) -> None:
    first = predicted(seed)
    assert first == predicted(seed)
    assert max(first.staleness) <= 1


def test_a_profile_without_a_node_is_refused_by_name() -> None:
    known = profile()
    lacking = Profile(format=1, nodes={"generator": known.nodes["generator"]})
    with pytest.raises(ConfigError, match="no costs of node 'learner'"):
        quick(graph(1), lacking)


def test_a_graph_that_admits_nothing_is_refused() -> None:
    whole = graph(1)
    with pytest.raises(ConfigError, match="Credits"):
        simulate(Graph(nodes=whole.nodes, edges=whole.edges[:-1], until=whole.until), profile())


JUDGE = "judge.server.url=http://127.0.0.1:1/v1 judge.server.model=rater"


@pytest.mark.parametrize("name", ["ppo_async", "group_async", "iterative_dpo", "rejection", "distill_online"])
@pytest.mark.parametrize(
    "more",
    [
        "seed=1", JUDGE, "model_judge.model=tiny", "reward_models=[tiny]", "replay.ratio=0.5", "evaluation.beside=1",
        "learner.evaluate_every=2 evaluation.sets.hard=hard.jsonl",
    ],
)  # fmt: skip
def test_whatever_settings_add_to_a_shipped_graph_says_how_it_is_simulated(name: str, more: str) -> None:
    known = load_program(GRAPH.with_name(f"{name}.py")).settings.__struct_fields__
    if more.partition(".")[0].partition("=")[0] in known:
        assert lacking(load_program(GRAPH.with_name(f"{name}.py"), overrides=more.split()).graph) == ""


def test_a_graph_that_trains_nothing_is_refused() -> None:
    generating = load_program(GRAPH.with_name("generate.py")).graph
    assert lacking(generating) == "trains nothing"
    with pytest.raises(ConfigError, match="trains nothing"):
        simulate(generating, profile())


def selecting(name: str, learned: float, *more: str, within_s: float = 100.0) -> Prediction:
    """Eight groups of four a step, decoded four samples at a time, which takes as long as all the rest together."""
    settings = [
        "groups_per_step=8",
        "generator.group_size=4",
        "generator.max_running=4",
        "sampling.max_tokens=8",
        *more,
    ]
    nodes = {
        "generator": NodeProfile(decode=DecodeCost(step_s=0.1)),
        **{node: NodeProfile(calls={"score": CallCost(call_s=1e-3)}) for node in ("reward", "reference")},
        "learner": NodeProfile(calls={"train": CallCost(call_s=1e-3)}),
    }
    costs = Profile(format=1, cores=8, response_tokens=Spread(quantiles=(8.0,)), nodes=nodes, learned=learned)
    return quick(load_program(GRAPH.with_name(f"{name}.py"), overrides=settings).graph, costs, within_s=within_s)


@pytest.mark.parametrize(("name", "num_samples"), [("rejection", 1), ("iterative_dpo", 2), ("group_async", 4)])
def test_as_many_groups_are_filtered_as_in_the_profile(name: str, num_samples: int) -> None:
    whole, half = selecting(name, 1.0), selecting(name, 0.5)
    for found in (whole, half):
        assert found.samples_per_s / found.steps_per_s == pytest.approx(8 * num_samples)
    assert whole.steps_per_s == pytest.approx(1 / 6.4, rel=0.01)  # eight groups of 8 tokens, 0.1 s each
    assert half.steps_per_s == pytest.approx(0.5 / 6.4, rel=0.15)


@pytest.mark.parametrize(("beside", "step_s"), [(0, 6.4 + 1.6), (1, 6.4)])
def test_an_evaluation_takes_its_time_from_the_generators_or_has_one_of_its_own(beside: int, step_s: float) -> None:
    asked = ["learner.evaluate_every=2", "data.num_heldout=4", "evaluation.samples=4", f"evaluation.beside={beside}"]
    found = selecting("group_async", 1.0, *asked)
    assert found.steps_per_s == pytest.approx(1 / step_s, rel=0.05)
    assert not any("left out" in note for note in found.notes)
    assert ("examiner" in found.shares) == (beside == 1)
    before_and_after = selecting("group_async", 1.0, "learner.evaluate_every=0", *asked[1:])
    assert before_and_after.notes[0].startswith("left out: evaluation")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["humans_dpo", "humans_ppo"])
def test_people_take_the_time_that_the_settings_say(name: str) -> None:
    settings = ["groups_per_step=8", "generator.max_running=4", "sampling.max_tokens=8", "humans.judgment_s=20"]
    nodes = {
        "generator": NodeProfile(decode=DecodeCost(step_s=0.01)),
        "reference": NodeProfile(calls={"score": CallCost(call_s=1e-3)}),
        "reward_model": NodeProfile(calls={"score": CallCost(call_s=1e-3)}),
        "critic": NodeProfile(calls={"score": CallCost(call_s=1e-3)}),
        "learner": NodeProfile(calls={"train": CallCost(call_s=1e-3)}),
    }
    costs = Profile(format=1, cores=8, response_tokens=Spread(quantiles=(8.0,)), nodes=nodes, learned=1.0)
    one, two = (
        quick(load_program(GRAPH.with_name(f"{name}.py"), overrides=[*settings, f"humans.people={k}"]).graph, costs)
        for k in (1, 2)
    )
    assert one.steps_per_s == pytest.approx(1 / 160, rel=0.01)  # eight judgments of 20 s
    assert two.steps_per_s == pytest.approx(2 / 160, rel=0.01)


def test_a_simulation_ends_within_its_seconds_and_says_how_far_it_came() -> None:
    with pytest.raises(RunError, match=r"0\.1 s were not enough to simulate 14 steps, 0 of them are done"):
        selecting("rejection", 1e-9, within_s=0.1)  # of so many groups none is learned


def trial(samples_per_s: float, mean_staleness: float) -> Trial:
    return Trial(setting={}, samples_per_s=samples_per_s, mean_staleness=mean_staleness, bottleneck="")


def test_the_front_holds_what_nothing_else_beats_in_both() -> None:
    best = [trial(1.0, 0.0), trial(2.0, 0.9), trial(2.5, 2.0)]
    assert pareto([*best, trial(0.9, 0.0), trial(1.9, 1.0), trial(2.5, 3.0)]) == best


@pytest.mark.parametrize("command", ["simulate", "tune"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{format: 0, nodes: {}}", "profile format 0"),
        ("[1, 2", "is not valid YAML"),
        ("{format: 1, nodes: {learner: {speed: 1}}}", "speed"),
        ("{format: 1, nodes: {}}", "no costs of node"),
    ],
)
def test_a_wrong_profile_is_one_line_and_exit_code_2(
    command: str, text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "profile.yaml"
    if text is not None:
        path.write_text(text)
    assert main([command, str(GRAPH), "--profile", str(path)]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert said in printed[0]


HAND = """
format: 1
cores: 2
response_tokens: {quantiles: [2, 4, 8, 16]}
nodes:
  generator: {decode: {step_s: 0.05, sample_s: 0.01}}
  reward: {calls: {score: {call_s: 0.001}}}
  reference: {calls: {score: {call_s: 0.1}}}
  critic: {calls: {score: {call_s: 0.1}, train: {call_s: 1.0}}}
  learner: {calls: {train: {call_s: 2.0}}}
"""


@pytest.mark.slow
def test_a_profile_typed_in_by_hand_predicts_the_ppo_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(HAND)
    assert main(["simulate", str(GRAPH), "--profile", str(path), "--steps", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # on two cores: 16 groups scored twice, a step of the critic and one of the learner, and generation beside them
    assert 0 < found["steps_per_s"] < 2 / (16 * 0.2 + 3.0)
    assert "left out: evaluation" in found["notes"]


@pytest.mark.slow
def test_tuning_recommends_a_setting_that_is_no_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(HAND)
    assert main(["tune", str(GRAPH), "--profile", str(path), "--budget", "12", "--json",
                 "--set", "groups_per_step=2", "--set", "max_staleness=0"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"]["samples_per_s"] >= found["present"]["samples_per_s"] * 0.95
    assert found["sensitivity"]["max_staleness"]["1"] > 1.05
