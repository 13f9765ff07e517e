"""Steps of a response: at which of the sampled tokens each one ends.

A step ends with the token that completes the separator, where the label stood when a process reward model was trained
(rendering.py), and with the last token of text in a turn. Invariants: only tokens that the policy sampled end a step;
what has no text between two separators is none; a response has at least one. Called by the reward-model stage.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

CACHED = 1 << 16  # tokens whose text is remembered


class StepFinder:
    """Finds steps by their separator."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str) -> None:
        @lru_cache(CACHED)
        def text_of(token_id: int) -> str:
            return str(
                tokenizer.decode([token_id], skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[arg-type]
            )

        self._text_of = text_of
        self._separator = separator

    def ends(self, token_ids: Sequence[int], mask: Sequence[float]) -> list[int]:
        """Return the places of the tokens that end a step; `mask` is 1 on the policy's tokens."""
        found: list[int] = []
        for is_sampled, places in groupby(range(len(token_ids)), key=lambda place: mask[place] > 0):
            if is_sampled:
                found += self._ends_of_turn(token_ids, list(places))
        return found or [max(place for place in range(len(token_ids)) if mask[place] > 0)]

    def _ends_of_turn(self, token_ids: Sequence[int], places: list[int]) -> list[int]:
        found: list[int] = []
        text, last = "", -1  # of the step under way: what it says, and the last token that says something
        for place in places:
            piece = self._text_of(token_ids[place])
            text += piece
            last = place if piece.strip() else last
            *ended, rest = text.split(self._separator)
            if any(step.strip() for step in ended):
                found.append(place)
                last = place if rest.strip() else -1
            text = rest
        return [*found, last] if text.strip() and last not in found else found
