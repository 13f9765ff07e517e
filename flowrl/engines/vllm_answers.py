"""AnsweringVllm: the generation engine for whoever examines a model that stands still: texts that end at strings, and
how likely given tokens are.

Invariants:
- a token's log-prob and rank are the model's own, at temperature 1 and without a cut;
- the likeliest answer is the likeliest at each token.

Where versions arrive, nothing that was cached of another is used. Asked by stages/harness.py, by the Examiner for it,
and by judges.

Tests: tests/contracts/test_evaluation.py, tests/contracts/test_vllm_engine.py
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flowrl.engines import vllm_settings
from flowrl.engines.vllm import VllmEngine
from flowrl.errors import StageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm import SamplingParams


class AnsweringVllm(VllmEngine):
    """A vLLM that scores tokens and ends at strings besides."""

    async def score(self, token_ids: Sequence[int]) -> tuple[list[float], list[bool]]:
        """Return, of every token after the first, its log-prob and whether no other was likelier.

        Raises:
            StageError: there are too many tokens, or vLLM failed.
        """
        output = await self._answered(token_ids, vllm_settings.canary_parameters())
        rows = zip(list(token_ids)[1:], list(output.prompt_logprobs)[1:], strict=True)
        found = [row[token] for token, row in rows]
        return [each.logprob for each in found], [each.rank == 1 for each in found]

    async def among(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Return how likely each of some tokens is to come next, were it one of them: they add up to 1.

        Raises:
            StageError: there are too many tokens, or vLLM failed.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            max_tokens=1, temperature=1.0, seed=0, allowed_token_ids=[*token_ids], logprobs=len(token_ids),
            detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        (found,) = (await self._answered(prompt_ids, parameters)).outputs[0].logprobs
        return [math.exp(found[token].logprob) for token in token_ids]

    async def complete(self, prompt_ids: Sequence[int], *, until: list[str], **sampling: Any) -> list[int]:
        """Return the tokens that follow; at most `max_tokens`, to the end of the first string of `until`.

        `sampling` is of vLLM's SamplingParams; temperature 0 takes the likeliest token each time.

        Raises:
            StageError: there is no room for an answer, or vLLM failed.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            **sampling, stop=until, stop_token_ids=self._stop_ids, output_kind=RequestOutputKind.FINAL_ONLY
        )
        return list((await self._answered(prompt_ids, parameters)).outputs[0].token_ids)

    async def _answered(self, token_ids: Sequence[int], parameters: SamplingParams) -> Any:
        await self._admitting.wait()
        self._check_serving()
        name = f"answer-{next(self._ids)}"
        prompt: Any = {"prompt_token_ids": list(token_ids), "cache_salt": self._salt}
        last: Any = None
        try:
            async for output in self._engine.generate(prompt, parameters, name, lora_request=self._applied()):
                last = output
        except Exception as error:
            raise StageError(self.where, f"request {name} failed ({self._cause(error)})") from error
        return last
