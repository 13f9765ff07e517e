"""Published configurations of models that are not here, as directories for `flowrl check`.

The numbers are flowrl.tuning.published's. The weights' file has the header of theirs and takes no room: what it holds
is a hole. The tokenizer is the tiny one, so what a check says of prompts' lengths means nothing; context, vocabulary
size, heads and experts are the model's own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from flowrl.model_files import is_classifier
from flowrl.tuning.published import PUBLISHED
from tests.support.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


def published_model(name: str, root: Path) -> Path:
    """Write a published model's configuration beside weights that are not there and return the directory."""
    directory = root / name.replace("/", "--")
    if not directory.exists():
        directory.mkdir(parents=True)
        tiny_tokenizer().save_pretrained(directory)
        (directory / "config.json").write_text(json.dumps(PUBLISHED[name]))
        _write_hole(directory)
    return directory


def _write_hole(directory: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    is_judge = is_classifier(directory)
    settings = AutoConfig.from_pretrained(directory, **({"num_labels": 1} if is_judge else {}))
    kind = AutoModelForSequenceClassification if is_judge else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(settings, dtype=torch.bfloat16)
    header: dict[str, object] = {}
    end = 0
    for name, tensor in model.named_parameters():  # what is tied has one name
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
