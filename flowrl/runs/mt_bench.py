"""MT-Bench: questions of two turns, answered by a model and rated by a judge, in FastChat's files: `flowrl eval`.

    DIR/question.jsonl                       in: question_id, category, turns
    DIR/reference_answer/JUDGE.jsonl         in: right answers to questions of mathematics, reasoning and coding
    DIR/model_answer/NAME.jsonl              out: choices[0].turns
    DIR/model_judgment/JUDGE_single.jsonl    out: score of each turn, -1 where the verdict cannot be read
    DIR/model_judgment/JUDGE_pair.jsonl      out: g1_winner, g2_winner: both orders of two models' answers

They are the directories of fschat's llm_judge (Zheng et al. 2023, 2306.05685), whose show_result.py reads what is
written here and the other way round. The judge is asked with the prompts of a judge_prompts.jsonl, or with our own.

Invariants:
- a number is called MT-Bench only where the judge is gpt-4, the prompts are FastChat's by name and its 80 questions, by
  their ids, were asked;
- a verdict counts for the very answers it was given on;
- a rating that cannot be read is -1 and counted.

Called by `flowrl eval --mt-bench`.

Tests: tests/contracts/test_judged_benchmarks.py
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from flowrl.errors import ConfigError, DataError, number_of, said_briefly
from flowrl.rewards.judging import MOST_POINTS, WHO, points_in, verdict_in
from flowrl.runs.answering import digest_of, for_each
from flowrl.runs.judged import Lines, answer_all, given, judging, length_note, order_note, rows_in, settle
from flowrl.runs.results import Answers, Results, Score, conclude, directory
from flowrl.telemetry.scores import mean_difference, mean_over

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flowrl.runs.answering import Answer, EvalRequest, Say
    from flowrl.runs.judged import Bench, Contender, JudgedSettings

JUDGE = "gpt-4"  # whose ratings with FastChat's prompts, of these questions, are MT-Bench's
QUESTIONS = range(81, 161)
WITH_REFERENCE = frozenset({"math", "reasoning", "coding", "arena-hard-200"})  # categories, as in FastChat
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(WITH_REFERENCE, 0.0)
TEMPERATURES["extraction"] = 0.0
OTHER_TEMPERATURE = 0.7
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
LOOSE_RATING = re.compile(r"\[(\d+\.?\d*)\]")  # what FastChat takes where there is none
UNREAD = -1  # in FastChat's files: no rating
ERROR = "error"  # in FastChat's files: no winner


class BenchQuestion(msgspec.Struct, frozen=True):
    """One question; the second turn follows on the answer to the first."""

    question_id: int | str
    turns: list[str]
    category: str = ""
    reference: list[str] = []
    required_temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None

    @property
    def temperature(self) -> float:
        """Return how its answer is sampled."""
        if self.required_temperature is not None:
            return self.required_temperature
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


class Choice(msgspec.Struct, frozen=True):
    """One of the answers that a model gave to a question's turns."""

    turns: list[str]


class AnsweredQuestion(msgspec.Struct, frozen=True):
    """A line of a model_answer file."""

    question_id: int | str
    choices: Annotated[list[Choice], msgspec.Meta(min_length=1)]


class JudgedLine(msgspec.Struct, frozen=True):
    """A line of a model_judgment file, whoever wrote it; it is of one model, or of two."""

    question_id: int | str
    judge: list[Any]
    turn: int = 1
    model: str | None = None
    score: float | None = None
    model_1: str = ""
    model_2: str = ""
    g1_winner: str = ""
    g2_winner: str = ""
    user_prompt: str | None = None
    g1_user_prompt: str | None = None
    g2_user_prompt: str | None = None

    @property
    def fault(self) -> str:
        """Return why it says nothing; "" where it does."""
        winners = ("model_1", "model_2", "tie", ERROR)
        if self.model is not None:
            return "" if self.score is not None else "has no score"
        bad = [each for each in (self.g1_winner, self.g2_winner) if each not in winners]
        return f"has the winner {bad[0]!r}, not one of {', '.join(winners)}" if bad else ""


class JudgePrompt(msgspec.Struct, frozen=True):
    """How a judge is asked, as in a judge_prompts.jsonl."""

    name: str
    type: Literal["single", "pairwise"]
    system_prompt: str
    prompt_template: str
    output_format: str


class Match(msgspec.Struct, frozen=True):
    """One thing to be judged: a turn of one model, or of two."""

    question: BenchQuestion
    turn: int
    models: list[str]  # sorted
    prompt: JudgePrompt
    texts: list[str]  # what the judge is asked; of two models in this order and in the other

    @property
    def key(self) -> tuple[Any, ...]:
        """Return what a line that judges it is known by."""
        return (self.question.question_id, self.turn, self.prompt.name, *self.models)


def evaluate(request: EvalRequest, say: Say) -> Results:
    """Have the questions answered and judged; print scores and write results.json.

    Raises:
        UserError: a file, a model, a server or a setting is not what it should be.
    """
    assert request.mt_bench is not None
    home = request.mt_bench
    questions = read_questions(home / "question.jsonl")
    questions = questions[: request.limit or None]
    settings, contenders = settle(request, say)
    if settings.way == "pairs" and len(contenders) < 2:
        raise ConfigError("way", "is pairs, but there is one model", "give the other with --against")
    prompts = read_prompts(settings)
    references = _references(home, settings, questions)
    given_answers = {each.name: _answered(each, home, questions, settings, request, say) for each in contenders}
    matches = _matches(questions, given_answers, prompts, references)
    rows, notes = asyncio.run(_judged(matches, home, settings, say))
    foreign = _not_named(settings, questions)
    results = Results(benchmark="MT-Bench", seed=request.seed, limit=request.limit, of=Answers(target=request.target))
    if len(contenders) > 1:
        results.against = Answers(target=request.against)
    names = [each.name for each in contenders]
    task = f"questions of {home.name}, judged by {settings.judge.model}" if foreign else "MT-Bench"
    rated = _ratings(rows, names) if settings.way == "single" else _wins(rows, names)
    _score(results, rated, matches, names, task=task, is_pair=settings.way == "pairs")
    if foreign:
        results.notes.append(f"not to be called MT-Bench: {foreign}")
    lengths = {
        (name, match.question.question_id, match.turn): len(each[match.question.question_id][match.turn - 1])
        for name, each in given_answers.items()
        for match in matches
    }
    results.notes += [*_trust(rows, rated, lengths, names), *notes]
    return conclude(results, directory(request.directory), say)


def _not_named(settings: JudgedSettings, questions: list[BenchQuestion]) -> str:
    """Return why a number is not MT-Bench's; "" where it is."""
    if settings.judge.model != JUDGE:
        return f"the judge is {settings.judge.model}, not {JUDGE}"
    if not settings.prompts:
        return "the prompts are not FastChat's"
    is_whole = {each.question_id for each in questions} == {*QUESTIONS}
    return "" if is_whole else f"{len(questions)} questions were asked, which are not its {len(QUESTIONS)}"


def read_questions(path: Path) -> list[BenchQuestion]:
    """Return the questions of a question.jsonl.

    Raises:
        DataError: a line is none, or its id is an earlier one's.
    """
    questions: dict[int | str, BenchQuestion] = {}
    for number, row in enumerate(rows_in(given(path, "FastChat's question.jsonl"), path), 1):
        try:
            question = msgspec.convert(row, BenchQuestion)
        except msgspec.ValidationError as error:
            remedy = 'write {"question_id": ..., "category": ..., "turns": [...]}'
            raise DataError(f"{path}, question {number}", str(error), remedy) from error
        if not question.turns:
            raise DataError(f"{path}, question {number}", "has no turns", "give one or two")
        if question.question_id in questions:
            raise DataError(f"{path}, question {number}", f"has the id {question.question_id} of another", "number it")
        questions[question.question_id] = question
    return list(questions.values())


def read_prompts(settings: JudgedSettings) -> dict[str, JudgePrompt]:
    """Return the four prompts that are asked with, by use: default, math, default-mt, math-mt.

    Raises:
        ConfigError: the file lacks one of them, or one has a gap that nothing fills.
    """
    kind = "single" if settings.way == "single" else "pair"
    if not settings.prompts:
        return {use: _our_prompt(kind, use) for use in ("default", "math", "default-mt", "math-mt")}
    path = Path(settings.prompts)
    found: dict[str, JudgePrompt] = {}
    for number, row in enumerate(rows_in(given(path, "FastChat's judge_prompts.jsonl"), path), 1):
        try:
            prompt = msgspec.convert(row, JudgePrompt)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{path}, prompt {number}", str(error), "give FastChat's judge_prompts.jsonl") from error
        found[prompt.name] = prompt
    names = {"default": f"{kind}-v1" if kind == "single" else "pair-v2", "math": f"{kind}-math-v1"}
    names |= {f"{use}-mt": f"{name}-multi-turn" for use, name in names.items()}
    for name in names.values():
        if name not in found:
            raise ConfigError(f"{path}", f"has no prompt {name}", "give FastChat's judge_prompts.jsonl")
        _check_gaps(found[name], path)
    return {use: found[name] for use, name in names.items()}


def _check_gaps(prompt: JudgePrompt, path: Path) -> None:
    """Insist that every gap of a prompt is filled.

    Raises:
        ConfigError: one is not.
    """
    answers = ["answer"] if prompt.type == "single" else ["answer_a", "answer_b"]
    turns = (1, 2) if prompt.name.endswith("-multi-turn") else (1,)
    known = ["question", "mark", *answers]
    known += [f"{name}_{turn}" for name in ("question", "ref_answer", *answers) for turn in turns]
    try:
        for text in ("", "x"):
            prompt.prompt_template.format(**dict.fromkeys(known, text))
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        what = f"has a gap that nothing fills ({said_briefly(error)})"
        raise ConfigError(f"{path}, prompt {prompt.name}", what, "mend its prompt_template") from error


def _our_prompt(kind: str, use: str) -> JudgePrompt:
    """Return a prompt of our own: material between marks that it cannot write itself, then what is asked."""
    base, turns = use.removesuffix("-mt"), (1, 2) if use.endswith("-mt") else (1,)
    whose = [""] if kind == "single" else ["_a", "_b"]
    parts: list[str] = []
    for turn in turns:
        shown = {f"question {turn}": f"question_{turn}"}
        shown |= {"right answer, to compare with": f"ref_answer_{turn}"} if base == "math" else {}
        for each in whose:
            shown[f"answer{each.upper().replace('_', ' ')} {turn}"] = f"answer{each}_{turn}"
        parts += [f"<{name} {{mark}}>\n{{{gap}}}\n</{name} {{mark}}>" for name, gap in shown.items()]
    last = " to the last question" if len(turns) > 1 else ""
    if kind == "single":
        parts.append(
            f"Say in a few sentences how helpful, relevant, correct and deep the answer{last} is. Then rate it from 1 "
            "to 10, on the last line, as [[5]]."
        )
    else:
        parts.append(
            f"Compare in a few sentences how helpful, relevant, correct and deep the answers{last} are; neither their "
            "order nor their length counts. Then give your verdict on the last line: [[A]], [[B]], or [[C]] for a tie."
        )
    form = "[[rating]]" if kind == "single" else "[[A]]"
    return JudgePrompt(
        f"flowrl-{kind}-{use}", "single" if kind == "single" else "pairwise", WHO, "\n\n".join(parts), form
    )


def _references(home: Path, settings: JudgedSettings, questions: list[BenchQuestion]) -> dict[int | str, list[str]]:
    """Return the right answers that the judge is shown: of its own file, the only one, or the question's."""
    folder = home / "reference_answer"
    path = folder / f"{settings.judge.model}.jsonl"
    others = sorted(folder.glob("*.jsonl"))
    if not path.is_file() and len(others) == 1:
        path = others[0]
    found = turns_in(rows_in(given(path, "right answers"), path), path) if path.is_file() else {}
    references: dict[int | str, list[str]] = {}
    for question in questions:
        if question.category in WITH_REFERENCE:
            reference = found.get(question.question_id) or question.reference
            if len(reference) < min(2, len(question.turns)):
                what = f"has no right answer to question {question.question_id}, of {question.category}"
                raise DataError(str(path), what, "put it there, or into the question as `reference`")
            references[question.question_id] = reference
    return references


def turns_in(rows: list[dict[str, Any]], path: Path) -> dict[int | str, list[str]]:
    """Return each question's answers, turn by turn.

    Raises:
        DataError: a row has none.
    """
    found: dict[int | str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        try:
            answered = msgspec.convert(row, AnsweredQuestion)
        except msgspec.ValidationError as error:
            raise DataError(f"{path}, answer {number}", str(error), "write FastChat's model_answer format") from error
        found[answered.question_id] = answered.choices[0].turns
    return found


def _answered(
    contender: Contender,
    home: Path,
    questions: list[BenchQuestion],
    settings: JudgedSettings,
    request: EvalRequest,
    say: Say,
) -> dict[int | str, list[str]]:
    """Return a model's answers, having it write those that are not there yet."""
    prepared = contender.prepared
    if prepared is None:
        path = Path(contender.target)
        rows = rows_in(given(path, "a model_answer file"), path)
    else:
        lines = Lines(home / "model_answer" / f"{contender.name}.jsonl")
        digest = digest_of([prepared.digest, settings.answer_tokens])
        if others := sum(row.get("flowrl") != digest for row in lines.rows):
            what = f"{others} of {len(lines.rows)} answers are of another model or other settings"
            raise DataError(str(lines.path), what, "remove it, or give --set name=NAME")
        done = {row["question_id"] for row in lines.rows}
        todo = [question for question in questions if question.question_id not in done]

        async def write(question: BenchQuestion, answer: Answer) -> None:
            messages: list[dict[str, str]] = []
            for place, turn in enumerate(question.turns):
                messages.append({"role": "user", "content": turn})
                asked = dict(temperature=question.temperature, max_tokens=settings.answer_tokens)
                text = await answer(messages, **asked, seed=request.seed + place)
                messages.append({"role": "assistant", "content": text})
            turns = [each["content"] for each in messages if each["role"] == "assistant"]
            lines.add({
                "question_id": question.question_id, "answer_id": digest_of([digest, question.question_id]),
                "model_id": contender.name, "choices": [{"index": 0, "turns": turns}], "tstamp": time.time(),
                "flowrl": digest,
            })  # fmt: skip

        try:
            if todo:
                asyncio.run(answer_all(contender, settings, request, say, todo, write))
        finally:
            lines.sort(lambda row: str(row["question_id"]).zfill(12))
        path, rows = lines.path, lines.rows
    found = turns_in(rows, path)
    answers: dict[int | str, list[str]] = {}
    for question in questions:
        turns = found.get(question.question_id, [])
        if len(turns) < len(question.turns):
            what = f"{len(turns)} turns of question {question.question_id} are answered, of {len(question.turns)}"
            raise DataError(str(path), what, "have all answered")
        answers[question.question_id] = turns
    return answers


def _matches(
    questions: list[BenchQuestion],
    answers: dict[str, dict[int | str, list[str]]],
    prompts: dict[str, JudgePrompt],
    references: dict[int | str, list[str]],
) -> list[Match]:
    """Return all that is to be judged."""
    names = sorted(answers)
    is_pair = prompts["default"].type == "pairwise"
    found: list[Match] = []
    for question in questions:
        use = "math" if question.category in WITH_REFERENCE else "default"
        for turn in range(1, min(2, len(question.turns)) + 1):
            prompt = prompts[f"{use}-mt" if turn == 2 else use]
            for models in [names] if is_pair else [[name] for name in names]:
                told = [answers[name][question.question_id] for name in models]
                orders = [told, told[::-1]] if is_pair else [told]
                reference = references.get(question.question_id, [])
                texts = [_fill(prompt, question, order, reference) for order in orders]
                found.append(Match(question, turn, models, prompt, texts))
    return found


def _fill(prompt: JudgePrompt, question: BenchQuestion, told: Sequence[list[str]], reference: list[str]) -> str:
    gaps = {"question": question.turns[0]}
    for turn in range(min(2, len(question.turns))):
        gaps[f"question_{turn + 1}"] = question.turns[turn]
        gaps |= {f"ref_answer_{turn + 1}": reference[turn]} if reference else {}
        for side, answers in zip([""] if len(told) == 1 else ["_a", "_b"], told, strict=True):
            gaps[f"answer{side}_{turn + 1}"] = answers[turn]
            gaps.setdefault(f"answer{side}", answers[turn])
    gaps["mark"] = hashlib.blake2b(msgspec.json.encode(gaps), digest_size=6).hexdigest()
    return prompt.prompt_template.format(**gaps)


async def _judged(
    matches: list[Match], home: Path, settings: JudgedSettings, say: Say
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the lines that judge the matches, and what there is to say of them; only what is not there is asked."""
    judge = settings.judge.model
    kind = "single" if settings.way == "single" else "pair"
    lines = Lines(home / "model_judgment" / f"{judge.replace('/', '_')}_{kind}.jsonl")
    check_lines(lines)
    texts = {match.key: set(match.texts) for match in matches}

    def is_current(row: dict[str, Any]) -> bool:
        key, asked = _subject(row, judge)
        return texts.get(key, asked) == asked

    lines.keep(is_current)
    known = {_subject(row, judge)[0] for row in lines.rows}
    todo = [match for match in matches if match.key not in known]
    say(f"{len(todo)} of {len(matches)} verdicts are asked of {judge}; they are kept in {lines.path}")
    async with judging(settings, len(todo) * len(matches[0].texts), say) as bench:
        try:
            await for_each(todo, lambda match: _put(match, bench, lines, judge), at_once=settings.judge.concurrency)
        finally:
            lines.sort(lambda row: (str(row.get("question_id")).zfill(12), row.get("turn", 0), str(row.get("model"))))
        if lost := bench.counts["failed"]:
            say(f"{number_of(lost, 'question')} got no verdict, for the judge failed; the same command asks them again")
        refused = f"{bench.counts['refused']} refused" if bench.counts["refused"] else ""
        notes = [text for text in (refused, bench.cost()) if text]
    return [row for row in lines.rows if _subject(row, judge)[0] in texts], notes


def check_lines(lines: Lines) -> None:
    """Insist that what was judged before can be read.

    Raises:
        DataError: a line cannot.
    """
    for number, row in enumerate(lines.rows, 1):
        try:
            fault = msgspec.convert(row, JudgedLine).fault
        except msgspec.ValidationError as error:
            fault = str(error)
        if fault:
            raise DataError(f"{lines.path}, judgment {number}", fault, "mend the line, or remove it")


def _subject(row: dict[str, Any], judge: str) -> tuple[tuple[Any, ...], set[Any]]:
    """Return which match a line of FastChat's judges, and what was asked; nothing where another judge did."""
    asked = row.get("judge")
    if not isinstance(asked, list) or len(asked) != 2 or asked[0] != judge:
        return (), set()
    start = (row.get("question_id"), row.get("turn", 1), asked[1])
    if "model" in row:
        return (*start, row["model"]), {row.get("user_prompt")}
    models = sorted([str(row.get("model_1")), str(row.get("model_2"))])
    return (*start, *models), {row.get("g1_user_prompt"), row.get("g2_user_prompt")}


async def _put(match: Match, bench: Bench, lines: Lines, judge: str) -> None:
    """Ask about one match, and keep the verdict; of a pair both or none."""
    said: list[str] = []
    for text in match.texts:
        messages = [{"role": "system", "content": match.prompt.system_prompt}, {"role": "user", "content": text}]
        answer = await bench.ask(messages)
        if answer is None:
            return
        said.append(answer.text)
    row: dict[str, Any] = {"question_id": match.question.question_id, "judge": [judge, match.prompt.name]}
    if len(said) == 1:
        row |= {"model": match.models[0], "user_prompt": match.texts[0], "judgment": said[0]}
        row |= {"score": rating_in(said[0], match.prompt)}
    else:
        row |= {"model_1": match.models[0], "model_2": match.models[1]}
        for number, (text, judgment) in enumerate(zip(match.texts, said, strict=True), 1):
            shown = ("model_1", "model_2") if number == 1 else ("model_2", "model_1")
            row |= {f"g{number}_winner": winner_in(judgment, match.prompt, shown)}
            row |= {f"g{number}_user_prompt": text, f"g{number}_judgment": judgment}
    lines.add(row | {"turn": match.turn, "tstamp": time.time()})


def rating_in(text: str, prompt: JudgePrompt) -> float:
    """Return a judge's rating: FastChat takes the first there is, our own prompts ask for one on the last line.

    Beyond 1 to 10 it is none.
    """
    if prompt.name.startswith("flowrl-"):
        return points_in(verdict_in(text) or "") or UNREAD
    found = RATING.findall(text) or LOOSE_RATING.findall(text)
    value = float(found[0]) if found else UNREAD
    return value if 1 <= value <= MOST_POINTS else UNREAD


def winner_in(text: str, prompt: JudgePrompt, models: tuple[str, str]) -> str:
    """Return who won: one of the two, in the order shown, "tie" or "error"."""
    worth = {"A": models[0], "B": models[1], "C": "tie"}
    if prompt.name.startswith("flowrl-"):
        return worth.get((verdict_in(text) or "").upper(), ERROR)
    return next((winner for mark, winner in worth.items() if f"[[{mark}]]" in text), ERROR)  # FastChat's order


At = tuple[int | str, int]  # a question's id and the turn


def _ratings(rows: list[dict[str, Any]], names: list[str]) -> dict[str, dict[At, float]]:
    """Return every model's ratings that could be read."""
    found: dict[str, dict[At, float]] = {name: {} for name in names}
    for row in rows:
        if (score := float(row["score"])) != UNREAD:
            found[row["model"]][row["question_id"], row["turn"]] = score
    return found


def _wins(rows: list[dict[str, Any]], names: list[str]) -> dict[str, dict[At, float]]:
    """Return what the first model won of each turn: half where the verdict turned with the order, as in FastChat."""
    found: dict[str, dict[At, float]] = {names[0]: {}}
    for row in rows:
        winners = {row["g1_winner"], row["g2_winner"]}
        if ERROR not in winners:
            won = row.get(winners.pop(), "") if len(winners) == 1 else ""
            found[names[0]][row["question_id"], row["turn"]] = {"": 0.5, names[0]: 1.0}.get(won, 0.0)
    return found


def _score(
    results: Results, rated: dict[str, dict[At, float]], matches: list[Match], names: list[str], *, task: str,
    is_pair: bool,
) -> None:  # fmt: skip
    """Add scores of everything, of each turn and of each category, and of two models the differences."""
    questions = {match.question.question_id: match.question for match in matches}
    categories = sorted({question.category for question in questions.values()} - {""})
    metric = "win rate" if is_pair else "rating"
    groups: list[tuple[str, Callable[[At], bool]]] = [(metric, lambda at: True)]
    groups += [(f"{metric}, turn {turn}", lambda at, turn=turn: at[1] == turn) for turn in (1, 2)]
    groups += [
        (f"{metric}, {category}", lambda at, category=category: questions[at[0]].category == category)
        for category in (categories if len(categories) > 1 else [])
    ]
    sides = [(results.of, names[0])] + ([(results.against, names[1])] if results.against and not is_pair else [])
    for label, is_in in groups:
        for answers, name in sides:
            assert answers is not None
            if items := _by_question({at: value for at, value in rated[name].items() if is_in(at)}):
                bounds = mean_over(list(items.values()), is_share=is_pair, seed=results.seed)
                score = Score(task=task, metric=label, bounds=bounds)
                answers.scores.append(score)
                answers.items[score.key], answers.digests[score.key] = list(items.values()), [str(id) for id in items]
        if len(sides) > 1:
            both = [at for at in rated[names[0]] if at in rated[names[1]] and is_in(at)]
            ours, theirs = (_by_question({at: rated[name][at] for at in both}) for name in names)
            if ours:
                bounds = mean_difference(list(ours.values()), list(theirs.values()), seed=results.seed)
                results.differences.append(Score(task=task, metric=label, bounds=bounds))
    for answers, name in sides:
        if answers is not None and not answers.scores:
            what = f"no verdict on {name} can be read"
            raise DataError(task, what, "take a judge that keeps to the form, or raise judge.max_tokens")


def _by_question(rated: dict[At, float]) -> dict[int | str, list[float]]:
    """Return the turns' values by question: turns of one question are not independent."""
    found: dict[int | str, list[float]] = {}
    for (question, _), value in rated.items():
        found.setdefault(question, []).append(value)
    return found


def _trust(
    rows: list[dict[str, Any]], rated: dict[str, dict[At, float]], lengths: dict[tuple[Any, ...], int], names: list[str]
) -> list[str]:
    """Return what the verdicts can be trusted in: unread ones, ties, and how they go with order and length."""
    if "score" in rows[0]:
        unread = sum(row["score"] == UNREAD for row in rows)
        pairs = [(float(lengths[name, *at]), value) for name in names for at, value in rated[name].items()]
        notes = [f"{unread} of {len(rows)} ratings cannot be read and count for nothing" if unread else ""]
    else:
        winners = [(row["g1_winner"], row["g2_winner"]) for row in rows]
        unread = sum(ERROR in pair for pair in winners)
        ties = sum(pair == ("tie", "tie") for pair in winners)
        turned = sum(set(pair) == {"model_1", "model_2"} for pair in winners)
        judged, tied = number_of(len(rows), "pair"), number_of(ties, "tie")
        notes = [f"{judged}: {tied}, {turned} turned with the order, {unread} cannot be read"]
        decided = [(k, won) for pair in winners for k, won in enumerate(pair) if won.startswith("model_")]
        first = [float(won == ("model_1", "model_2")[k]) for k, won in decided]
        notes.append(order_note(first))
        ours, theirs = names
        pairs = [(float(lengths[ours, *at] - lengths[theirs, *at]), won) for at, won in rated[ours].items()]
    notes.append(length_note([longer for longer, _ in pairs], [won for _, won in pairs]))
    return [note for note in notes if note]
