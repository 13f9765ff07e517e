"""Whether two models read the same tokens: critics, references, teachers and reward models take the policy's token ids.

Called by the stages that hold such a model, when a run is checked.

Tests: tests/unit/data/test_vocabulary.py
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from flowrl.data.models import inspect_model
from flowrl.data.prompts import load_tokenizer
from flowrl.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path


def check_same_vocabulary(policy: Path, other: Path, where: str, *, longest: int = 0) -> None:
    """Insist that another model gives each of the policy's tokens the policy's id, and has an embedding for it.

    Embeddings may be padded to different sizes, and the other model may know more tokens. It has positions for
    sequences of the `longest` that there may be.

    Raises:
        ModelError: it does not.
    """
    if policy == other:
        return
    ours, theirs = _vocabulary(policy), _vocabulary(other)
    apart = [token for token, index in ours.items() if theirs.get(token) != index]
    remedy = "choose a model with the policy's tokenizer"
    if apart:
        token = min(apart, key=lambda each: ours[each])
        found = f"is {theirs[token]}" if token in theirs else "is none"
        what = f"{other} gives {len(apart)} of the policy's {len(ours)} tokens another id: {token!r} is {ours[token]} "
        raise ModelError(where, f"{what}in {policy} and {found} there", remedy)
    needed, card = max(ours.values(), default=-1) + 1, inspect_model(other)
    if card.vocab_size < needed:
        raise ModelError(where, f"{other} embeds {card.vocab_size} tokens, the policy's tokenizer has {needed}", remedy)
    if 0 < card.max_context < longest:
        what = f"{other} has positions for {card.max_context} tokens, and a prompt with its response may have {longest}"
        raise ModelError(where, what, "lower sampling.max_tokens or data.max_prompt_tokens, or choose another model")


@functools.lru_cache(maxsize=4)
def _vocabulary(directory: Path) -> dict[str, int]:
    return load_tokenizer(directory).get_vocab()
