"""lm-eval's view of a model on flowrl's own engine: what its `hf` model computes, computed by vLLM.

Invariants:
- texts become tokens, prompts are cut and answers end as in lm-eval's `hf` model, so that scores agree with it;
- every answer is kept as soon as it is there (lm-eval's cache), so that an evaluation that was cut off goes on.

Called by runs/evaluation.py, and by the Evaluator, whose answers come over the graph's edges; imports lm-eval, which is
an extra.

Tests: tests/contracts/test_evaluation.py
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from flowrl.ending import DATE, render_options
from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

DEFAULT_TOKENS = 256  # of an answer, where a task leaves it open; as lm-eval's own models


class Answerer(Protocol):
    """Whoever scores tokens and writes answers (engines/vllm_answers.py says how)."""

    async def score(self, token_ids: Sequence[int]) -> tuple[list[float], list[bool]]: ...

    async def complete(self, prompt_ids: Sequence[int], *, until: list[str], **sampling: Any) -> list[int]: ...


def _unseen(what: str, total: int) -> Callable[[], None]:
    return lambda: None


class EngineLM(TemplateLM):
    """A language model as lm-eval asks it."""

    def __init__(
        self, engine: Answerer, tokenizer: Any, run: Callable[[Coroutine[Any, Any, Any]], Any], *, seed: int,
        max_length: int, at_once: int, progress: Callable[[str, int], Callable[[], None]] = _unseen,
    ) -> None:  # fmt: skip
        """`progress` is told what is asked and how much of it, and gives what is called for each that is done."""
        super().__init__()
        self.tokenizer = tokenizer
        self._engine = engine
        self._run = run  # on the engine's event loop
        self._progress = progress
        self._seed = seed
        self._max_length = max_length  # tokens of a question and its answer
        self._at_once = at_once

    @property
    def eot_token_id(self) -> int:
        """Return the token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Return what stands before a text that has nothing before it."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Return what lm-eval keeps requests under."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return a text's tokens; what already begins with the first token gets no second one."""
        begins = add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        add = False if begins else add_special_tokens
        return self.tokenizer.encode(string, **({} if add is None else {"add_special_tokens": add}))

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the tokenizer's template where one is asked for."""
        return (self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **render_options(DATE),
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return how likely each continuation is, and whether it is the likeliest; progress is said in lines."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        async def one(request: Any) -> tuple[float, bool]:
            key, context, continuation = request
            scored = await self._scored(context, continuation)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, scored)
            return scored

        return self._all("continuations scored", [one(request) for request in requests])

    async def _scored(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        token_ids = (context + continuation)[-(self._max_length - 1) :]  # vLLM adds a token
        logprobs, likeliest = await self._engine.score(token_ids)
        count = len(continuation)
        return sum(logprobs[-count:]), all(likeliest[-count:])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows."""

        async def one(text: str) -> float:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length - 1,
                context_len=1,
            )
            parts = [await self._scored(*make_disjoint_window(window)) for window in windows]
            total = sum(logprob for logprob, _ in parts)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            return total

        return self._all("texts scored", [one(request.args[0]) for request in requests])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return how the model continues each context, up to the first string that ends it."""

        async def one(number: int, context: str, asked: dict[str, Any]) -> str:
            text = await self._answer(context, asked, seed=self._seed + number)
            self.cache_hook.add_partial("generate_until", (context, asked), text)
            return text

        return self._all("answers written", [one(number, *each.args) for number, each in enumerate(requests)])

    async def _answer(self, context: str, asked: dict[str, Any], *, seed: int) -> str:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(asked, DEFAULT_TOKENS))
        until = [each for each in settings.pop("until", None) or [] if each]
        max_tokens = settings.pop("max_gen_toks")
        draws = settings.pop("do_sample", False)
        settings.setdefault("temperature", 1.0 if draws else 0.0)
        if unknown := sorted(settings.keys() - {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}):
            raise ConfigError("generation_kwargs", f"{unknown[0]} is not known here", "take it out of the task")
        room = self._max_length - max_tokens
        if room < 1:
            what = f"an answer of up to {max_tokens} tokens leaves no room for a prompt in {self._max_length}"
            raise ConfigError("max_model_len", what, "raise it with --set, or lower the task's max_gen_toks")
        prompt_ids = self.tok_encode(context)[-room:]
        token_ids = await self._engine.complete(prompt_ids, until=until, max_tokens=max_tokens, seed=seed, **settings)
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        for end in until:
            text = text.split(end)[0]
        return text

    def _all(self, what: str, asking: list[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Return what each gives, in order; at most `at_once` are under way."""

        async def together() -> list[Any]:
            room = asyncio.Semaphore(self._at_once)
            step = self._progress(what, len(asking))

            async def one(coroutine: Awaitable[Any]) -> Any:
                async with room:
                    result = await coroutine
                step()
                return result

            try:
                async with asyncio.TaskGroup() as tasks:
                    running = [tasks.create_task(one(each)) for each in asking]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            finally:
                for each in asking:
                    each.close()
            return [task.result() for task in running]

        return self._run(together())
