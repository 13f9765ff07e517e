"""Profiles: read, refused, and measured: what is put into a simulated run comes out of its events again."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from flowrl.errors import ConfigError
from flowrl.graph.program import load_program, plan_of
from flowrl.messages import FIRST_HELDOUT
from flowrl.simulation.clock import run_virtual
from flowrl.simulation.costs import CallCost, DecodeCost, NodeProfile, Profile, Spread, load_profile, pace
from flowrl.simulation.decoding import Arrival, replay
from flowrl.simulation.devices import Decoder, Device
from flowrl.simulation.profiler import Contention, ProfileFile, Profiler, ReplicaDevice, nonnegative, places
from flowrl.telemetry.events import Evaluation, Span
from tests.support.command import ROOT
from tests.support.flows import flow, random_settings
from tests.support.timed_past import events_of
from tests.unit.telemetry.streams import random_run, span

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flowrl.telemetry.events import Event

CORES = {name: ReplicaDevice("cores", 1.0, {}) for name in ("generator", "learner", "critic", "reference")}


def test_a_spread_is_read_between_its_quantiles() -> None:
    spread = Spread(quantiles=(0.0, 10.0, 40.0))
    assert [spread.at(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 5.0, 10.0, 25.0, 40.0]
    assert Spread(quantiles=(7.0,)).at(0.3) == 7.0


def test_speed_grows_with_the_number_running_up_to_its_limit() -> None:
    cost = DecodeCost(step_s=0.01, sample_s=0.001)
    assert cost.tokens_per_s(10) == pytest.approx(500)
    assert cost.tokens_per_s(1e6) == pytest.approx(1000, rel=1e-3)


def test_a_profile_is_read_from_a_file_or_from_a_run(tmp_path: Path) -> None:
    known = Profile(format=1, nodes={"learner": NodeProfile(calls={"train": CallCost(call_s=2.0)})})
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(known))
    assert load_profile(tmp_path) == load_profile(tmp_path / "profile.json") == known


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("format: 2\nnodes: {}", "is of profile format 2, this flowrl reads 1"),
        ("nodes: {}", "is of profile format None"),
        ("format: 1", "missing required field `nodes`"),
        ("format: 1\nnodes: {a: {calls: {train: {call_s: -1}}}}", ">= 0"),
        ("{", "is not valid YAML"),
    ],
)
def test_a_profile_that_cannot_be_used_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_profile(path)
    assert said in str(error.value)


def test_a_missing_profile_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile\.json: cannot be read"):
        load_profile(tmp_path)


@pytest.mark.parametrize("seed", range(10))
def test_a_fit_finds_the_parts_and_no_negative_one(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows = np.stack([np.ones(50), draw.uniform(10, 100, 50)], axis=1)
    assert nonnegative(rows, rows @ [2.0, 0.1]) == pytest.approx([2.0, 0.1])
    fitted = nonnegative(rows, 50 - 0.3 * rows[:, 1])  # falls with the tokens, which no cost does
    assert fitted[1] == 0
    assert rows @ fitted == pytest.approx(np.full(50, (50 - 0.3 * rows[:, 1]).mean()))


def test_parts_that_cannot_be_told_apart_share_alike() -> None:
    rows = np.array([[1.0, 64.0]] * 10)
    step_s, sample_s = nonnegative(rows, np.full(10, 2.0))
    assert (step_s, 64 * sample_s) == pytest.approx((1.0, 1.0))


def test_work_is_what_a_span_would_have_taken_alone() -> None:
    spans = {
        "learner": [span("learner", "step 0", 0.0, 4.0, 1)],
        "critic": [span("critic", "value", 2.0, 3.0, 1)],
        "reference": [span("reference", "reference", 5.0, 6.0, 1)],
    }
    one = Contention(spans, CORES, 1)  # type: ignore[arg-type]
    assert [one.of(own[0]) for own in spans.values()] == pytest.approx([3.5, 0.5, 1.0])
    two = Contention(spans, CORES, 2)  # type: ignore[arg-type]
    assert two.of(spans["learner"][0]) == pytest.approx(4.0)


def test_cores_that_all_work_are_slower_by_what_they_lose_to_each_other() -> None:
    spans = {
        "learner": [span("learner", "step 0", 0.0, 4.0, 1)],
        "critic": [span("critic", "value", 2.0, 3.0, 1)],
    }
    lossy = Contention(spans, CORES, 2, 0.2)  # type: ignore[arg-type]
    assert [lossy.of(own[0]) for own in spans.values()] == pytest.approx([3.8, 0.8])
    wide = {**CORES, "learner": ReplicaDevice("cores", 2.0, {})}
    assert Contention({"learner": spans["learner"]}, wide, 2, 0.2).of(spans["learner"][0]) == pytest.approx(4.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "cores", "slowdown", "speed"),
    [(0, 2, 0.2, 1.0), (1, 2, 0.2, 1.0), (2, 2, 0.2, 0.8), (4, 2, 0.2, 0.4), (2, 3, 0.2, 0.9), (2, 1, 0.2, 0.5)],
)
def test_the_pace_of_cores_follows_how_many_work(width: int, cores: int, slowdown: float, speed: float) -> None:
    assert pace(width, cores, slowdown) == pytest.approx(speed)


def test_a_gpu_is_shared_only_by_those_that_sit_on_it() -> None:
    graph = {
        "nodes": {
            "learner": {"arguments": {"config": {"gpus": 1.0, "share": "", "engine": "a:A"}}},
            "critic": {"arguments": {"config": {"gpus": 0.0, "share": "learner", "engine": "a:A"}}},
            "reference": {"arguments": {"config": {"gpus": 0.0, "share": "", "engine": "a:A", "threads": 2}}},
        }
    }
    where = places(graph)
    spans = {name: [span(name, "x", 0.0, 4.0, 1)] for name in where}
    contention = Contention(spans, where, 8)  # type: ignore[arg-type]
    assert {name: contention.of(own[0]) for name, own in spans.items()} == pytest.approx(
        {"learner": 2.0, "critic": 2.0, "reference": 4.0}
    )


# What is put in comes out.

TRUTH = {
    "generator": NodeProfile(
        decode=DecodeCost(step_s=0.04, sample_s=0.01),
        calls={"update_pause": CallCost(call_s=0.3), "update_transfer": CallCost(call_s=0.2)},
    ),
    "learner": NodeProfile(calls={"train": CallCost(call_s=0.5, token_s=0.02), "publish": CallCost(call_s=0.25)}),
}
LENGTHS = Spread(quantiles=(1.0, 3.0, 4.0, 8.0), shared=0.4)


def told(truth: Profile, *, steps: int) -> Sequence[Event]:
    settings = replace(random_settings(0), groups_per_step=3, window=1, generators=1, scorers=1, depth=8, score_s=0.0,
                       filter_every=0, max_staleness=1, initial=6)  # fmt: skip
    return events_of(flow(settings), truth, steps=steps)


@pytest.mark.parametrize("seed", range(10))
def test_a_replay_ends_where_the_simulated_engine_does(seed: int) -> None:
    draw = random.Random(seed)
    cost = DecodeCost(step_s=0.05, sample_s=0.01, prompt_token_s=0.002)
    starts_s = sorted(draw.uniform(0.0, 20.0) for _ in range(20))
    requests = [(s, draw.randint(1, 90), [draw.randint(1, 40) for _ in range(draw.randint(1, 5))]) for s in starts_s]

    async def ends_s() -> list[float]:
        decoder = Decoder(cost, Device(1), max_running=8)

        async def one(start_s: float, prompt_tokens: int, lengths: list[int]) -> float:
            await asyncio.sleep(start_s)
            await decoder.decode(lengths, prompt_tokens)
            return asyncio.get_running_loop().time()

        return await asyncio.gather(*(one(*request) for request in requests))

    arrivals = [Arrival(start_s, prompt, lengths, 0.0) for start_s, prompt, lengths in requests]
    replayed = replay(arrivals, (cost.step_s, cost.sample_s, cost.prompt_token_s), 8)
    assert replayed.ends_s == pytest.approx(run_virtual(ends_s()))


@pytest.mark.slow
@pytest.mark.parametrize(("cores", "slowdown"), [(1.0, 0.0), (2.0, 0.0), (2.0, 0.3)])
def test_what_a_run_cost_is_found_in_its_events(cores: float, slowdown: float) -> None:
    truth = Profile(format=1, cores=cores, slowdown=slowdown, nodes=TRUTH, response_tokens=LENGTHS,
                    prompt_tokens=Spread(quantiles=(5.0,)))  # fmt: skip
    profiler = Profiler()
    profiler.consume(told(truth, steps=20))
    found = profiler.profile(CORES, cores=cores, slowdown=slowdown)
    train, publish = found.nodes["learner"].calls["train"], found.nodes["learner"].calls["publish"]
    for tokens in (50, 80):  # of a step
        assert train.seconds(tokens) == pytest.approx(TRUTH["learner"].calls["train"].seconds(tokens), rel=0.15)
    assert publish.call_s == pytest.approx(0.25, rel=0.3)
    decode = found.nodes["generator"].decode
    assert decode is not None
    for running in (2, 4):
        assert decode.tokens_per_s(running) == pytest.approx(TRUTH["generator"].decode.tokens_per_s(running), rel=0.2)  # type: ignore[union-attr]
    assert found.nodes["generator"].calls["update_pause"].call_s == pytest.approx(0.3)
    assert found.nodes["generator"].calls["update_transfer"].call_s == pytest.approx(0.2)
    assert found.response_tokens.at(0.5) == pytest.approx(LENGTHS.at(0.5), abs=0.5)
    assert found.prompt_tokens.at(0.5) == 5.0


def test_what_a_step_costs_is_told_from_scoring_where_every_step_has_as_many_tokens() -> None:
    made = [
        Span(node="generator", replica=0, name="generate", start_s=v, end_s=v + 0.5, groups=[v],
             args={"tokens": 100, "samples": 1, "prompt_tokens": 0, "lengths": [100]})
        for v in range(8)
    ]  # fmt: skip
    scored = [span("reference", "reference", 10.0 * v, 10.0 * v + 1.0, v) for v in range(8)]
    spans = [span("learner", f"step {v}", 10.0 * v + 2, 10.0 * v + 7.0, v) for v in range(8)]
    profiler = Profiler()
    profiler.consume([*made, *scored, *spans])
    where = {node: ReplicaDevice("cores", 1.0, {"engine": "a:A"}) for node in ("generator", "reference", "learner")}
    found = profiler.profile(where, cores=8, slowdown=0.0)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Profile) == found
    train = found.nodes["learner"].calls["train"]
    forward_s = found.nodes["reference"].calls["score"].token_s
    assert train.token_s == pytest.approx(3 * forward_s)
    assert train.seconds(100) == pytest.approx(5.0)


def test_steps_of_several_passes_are_told_by_optimizer_step() -> None:
    spans = [span("learner", f"step {v}", 10.0 * v, 10.0 * v + 6.0, v) for v in range(5)]
    made = [
        Span(node="generator", replica=0, name="generate", start_s=v, end_s=v + 0.5, groups=[v],
             args={"tokens": 10 * (v + 1), "samples": 1, "prompt_tokens": 0, "lengths": [10 * (v + 1)]})
        for v in range(5)
    ]  # fmt: skip
    profiler = Profiler()
    profiler.consume([*made, *spans])
    where = {**CORES, "learner": ReplicaDevice("cores", 1.0, {"epochs": 2, "minibatches": 3})}
    train = profiler.profile(where, cores=8, slowdown=0.0).nodes["learner"].calls["train"]
    assert train.call_s == pytest.approx(1.0)  # every step took 6 s whatever its tokens: six optimizer steps
    assert train.token_s == pytest.approx(0.0, abs=1e-9)


def test_the_part_of_the_groups_that_is_learned_is_told_from_their_numbers() -> None:
    profiler = Profiler()
    profiler.consume([span("learner", f"step {v}", v, v + 0.5, 5 + 4 * v, 7 + 4 * v) for v in range(4)])
    profiler.consume([span("learner", "step 4", 4.0, 4.5, FIRST_HELDOUT)])
    assert profiler.profile(CORES, cores=8, slowdown=0.0).learned == pytest.approx(8 / 15)  # 5, 7, 9 to 19
    assert Profiler().profile(CORES, cores=8, slowdown=0.0).learned == 1.0


def test_what_is_selected_costs_the_tokens_that_are_left_from_then_on() -> None:
    profiler = Profiler()
    for v in range(8):
        sampled, left = 100 * (1 + v), 10 * (1 + v % 3)
        profiler.consume([
            Span(node="generator", replica=0, name="generate", start_s=10.0 * v, end_s=10.0 * v + 1, groups=[v],
                 args={"tokens": sampled, "samples": 4, "prompt_tokens": 0, "lengths": [sampled // 4] * 4}),
            span("judge", "score", 10.0 * v + 1, 10.0 * v + 1 + 0.01 * sampled, v),
            Span(node="select", replica=0, name="select", start_s=10.0 * v + 9, end_s=10.0 * v + 9, groups=[v],
                 args={"tokens": left - 4, "samples": 2, "prompt_tokens": 2}),
            span("learner", f"step {v}", 10.0 * v + 9, 10.0 * v + 9 + 0.02 * left, v),
        ])  # fmt: skip
    found = profiler.profile(CORES, cores=8, slowdown=0.0).nodes
    assert found["judge"].calls["score"].token_s == pytest.approx(0.01)
    assert found["learner"].calls["train"].token_s == pytest.approx(0.02)
    assert "select" not in found


def test_an_examination_beside_training_is_no_work_of_the_learner_s() -> None:
    profiler = Profiler()
    steps = [span("learner", f"step {v}", 10.0 * v, 10.0 * v + 5.0, v) for v in range(8)]
    made = [span("generator", "generate", 10.0 * v - 1.0, 10.0 * v, v) for v in range(8)]
    scores = Evaluation(version=4, time_s=40.0, scores=[[1.0]] * 3, completions=[], sets={"hard": [[0.0]] * 2})
    profiler.consume([*made, *steps, span("learner", "examined v4", 40.0, 79.0), scores])
    where = {name: ReplicaDevice("cores", 1.0, {"engine": "a:A"}) for name in ("generator", "learner")}
    found = profiler.profile(where, cores=1, slowdown=0.0)
    assert "score" not in found.nodes["learner"].calls
    assert found.nodes["learner"].calls["train"].call_s == pytest.approx(5.0)
    assert found.heldout == 5


def test_the_sink_writes_a_profile_that_can_be_read(tmp_path: Path) -> None:
    graph = flow(random_settings(1))
    (tmp_path / "graph.json").write_bytes(msgspec.json.encode(plan_of(graph)))
    sink = ProfileFile(tmp_path)
    events = list(random_run(random.Random(0).randrange(100)))
    for first in range(0, len(events), 7):
        sink.consume(events[first : first + 7])
    sink.close()
    assert {"generator", "reward", "learner"} <= set(load_profile(tmp_path).nodes)


def test_a_run_of_no_steps_leaves_no_profile(tmp_path: Path) -> None:
    (tmp_path / "graph.json").write_bytes(msgspec.json.encode(plan_of(flow(random_settings(1)))))
    sink = ProfileFile(tmp_path)
    sink.consume([span("generator", "generate", 0.0, 1.0, 1)])
    sink.close()
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.slow
def test_what_a_node_settles_from_another_s_settings_stands_in_its_plan() -> None:
    program = load_program(ROOT / "graphs" / "ppo_async.py", overrides=["critic.minibatches=0", "learner.epochs=2"])
    graph = msgspec.to_builtins(plan_of(program.graph))
    critic, learner = (places(graph)[node].config for node in ("critic", "learner"))
    for name in ("epochs", "minibatches"):  # the critic's are 0 in the settings: the policy's
        assert critic[name] == learner[name] > 0
