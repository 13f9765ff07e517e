"""Steps of a response: at which of the sampled tokens each one ends.

A step ends with the token that completes the separator, where the label stood when a process reward model was trained
(rendering.py). It ends with the last token of text in a turn. Separators may be special tokens, span tokens or be a
part of one, and so may characters.

Invariants:
- only tokens that the policy sampled end a step;
- what has no text between two separators is none, nor is the token that ends an answer;
- a response has at least one.

Called by the reward-model stage.

Tests: tests/unit/stages/test_step_rewards.py
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from flowrl.data.pieces import cut
from flowrl.ending import ending_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase


class StepFinder:
    """Finds steps by their separator."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str) -> None:
        self._tokenizer = tokenizer
        self._separator = separator
        self._stops = ending_of(tokenizer).stops

    def ends(self, token_ids: Sequence[int], mask: Sequence[float]) -> list[int]:
        """Return the places of the tokens that end a step; `mask` is 1 on the policy's tokens."""
        found: list[int] = []
        for is_sampled, places in groupby(range(len(token_ids)), key=lambda place: mask[place] > 0):
            if is_sampled:
                found += self._ends_of_turn(token_ids, list(places))
        return found or [max(place for place in range(len(token_ids)) if mask[place] > 0)]

    def _ends_of_turn(self, token_ids: Sequence[int], places: list[int]) -> list[int]:
        places = [place for place in places if token_ids[place] not in self._stops]
        found: list[int] = []
        text, last = "", -1  # of the step under way: what it says, and the last token that says something
        pieces = cut(self._tokenizer.backend_tokenizer, [token_ids[place] for place in places])  # type: ignore[attr-defined]
        for place, piece in zip(places, pieces, strict=True):
            text += piece
            last = place if piece.strip() else last
            *ended, rest = text.split(self._separator)
            if any(step.strip() for step in ended):
                found.append(place)
                last = place if rest.strip() else -1
            text = rest
        return [*found, last] if text.strip() and last not in found else found
