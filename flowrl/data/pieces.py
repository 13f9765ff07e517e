"""Token ids as the text of each token; from a tokenizer's file without transformers: quick, and offline.

Invariants:
- the pieces of a sequence joined are its text;
- where a character takes several tokens, the last of them has it and the others are empty.

Called for `flowrl report` and `flowrl inspect`, and by steps.py.

Tests: tests/unit/runs/test_review.py
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl.data.models import DEFAULT_MODEL, prepare_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokenizers import Tokenizer


def pieces_of(run_dir: Path, model: str) -> Callable[[Sequence[int]], list[str]] | None:
    """Return what cuts a run's token ids into texts, or None where no tokenizer of its model is at hand."""
    file = tokenizer_file(run_dir, model)
    if file is None:
        return None
    from tokenizers import Tokenizer

    return partial(cut, Tokenizer.from_file(str(file)))


def cut(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token as it is within the sequence, the space before a word included."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    texts = [stream.step(tokenizer, token) or "" for token in ids]
    missing = tokenizer.decode(list(ids), skip_special_tokens=False)[len("".join(texts)) :]
    if texts and missing:  # it ends within a character
        texts[-1] += missing
    return texts


def tokenizer_file(run_dir: Path, model: str) -> Path | None:
    """Return the tokenizer file of a run's model: of a checkpoint, of its directory, or the bundled one's."""
    saved = run_dir / "checkpoints"
    directories = sorted([*saved.glob("step-*/model"), *saved.glob("step-*/*/model")], reverse=True)
    directories.append(Path(model).expanduser())
    found = next((each / "tokenizer.json" for each in directories if (each / "tokenizer.json").is_file()), None)
    return prepare_model(model) / "tokenizer.json" if found is None and model == DEFAULT_MODEL else found
