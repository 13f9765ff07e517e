"""An adapter in peft's format as a plain model: its base model with the adapter merged in.

Made once and kept in the cache, under the digest of the adapter's files and of what its base model's directory holds.
So every node of a run that names the adapter as its model has the same weights. Called by models.

Tests: tests/graphs/test_export.py
"""

from __future__ import annotations

import json
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

from flowrl.data.model_process import run_in_process
from flowrl.errors import ModelError
from flowrl.model_files import GENERATION, TEMPLATES, carry_along, has_tokenizer, quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Say = Callable[[str], None]

CONFIG = "adapter_config.json"


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds an adapter in peft's format and no model."""
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def base_of(adapter: Path, where: str) -> str:
    """Return the name of the model that an adapter was trained on, as the adapter has it.

    Raises:
        ModelError: it does not say.
    """
    try:
        name = json.loads((adapter / CONFIG).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise ModelError(where, f"{adapter / CONFIG} cannot be read ({error})", "save the adapter again") from error
    if not name:
        raise ModelError(where, f"{adapter / CONFIG} names no base_model_name_or_path", "write it there")
    return str(name)


def merged_model(adapter: Path, base: Path, *, cache: Path, say: Say) -> Path:
    """Return the directory of a base model with an adapter merged in, making it on first use.

    Raises:
        ModelError: peft cannot put the adapter on this base.
    """
    from filelock import FileLock

    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"merged-{_digest(adapter, base)}"
    with FileLock(cache / f".{target.name}.lock"):
        if not target.is_dir():
            say(f"merging the adapter in {adapter} into {base} once, to {target}")
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{target.name}.") as aside:
                made = cache / aside / "model"
                run_in_process(merge, adapter, base, made, where=f"model {adapter}")
                made.rename(target)
    return target


def merge(adapter: Path, base: Path, target: Path) -> None:
    """Write a base model with an adapter merged in.

    Raises:
        ModelError: peft cannot put the adapter on this base.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    is_classifier = json.loads((adapter / CONFIG).read_text()).get("task_type") == "SEQ_CLS"
    try:
        with quiet_transformers():
            loader = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
            options = {"num_labels": 1} if is_classifier else {}
            model: Any = loader.from_pretrained(base, dtype="auto", use_safetensors=True, **options)
            _resize(model, adapter)
            merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
            if (base / GENERATION).is_file() and merged.can_generate():  # transformers may refuse to write it
                merged.generation_config = type(merged.generation_config)()
            merged.save_pretrained(target)
        carry_along(base, target)
        if has_tokenizer(adapter):  # and its templates, none of the base's
            shutil.rmtree(target / TEMPLATES, ignore_errors=True)
            (target / "chat_template.jinja").unlink(missing_ok=True)
        carry_along(adapter, target)  # what it was trained with
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        remedy = "give the base model that the adapter was trained on"
        raise ModelError(f"model {adapter}", f"cannot be merged into {base} ({error})", remedy) from error


def _resize(model: Any, adapter: Path) -> None:
    """Give a base model as many embeddings as an adapter has that was saved with its own."""
    from safetensors import safe_open

    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        return
    name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    with safe_open(weights, framework="pt") as file:
        ends = (f"{name}.weight", f"{name}.base_layer.weight", f"{name}.modules_to_save.weight")
        found = next((key for key in file.keys() if key.endswith(ends)), None)  # noqa: SIM118
        num_rows = file.get_slice(found).get_shape()[0] if found else 0
    if num_rows and num_rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(num_rows, mean_resizing=False)


def _digest(adapter: Path, base: Path) -> str:
    from blake3 import blake3

    hasher = blake3(str(base.resolve()).encode())
    for path in sorted(adapter.rglob("*")):
        if path.is_file() and path.name != "README.md":
            hasher.update(path.name.encode())
            hasher.update_mmap(path)
    for path in sorted(base.glob("*.safetensors")):
        state = path.stat()
        hasher.update(f"{path.name} {state.st_size} {state.st_mtime_ns}".encode())
    return hasher.hexdigest()[:16]
