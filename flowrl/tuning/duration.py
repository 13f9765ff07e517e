"""A rough word on how long a run will take where no earlier run tells: from its model, its tokens and its cores.

Invariants:
- within an order of magnitude of the truth on a CPU like the one of docs/benchmarks.md, with what was assumed in the
  same line;
- where that cannot be, the line says so and why;
- it costs a moment and never the run.

Called by companion.py and `flowrl check`.

Tests: tests/unit/tuning/test_duration.py
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from flowrl.data.examples import read_source
from flowrl.data.models import inspect_model, prepare_model
from flowrl.data.prompts import num_prompts
from flowrl.engines.base import Computing, Serving, Training
from flowrl.errors import number_of
from flowrl.rewards.judging import num_questions
from flowrl.runtime.placement import num_cores
from flowrl.stages.critic import Critic
from flowrl.stages.judge import ModelJudge
from flowrl.stages.prompts import Prompts
from flowrl.stages.sampler import Course, Sampler
from flowrl.telemetry.view import format_duration

if TYPE_CHECKING:
    from flowrl.data.examples import ExampleData
    from flowrl.graph.graph import Graph
    from flowrl.graph.program import Program
    from flowrl.graph.stage import Stage

# Tokens a second on one core for a model of SIZE parameters, as measured in docs/benchmarks.md; larger ones are slower.
SIZE = 135e6
DECODED, TRAINED = 250.0, 130.0
SCORED = 3 * TRAINED  # a forward is a third of a training step
MOST = 30.0  # times as quick a model can be for being small
STEP_S = 1.0  # of every step, whatever the model
UPDATE_S = 1.6  # of a core, for one optimizer step of SIZE parameters
PROMPT = 80  # tokens, with the chat template
QUESTION = 120  # tokens of what a judge is asked around prompt and answers
OBSERVATION = 32  # tokens of an environment's between two turns, with the chat template
CHARACTERS = 4.0  # in a token
LOOKED = 32  # examples whose length is looked at
ENGINES = "flowrl.engines."


class Load(NamedTuple):
    """What a run is to do in each step, in tokens of a sequence."""

    steps: int  # 0: batch inference, all of whose samples are one
    samples: int
    group: int  # samples of one prompt
    response: float  # sampled
    whole: float  # of one sample, with its part of the prompt
    heldout: int  # samples that are drawn for the evaluations of the whole run


def rough_duration(program: Program) -> str:
    """Return a line on how long the run may take, or why that cannot be said."""
    try:
        return _line(program.graph, num_cores())
    except Exception as error:  # an estimate may fail as it likes and must never cost the run
        return f"how long it will take cannot be said before a first run ({type(error).__name__}: {error})"


def _line(graph: Graph, cores: int) -> str:
    load = _load(graph)
    why = "it has neither steps nor prompts" if load is None else _unknown(graph)
    if why or load is None:
        return f"how long it will take cannot be said before a first run: {why}"
    per_device: dict[str, float] = defaultdict(float)
    core_s, first_s, model = 0.0, 0.0, (_given(graph, Sampler) or _given(graph, Course)).model
    for name, stage in graph.nodes.items():
        width = _width(stage, cores)
        node_s, evaluation_s = _node_core_s(stage, model, load)
        core_s += node_s
        per_device[stage.config.share or name] += node_s / width
        first_s += evaluation_s / width
    admission = graph.until.admission
    is_synchronous = admission is not None and admission.max_staleness == 0
    step_s = STEP_S + (sum(per_device.values()) if is_synchronous else max([*per_device.values(), core_s / cores]))
    size = inspect_model(prepare_model(model)).num_parameters
    sampled = f" ({load.response:.0f} of them sampled)" if load.response else ""
    steps = f"{number_of(load.steps, 'step')} of " if load.steps else ""
    samples = number_of(load.samples, "sample")
    return (
        f"about {_in_words(max(1, load.steps) * step_s + first_s)}, give or take a factor of three: {steps}{samples} x "
        f"{load.whole:.0f} tokens{sampled}, a model of {size / 1e6:.3g} million parameters, "
        f"{number_of(cores, 'core')}; another run will be told from this one"
    )


def _in_words(seconds: float) -> str:
    """Return a duration no more exactly than it is known: `12 minutes`, `2h05m`."""
    minutes = max(1, round(seconds / 60))
    return format_duration(60.0 * minutes) if minutes >= 90 else f"{minutes} minute{'s' * (minutes > 1)}"


def _unknown(graph: Graph) -> str:
    """Return what of a graph nothing is known about; "" where all is."""
    for name, stage in graph.nodes.items():
        if stage.config.gpus:
            return f"{name} has GPUs"
        engine = getattr(stage.config, "engine", ENGINES)
        if not engine.startswith(ENGINES):
            return f"{name} has {engine}"
    return ""


def _given(graph: Graph, kind: type[Any]) -> Any:
    """Return what the graph's nodes are given of a kind, which is one and the same for all; None: nothing."""
    values = (value for stage in graph.nodes.values() for value in stage.arguments.values())
    return next((value for value in values if isinstance(value, kind)), None)


def _load(graph: Graph) -> Load | None:
    admission = graph.until.admission
    sampler, course = _given(graph, Sampler), _given(graph, Course)
    if admission is None or not admission.versions:
        asking = next((stage for stage in graph.nodes.values() if isinstance(stage, Prompts)), None)
        if asking is None or not asking.epochs:
            return None
        samples = asking.epochs * num_prompts(asking.sampler.data) * asking.sampler.group_size
        return Load(0, samples, asking.sampler.group_size, *_sampled(asking.sampler), 0)
    if sampler is None:
        if course is None:
            return None
        tokens = _example_tokens(course.data)
        return Load(admission.versions, admission.per_version, 1, 0.0, tokens, course.data.num_heldout)
    repeated = max((getattr(stage.config, "samples", 0) for stage in graph.nodes.values()), default=0)
    every: int = getattr(graph.until.config, "evaluate_every", 0)
    evaluations = 1 + (-(-admission.versions // every) if every else 1)
    heldout = evaluations * repeated * sampler.data.num_heldout
    samples = admission.per_version * sampler.group_size
    return Load(admission.versions, samples, sampler.group_size, *_sampled(sampler), heldout)


def _sampled(sampler: Sampler) -> tuple[float, float]:
    """Return the tokens that a sample has, and those with its part of the prompt and what it observes."""
    sampled = float(sampler.max_response)
    observed = (sampler.max_turns - 1) * OBSERVATION
    return sampled, min(sampled + observed + PROMPT / sampler.group_size, float(sampler.max_model_len))


def _example_tokens(data: ExampleData) -> float:
    """Return the mean tokens of the first examples, by their characters."""
    rows = read_source(data, data.sources[0], bad=lambda error: None)
    sizes = [len(msgspec.json.encode(row.columns)) / CHARACTERS for row in itertools.islice(rows, LOOKED)]
    return min(sum(sizes) / max(1, len(sizes)), 2.0 * data.max_tokens)


def _width(stage: Stage, cores: int) -> int:
    """Return how many cores a node works on at once."""
    config: Any = stage.config
    return min(cores, config.threads * config.ranks * config.replicas) if isinstance(config, Serving | Computing) else 1


def _node_core_s(stage: Stage, model: str, load: Load) -> tuple[float, float]:
    """Return the seconds of a core that a node takes in each step, and in the evaluations of the whole run."""
    config: Any = stage.config
    if not isinstance(config, Serving | Computing):
        return 0.0, 0.0
    size = inspect_model(prepare_model(getattr(stage, "model", "") or model)).num_parameters
    faster = min(MOST, SIZE / max(1, size))
    if isinstance(stage, ModelJudge):
        return _judged_core_s(stage.config, load) / faster, 0.0
    if isinstance(config, Serving):
        return load.samples * load.response / (DECODED * faster), load.heldout * load.response / (DECODED * faster)
    scored_s = load.samples * load.whole / (SCORED * faster)
    if not isinstance(config, Training):
        return scored_s, 0.0
    passes: int = getattr(config, "epochs", 1)
    trained_s = passes * load.samples * load.whole / (TRAINED * faster)
    updated = 0.0 if config.lora.rank else size / SIZE
    updates_s = passes * getattr(config, "minibatches", 1) * UPDATE_S * updated
    valued_s = scored_s if isinstance(stage, Critic) else 0.0
    evaluated_s = 0.0 if load.response else 2 * load.heldout * load.whole / (SCORED * faster)
    return trained_s + updates_s + valued_s, evaluated_s


def _judged_core_s(config: ModelJudge.Config, load: Load) -> float:
    """Return the seconds of a core in which a judge of SIZE parameters judges a step's samples."""
    shown = QUESTION + PROMPT + load.response * (2 if config.rubric.way == "pairs" else 1)
    written = config.max_tokens if config.verdict == "written" else 0
    questions = load.samples / load.group * num_questions(config.rubric, load.group, "model_judge")
    return questions * (shown / SCORED + written / DECODED)
