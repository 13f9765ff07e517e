"""AlpacaEval: a model's answers against a baseline's, preferred by a judge, in alpaca_eval's files: `flowrl eval`.

    FILE                              in: the baseline's outputs: [{"instruction", "output", "generator"}, ...]
    OUT/NAME/model_outputs.json       out: the model's, in the same form
    OUT/NAME/ANNOTATOR/annotations.json   out: with output_1 (the baseline's), output_2 (the model's) and preference,
                                      1 to 2; null where no verdict could be read

Either output is also taken as it is: `flowrl eval model_outputs.json`, or `flowrl eval annotations.json`, of which the
win rates are computed again (runs/win_rates.py). The judge is asked with an annotator of alpaca_eval (its configs.yaml:
one order, drawn from the instruction as upstream draws it), or with our own prompt in both orders.

Invariants:
- a number is called AlpacaEval only where that annotator's own judge gave all preferences;
- a verdict that cannot be read is no preference, and counted.

Called by `flowrl eval --alpaca-eval`.

Tests: tests/contracts/test_judged_benchmarks.py
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import re
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec

from flowrl.config import read_yaml
from flowrl.errors import ConfigError, DataError, number_of, said_briefly
from flowrl.rewards.judging import WHO, verdict_in
from flowrl.runs.answering import digest_of, for_each
from flowrl.runs.judged import Lines, answer_all, given, judging, length_note, order_note, settle
from flowrl.runs.results import Answers, Results, Score, conclude, directory
from flowrl.runs.win_rates import LengthControl, raw, read_gamed
from flowrl.telemetry.files import replace_file
from flowrl.telemetry.scores import bootstrap, difference_of, score_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flowrl.runs.answering import Answer, EvalRequest, Say
    from flowrl.runs.judged import Bench, Contender, JudgedSettings

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"  # whose preferences are AlpacaEval 2's
NUM_INSTRUCTIONS = 805
TIE = 1.5
SWITCH = "is_switched_outputs"  # alpaca_eval draws each instruction's order from this, the instruction and its seed
SWITCH_SEED = "123"
CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
OURS = (
    "Compare the two in a few sentences: which does better what was asked? Neither their order nor their length "
    "counts. Then give your verdict on the last line: [[A]] if A is better, [[B]] if B is, [[C]] for a tie."
)


class Output(msgspec.Struct, frozen=True):
    """One answer in alpaca_eval's outputs."""

    instruction: str
    output: str
    generator: str = ""
    dataset: str = ""


class Annotation(msgspec.Struct, frozen=True, kw_only=True):
    """One preference in alpaca_eval's annotations."""

    instruction: str
    output_1: str
    generator_1: str
    output_2: str
    generator_2: str
    annotator: str
    dataset: str = ""
    preference: float | None
    preference_raw_completion: Any = None
    first_won: list[float] = []  # of verdicts for one of the two: whether it was the one shown first


class Annotator(msgspec.Struct, frozen=True, kw_only=True):
    """How a judge is asked and read."""

    name: str
    template: list[dict[str, str]] = []  # messages with gaps; []: our own
    model: str = ""  # that its preferences are meant to be of
    asked: dict[str, Any] = {}  # fields of the request
    parser: Literal["ours", "logprob_parser", "regex_parser"] = "ours"
    options: dict[str, Any] = {}


def evaluate(request: EvalRequest, say: Say) -> Results:
    """Have the instructions answered and judged; print win rates and write results.json.

    Raises:
        UserError: a file, a model, a server or a setting is not what it should be.
    """
    assert request.alpaca_eval is not None
    recorded = {
        target: read_annotations(Path(target))
        for target in (request.target, request.against)
        if target.endswith(".json") and _is_annotated(Path(target))
    }
    needs_judge = len(recorded) < 1 + bool(request.against)
    settings, contenders = settle(request, say, needs_judge=needs_judge)
    gamed = read_gamed(Path(settings.gamed)) if settings.gamed else None
    annotator = read_annotator(settings) if needs_judge else None
    baseline = read_outputs(request.alpaca_eval)[: request.limit or None] if needs_judge else []
    results = Results(benchmark="AlpacaEval", seed=request.seed, limit=request.limit, of=Answers(target=request.target))
    sides = [results.of]
    if request.against:
        results.against = Answers(target=request.against)
        sides.append(results.against)
    controls: list[LengthControl] = []
    for contender, answers in zip(contenders, sides, strict=True):
        annotations = recorded.get(contender.target)
        if annotations is None:
            assert annotator is not None
            outputs = _outputs(contender, baseline, settings, request, say)
            annotations, note = _annotated(contender, baseline, outputs, annotator, settings, request, say)
            results.notes.append(note)
        _score_raw(answers, annotations, request.seed)
        results.notes += _trust(annotations)
        lengths = [(len(each.output_1), len(each.output_2)) for each in annotations]
        try:
            controls.append(LengthControl([each.preference for each in annotations], lengths, gamed))
        except DataError as error:
            results.notes.append(f"{contender.name} has no {error.where}: {error.what}")
            continue
        _score_even(answers, controls[-1], len(annotations), request.seed, is_gamed=gamed is not None)
    if results.against is not None:
        _compare(results, controls)
    if not results.of.scores[0].task.startswith("AlpacaEval"):
        why = f"that is {ANNOTATOR}'s win rate over {NUM_INSTRUCTIONS} instructions, given by its own judge"
        results.notes.append(f"not to be called AlpacaEval: {why}")
    return conclude(results, directory(request.directory), say)


def read_outputs(path: Path) -> list[Output]:
    """Return the answers in an outputs file.

    Raises:
        DataError: it is none, or answers an instruction twice.
    """
    outputs = _read(path, list[Output], "alpaca_eval's outputs: a list of instruction, output and generator")
    if len({each.instruction for each in outputs}) < len(outputs):
        raise DataError(str(path), "answers an instruction twice", "leave one of them")
    return outputs


def read_annotations(path: Path) -> list[Annotation]:
    """Return recorded preferences.

    Raises:
        DataError: the file is none, or a preference is not 1 to 2.
    """
    found = _read(path, list[Annotation], "alpaca_eval's annotations")
    for number, row in enumerate(found, 1):
        if row.preference == -1:  # how alpaca_eval stores that there is none
            found[number - 1] = msgspec.structs.replace(row, preference=None)
        elif row.preference is not None and not (1 <= row.preference <= 2 or row.preference == 0):
            raise DataError(f"{path}, row {number}", f"has the preference {row.preference:g}", "give 1 to 2, or null")
    return found


def _read(path: Path, kind: Any, what: str) -> Any:
    body = given(path, what)
    try:
        found = msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        line = body[: _offset(error)].count(b"\n") + 1
        raise DataError(f"{path}, line {line}" if line > 1 else str(path), f"is not {what} ({error})") from error
    if not found:
        raise DataError(str(path), "holds no rows", f"give {what}")
    return found


def _offset(error: Exception) -> int:
    found = re.search(r"byte (\d+)", str(error))
    return int(found.group(1)) if found else 0


def _is_annotated(path: Path) -> bool:
    rows = _read(path, list[dict[str, Any]], "alpaca_eval's outputs or annotations")
    return "preference" in rows[0]


def read_annotator(settings: JudgedSettings) -> Annotator:
    """Return how the judge is asked: as an annotator of alpaca_eval says, or in our own way.

    Raises:
        ConfigError: the file is none, or asks or reads in a way that is not known here.
    """
    if not settings.prompts:
        return Annotator(name=f"flowrl_{settings.judge.model}".replace("/", "_"))
    path = Path(settings.prompts)
    found = read_yaml(path, "give an annotator's configs.yaml")
    if not isinstance(found, dict) or len(found) != 1 or not isinstance(config := next(iter(found.values())), dict):
        raise ConfigError(str(path), "does not name one annotator", "give one of alpaca_eval's evaluators_configs")
    name = str(next(iter(found)))
    parser = config.get("fn_completion_parser", "regex_parser")
    if parser not in ("logprob_parser", "regex_parser"):
        raise ConfigError(
            f"{path}, {name}", f"reads verdicts by {parser}", "give one by logprob_parser or regex_parser"
        )
    file = path.parent.parent / str(config.get("prompt_template"))
    template = given(file, "the prompt_template, as it lies in evaluators_configs").decode(errors="replace")
    messages = [{"role": role, "content": text.strip()} for role, text in CHATML.findall(template)]
    if not messages or not all(gap in template for gap in ("{instruction}", "{output_1}", "{output_2}")):
        what = "is not ChatML with {instruction}, {output_1} and {output_2}"
        raise ConfigError(str(file), what, "give one of alpaca_eval's")
    where = f"{path}, {name}"
    asked = dict(_mapping(config.get("completions_kwargs"), f"{where}.completions_kwargs"))
    model = str(asked.pop("model_name", ""))
    options = dict(_mapping(config.get("completion_parser_kwargs"), f"{where}.completion_parser_kwargs"))
    _check_parser(options, where)
    if model != settings.judge.model:
        name = f"{name}_{settings.judge.model}".replace("/", "_")
    return Annotator(name=name, template=messages, model=model, asked=asked, parser=parser, options=options)


def _mapping(found: Any, where: str) -> dict[str, Any]:
    if found is not None and not isinstance(found, dict):
        raise ConfigError(where, f"is a {type(found).__name__}", "write names and values")
    return cast("dict[str, Any]", found or {})


def _check_parser(options: dict[str, Any], where: str) -> None:
    """Insist that verdicts can be read by what an annotator says of them.

    Raises:
        ConfigError: they cannot.
    """
    tokens = options.get("denominator_tokens")
    if tokens is not None and not isinstance(tokens, list):
        raise ConfigError(f"{where}.denominator_tokens", f"is a {type(tokens).__name__}", "write a list of tokens")
    try:
        for value, pattern in _mapping(options.get("outputs_to_match"), f"{where}.outputs_to_match").items():
            float(value)
            re.compile(str(pattern))
    except (ValueError, TypeError, re.error) as error:
        raise ConfigError(f"{where}.outputs_to_match", said_briefly(error), "write preference: pattern") from error


def _outputs(
    contender: Contender, baseline: list[Output], settings: JudgedSettings, request: EvalRequest, say: Say
) -> dict[str, Output]:
    """Return a model's answers by instruction, having it write those that are not there yet."""
    prepared = contender.prepared
    if prepared is None:
        outputs = {each.instruction: each for each in read_outputs(Path(contender.target))}
        if missing := sum(each.instruction not in outputs for each in baseline):
            what = f"{missing} of {len(baseline)} instructions are not answered"
            raise DataError(contender.target, what, "have all answered")
        return outputs
    home = request.directory / contender.name
    digest = digest_of([prepared.digest, settings.answer_tokens])
    lines = Lines(home / f"outputs-{digest}.jsonl")
    done = {row["instruction"] for row in lines.rows}

    async def write(asked: Output, answer: Answer) -> None:
        messages = [{"role": "user", "content": asked.instruction}]
        text = await answer(messages, temperature=0.0, max_tokens=settings.answer_tokens, seed=request.seed)
        row = {"instruction": asked.instruction, "output": text, "generator": contender.name}
        lines.add(row | ({"dataset": asked.dataset} if asked.dataset else {}))

    todo = [each for each in baseline if each.instruction not in done]
    try:
        if todo:
            asyncio.run(answer_all(contender, settings, request, say, todo, write))
    finally:
        lines.close()
    outputs = {row["instruction"]: msgspec.convert(row, Output) for row in lines.rows}
    ordered = [outputs[each.instruction] for each in baseline]
    replace_file(home / "model_outputs.json", msgspec.json.format(msgspec.json.encode(ordered), indent=2))
    return outputs


def _annotated(
    contender: Contender, baseline: list[Output], outputs: dict[str, Output], annotator: Annotator,
    settings: JudgedSettings, request: EvalRequest, say: Say,
) -> tuple[list[Annotation], str]:  # fmt: skip
    """Return the preferences, in the baseline's order; the judge is asked for those that are not there yet."""
    home = request.directory / contender.name / annotator.name
    asked_by = digest_of([annotator, settings.judge.model, settings.judge.temperature, settings.judge.max_tokens])
    lines = Lines(home / f"annotations-{asked_by}.jsonl")
    pairs = {each.instruction: (each.output, outputs[each.instruction].output) for each in baseline}
    lines.keep(lambda row: pairs.get(row["instruction"]) == (row["output_1"], row["output_2"]))
    done = {row["instruction"] for row in lines.rows}
    todo = [each for each in baseline if each.instruction not in done]

    async def judged() -> str:
        async with judging(settings, len(todo), say) as bench:

            async def one(asked: Output) -> None:
                found = await _preference(asked, outputs[asked.instruction], annotator, bench)
                if found is None:
                    return
                preference, text, first = found
                lines.add(msgspec.to_builtins(Annotation(
                    instruction=asked.instruction, dataset=asked.dataset, output_1=asked.output,
                    generator_1=asked.generator or "baseline", output_2=outputs[asked.instruction].output,
                    generator_2=contender.name, annotator=annotator.name, preference=preference,
                    preference_raw_completion=text, first_won=first,
                )))  # fmt: skip

            await for_each(todo, one, at_once=settings.judge.concurrency)
            if lost := bench.counts["failed"]:
                lacking = number_of(lost, "instruction")
                say(f"{lacking} got no verdict, for the judge failed; the same command asks them again")
            return f"{bench.counts['refused']} refused; {bench.cost()}"

    say(
        f"{len(todo)} of {len(baseline)} preferences are asked of {settings.judge.model}; they are kept in {lines.path}"
    )
    try:
        note = asyncio.run(judged())
    finally:
        lines.close()
    found = {row["instruction"]: msgspec.convert(row, Annotation) for row in lines.rows}
    annotations = [found[each.instruction] for each in baseline if each.instruction in found]
    replace_file(home / "annotations.json", msgspec.json.format(msgspec.json.encode(annotations), indent=2))
    return annotations, note


async def _preference(
    asked: Output, answer: Output, annotator: Annotator, bench: Bench
) -> tuple[float | None, Any, list[float]] | None:
    """Return the preference for the model's answer, what was said, and whether the first shown won; None: nothing."""
    if asked.output == answer.output:
        return TIE, None, []
    orders = [False, True]
    if annotator.template:
        seed = SWITCH + asked.instruction + SWITCH_SEED
        orders = random.Random(seed).choices([False, True], k=1)
    preferences: list[float] = []
    texts: list[str] = []
    first: list[float] = []
    for is_switched in orders:
        shown = (answer.output, asked.output) if is_switched else (asked.output, answer.output)
        said = await bench.ask(_messages(annotator, asked.instruction, shown), **annotator.asked)
        if said is None:
            return None
        texts.append(said.text)
        preference = read_preference(said.text, said.likeliest, annotator)
        if preference is None:
            return None if said.is_refusal else (None, texts, first)
        if preference != TIE:
            first.append(float(preference < TIE))
        preferences.append(3 - preference if is_switched else preference)
    return sum(preferences) / len(preferences), texts if len(texts) > 1 else texts[0], first


def _messages(annotator: Annotator, instruction: str, shown: tuple[str, str]) -> list[dict[str, str]]:
    """Return what the judge is asked; an answer's own braces and marks stay what they are."""
    if annotator.template:
        gaps = {"instruction": instruction, "output_1": shown[0], "output_2": shown[1]}
        fill = re.compile(r"\{(instruction|output_1|output_2)\}")
        return [
            {**message, "content": fill.sub(lambda found: gaps[found.group(1)], message["content"])}
            for message in annotator.template
        ]
    material = {"instruction": instruction, "answer A": shown[0], "answer B": shown[1]}
    mark = hashlib.blake2b(msgspec.json.encode(material), digest_size=6).hexdigest()
    parts = [f"<{name} {mark}>\n{text}\n</{name} {mark}>" for name, text in material.items()]
    return [{"role": "user", "content": "\n\n".join([WHO, *parts, OURS])}]


def read_preference(text: str, likeliest: Sequence[dict[str, float]], annotator: Annotator) -> float | None:
    """Return the preference for the answer shown second, 1 to 2; None where it cannot be read."""
    match annotator.parser:
        case "logprob_parser":
            return _by_logprobs(likeliest[0] if likeliest else {}, annotator.options)
        case "regex_parser":
            patterns = annotator.options.get("outputs_to_match") or {}
            said = [float(key) for key, each in patterns.items() for _ in re.finditer(str(each), text)]
            return said[0] if len(said) == 1 and 1 <= said[0] <= 2 else None  # of several upstream takes none
        case _:
            return {"a": 1.0, "b": 2.0, "c": TIE}.get(verdict_in(text) or "")


def _by_logprobs(likeliest: dict[str, float], options: dict[str, Any]) -> float | None:
    """Return 2 minus the share of the token that means the first answer."""
    first, both = str(options.get("numerator_token")), [str(each) for each in options.get("denominator_tokens") or []]
    known = {token: value for token, value in likeliest.items() if token in {first, *both}}
    if not known:
        return None
    if options.get("is_binarize", True):
        mine = known.get(first, -math.inf)
        return 1.0 if all(mine > known.get(token, -math.inf) for token in both if token != first) else 2.0
    total = sum(math.exp(known[token]) for token in both if token in known)
    return 2 - math.exp(known[first]) / total if first in known and total else 2.0


def _score_raw(answers: Answers, annotations: list[Annotation], seed: int) -> None:
    """Add the win rate."""
    won = raw([each.preference for each in annotations])
    annotators = {each.annotator for each in annotations}
    if not won:
        raise DataError(answers.target, "no preference can be read", "take a judge that keeps to the form")
    is_named = annotators == {ANNOTATOR} and len(annotations) == NUM_INSTRUCTIONS
    task = "AlpacaEval 2" if is_named else f"preferred by {', '.join(sorted(annotators))}"
    score = Score(task=task, metric="win rate, %", bounds=score_of(won, None, seed=seed).times(100))
    answers.scores.append(score)
    answers.items[score.key] = [each.preference for each in annotations]
    answers.digests[score.key] = [digest_of([each.instruction]) for each in annotations]


def _score_even(answers: Answers, control: LengthControl, num: int, seed: int, *, is_gamed: bool) -> None:
    """Add the win rate at equal lengths; its interval is of instructions drawn again at the penalty it was given."""
    even = 100 * fmean(control.predicted())
    spread = bootstrap(num, control.drawn, seed).times(100)
    metric = "length-controlled win rate, %" if is_gamed else "length-controlled win rate, %, by these answers alone"
    bounds = msgspec.structs.replace(spread, value=even)
    answers.scores.append(Score(task=answers.scores[0].task, metric=metric, bounds=bounds))


def _compare(results: Results, controls: list[LengthControl]) -> None:
    """Add the differences of the win rates, instruction by instruction."""
    assert results.against is not None
    (raw_ours, *even_ours), (raw_theirs, *even_theirs) = results.of.scores, results.against.scores
    digests = results.of.digests[raw_ours.key], results.against.digests[raw_theirs.key]
    theirs = dict(zip(digests[1], results.against.items[raw_theirs.key], strict=True))
    pairs = [(one, theirs.get(at)) for at, one in zip(digests[0], results.of.items[raw_ours.key], strict=True)]
    both = [(one, other) for one, other in pairs if one is not None and other is not None]
    if not both:
        results.notes.append("not compared: no instruction was judged, and could be read, for both")
        return
    bounds = difference_of(raw([one for one, _ in both]), raw([other for _, other in both]), None, seed=results.seed)
    results.differences.append(msgspec.structs.replace(raw_ours, bounds=bounds.times(100)))
    if even_ours and even_theirs and digests[0] == digests[1]:
        one, other = controls
        num = even_ours[0].bounds.num
        spread = bootstrap(num, lambda drawn: one.drawn(drawn) - other.drawn(drawn), results.seed).times(100)
        bounds = msgspec.structs.replace(spread, value=even_ours[0].bounds.value - even_theirs[0].bounds.value)
        results.differences.append(msgspec.structs.replace(even_ours[0], bounds=bounds))


def _trust(annotations: list[Annotation]) -> list[str]:
    """Return what the preferences can be trusted in."""
    read = [each for each in annotations if each.preference is not None]
    ties = sum(each.preference in (0, TIE) for each in read)
    num, tied = number_of(len(annotations), "preference"), number_of(ties, "tie")
    notes = [f"{num}: {tied}, {len(annotations) - len(read)} cannot be read"]
    notes.append(order_note([first for each in annotations for first in each.first_won]))
    longer = [float(len(each.output_2) - len(each.output_1)) for each in read]
    notes.append(length_note(longer, raw([each.preference for each in read])))
    return [note for note in notes if note]
