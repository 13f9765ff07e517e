"""An adapter in peft's format as a plain model: its base model with the adapter merged in.

Made once and kept in the cache, under the digest of the adapter's files and of what its base model's directory holds,
so that every node of a run that names the adapter as its model has the same weights. Called by models.
"""

from __future__ import annotations

import json
import tempfile
from typing import TYPE_CHECKING, Any

from flowrl.data.aside import run_aside
from flowrl.errors import ModelError

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
                run_aside(merge, adapter, base, made, where=f"model {adapter}")
                made.rename(target)
    return target


def merge(adapter: Path, base: Path, target: Path) -> None:
    """Write a base model with an adapter merged in.

    Raises:
        ModelError: peft cannot put the adapter on this base.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    is_classifier = json.loads((adapter / CONFIG).read_text()).get("task_type") == "SEQ_CLS"
    try:
        loader = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
        options = {"num_labels": 1} if is_classifier else {}
        model: Any = loader.from_pretrained(base, dtype="auto", use_safetensors=True, **options)
        merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
        merged.save_pretrained(target)
        AutoTokenizer.from_pretrained(base).save_pretrained(target)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        remedy = "give the base model that the adapter was trained on"
        raise ModelError(f"model {adapter}", f"cannot be merged into {base} ({error})", remedy) from error


def _digest(adapter: Path, base: Path) -> str:
    from blake3 import blake3

    hasher = blake3(str(base.resolve()).encode())
    for path in sorted(adapter.iterdir()):
        if path.name == CONFIG or path.suffix in (".safetensors", ".bin"):
            hasher.update(path.name.encode())
            hasher.update_mmap(path)
    for path in sorted(base.glob("*.safetensors")):
        state = path.stat()
        hasher.update(f"{path.name} {state.st_size} {state.st_mtime_ns}".encode())
    return hasher.hexdigest()[:16]
