"""Published configurations of models that are not here, as directories without weights, for `flowrl check`.

The numbers are flowrl.tuning.published's. The tokenizer is the tiny one, so what a check says of prompts' lengths means
nothing; context, vocabulary size, heads and experts are the model's own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from flowrl.tuning.published import PUBLISHED
from tests.support.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


def published_model(name: str, root: Path) -> Path:
    """Write a published model's configuration beside an empty safetensors file and return the directory."""
    directory = root / name.replace("/", "--")
    if not directory.exists():
        directory.mkdir(parents=True)
        tiny_tokenizer().save_pretrained(directory)
        (directory / "config.json").write_text(json.dumps(PUBLISHED[name]))
        (directory / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return directory
