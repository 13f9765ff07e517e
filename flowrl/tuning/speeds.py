"""How long each part of a graph takes on hardware it has not run on, as a profile that the simulator reads.

A roofline, no more: operations over what a GPU does, bytes over what its memory or its link carries, with one share of
each that programs reach in practice. It ranks placements, it does not promise seconds; a run's own profile replaces it
(`flowrl simulate --profile`). On CPUs the rates are those of docs/benchmarks.md for a core. Called by the planner.

Tests: tests/unit/tuning/test_planner.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowrl.engines.base import Computing, Serving, Training
from flowrl.simulation.costs import FORMAT, CallCost, DecodeCost, NodeProfile, Profile, Spread
from flowrl.tuning.duration import DECODED, MOST, SCORED, SIZE, TRAINED
from flowrl.tuning.memory import cache_width, served_weights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flowrl.graph.stage import StageConfig
    from flowrl.tuning.machines import Site
    from flowrl.tuning.memory import Work
    from flowrl.tuning.shapes import Shape

REACHED = 0.4  # of a GPU's operations, in training and in reading prompts
READ = 0.6  # of its memory's bandwidth, in decoding
LAUNCH_S = 0.004  # of a decoding step, whatever the model
SPLIT = 0.85  # what each doubling of tensor parallelism leaves of a GPU's speed
LINK = 20e9  # bytes a second to another GPU or the host, for weights and offloaded states
DISK = 1e9  # bytes a second to the disk, where a CPU's states sleep
MOVE_S = 0.3  # of going to sleep or waking, whatever the model
RESTART_S = 5.0  # of vLLM's engine, which cannot sleep on CPUs
SMALL = 1500  # tokens of a micro-batch at which a GPU reaches half of what it can
SLOWDOWN = 0.2  # of a core while all the others work
TYPICAL = 0.6  # of the longest response: the mean


def profile_of(
    configs: Mapping[str, StageConfig],
    shapes: Mapping[str, Shape],
    work: Work,
    site: Site,
    *,
    running: Mapping[str, int],
) -> Profile:
    """Return a profile of every node of a graph; `running` are the samples for which a generator has room."""
    nodes: dict[str, NodeProfile] = {}
    for name, config in configs.items():
        if name not in shapes:
            nodes[name] = NodeProfile(calls={"score": CallCost(call_s=0.005)})
        elif site.speed is None:
            nodes[name] = _on_cores(config, shapes[name])
        elif isinstance(config, Serving):
            nodes[name] = _decoding(config, shapes[name], work, site, running.get(name, config.max_running))
        else:
            assert isinstance(config, Computing)
            nodes[name] = _computing(config, shapes[name], site)
    longest = float(work.response)
    return Profile(
        format=FORMAT,
        cores=float(max(1, site.machine.cores)),
        slowdown=SLOWDOWN if site.speed is None else 0.0,
        prompt_tokens=Spread(quantiles=(work.prompt / 2, float(work.prompt))),
        response_tokens=Spread(quantiles=(longest * (2 * TYPICAL - 1), longest)),
        nodes=nodes,
    )


def _decoding(config: Serving, shape: Shape, work: Work, site: Site, running: int) -> NodeProfile:
    assert site.speed is not None
    parts = config.tensor_parallel
    over = max(1.0, config.replicas * parts / max(1, len(site.machine.gpus)))  # replicas that share a device's time
    gain = parts * SPLIT ** (parts.bit_length() - 1) / over
    tokens = work.prompt + TYPICAL * work.response / 2  # of a sample, halfway
    experts = shape.num_parameters - (shape.num_parameters - shape.active if shape.expert_parameters else 0.0) * (
        max(0.0, 1 - running * shape.routed)
    )
    flops = site.speed.flops * REACHED * gain
    carried = site.speed.bandwidth * READ * gain
    sample_s = cache_width(config) * shape.kv * tokens / carried + 2 * (shape.active + shape.embedding) / flops
    weights = 2.0 * shape.num_parameters
    width = served_weights(shape, config, on_gpu=True) / shape.num_parameters  # on average
    return NodeProfile(
        decode=DecodeCost(
            step_s=LAUNCH_S + width * experts / carried,
            sample_s=sample_s,
            prompt_token_s=2 * shape.active / flops,
            log_sigma=0.1,
            running=(1.0, float(running)),
        ),
        calls={
            "update_transfer": CallCost(call_s=weights / LINK),
            "update_pause": CallCost(call_s=0.2),
            "sleep": CallCost(call_s=MOVE_S + weights / parts / LINK),
            "wake": CallCost(call_s=MOVE_S + weights / parts / LINK),
        },
    )


def _computing(config: Computing, shape: Shape, site: Site) -> NodeProfile:
    assert site.speed is not None
    budget = config.micro_batch_tokens
    flops = site.speed.flops * REACHED * budget / (budget + SMALL)
    sharded = 1.15 if config.zero_stage == 3 and config.ranks > 1 else 1.0
    sharded *= 1.5 if config.offload_parameters else 1.0
    each = 2 * (shape.active + (0 if shape.has_score else shape.embedding)) * sharded / flops
    calls = {"score": CallCost(call_s=0.01, token_s=each)}
    if isinstance(config, Training):
        again = 4 / 3 if config.gradient_checkpointing and config.checkpoint_keeps == "inputs" else 1.0
        offloaded = 16.0 * shape.num_parameters / LINK if config.offload_optimizer else 0.0  # of one rank, shared below
        weights = 2.0 * shape.num_parameters
        calls |= {
            "train": CallCost(call_s=0.05 + offloaded, token_s=3 * each * again),
            "publish": CallCost(call_s=weights / LINK),
            "transfer": CallCost(call_s=weights / LINK),
        }
    sharded_over = config.ranks if isinstance(config, Training) or config.zero_stage == 3 else 1
    held = (16.0 if isinstance(config, Training) else 2.0) * shape.num_parameters / sharded_over
    move = CallCost(call_s=MOVE_S + held / LINK)
    return NodeProfile(calls=calls | {"sleep": move, "wake": move})


def _on_cores(config: StageConfig, shape: Shape) -> NodeProfile:
    """Return what a node takes on one core."""
    faster = min(MOST, SIZE / max(1, shape.num_parameters))
    if isinstance(config, Serving):
        # 16 samples together are decoded at three quarters of the rate of many
        sample_s = 1 / (DECODED * faster)
        running, read_s = (1.0, float(config.max_running)), sample_s / 3
        decode = DecodeCost(step_s=8 * sample_s, sample_s=sample_s, prompt_token_s=read_s, running=running)
        calls = {"sleep": CallCost(call_s=MOVE_S), "wake": CallCost(call_s=RESTART_S)}
        return NodeProfile(decode=decode, calls=calls)
    calls: dict[str, Any] = {"score": CallCost(call_s=0.05, token_s=1 / (SCORED * faster))}
    if isinstance(config, Training):
        calls["train"] = CallCost(call_s=0.2, token_s=1 / (TRAINED * faster))
    held = (16.0 if isinstance(config, Training) else 4.0) * shape.num_parameters
    calls |= dict.fromkeys(("sleep", "wake"), CallCost(call_s=MOVE_S + held / DISK))
    return NodeProfile(calls=calls)
