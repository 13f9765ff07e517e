"""An adapter in peft's format as a plain model: its base model with the adapter merged in.

Made once and kept in the cache, under the digest of the adapter's files and of what its base model's directory holds.
So every node of a run that names the adapter as its model has the same weights. Called by models.

Tests: tests/unit/data/test_adapters.py, tests/graphs/test_export.py
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from typing import TYPE_CHECKING, Any

from flowrl.data.model_process import run_in_process
from flowrl.errors import ModelError
from flowrl.model_files import GENERATION, TEMPLATES, carry_along, check_plain, has_tokenizer, quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Say = Callable[[str], None]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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
        ModelError: peft cannot put the adapter on this base, or the base's weights are quantized.
    """
    from filelock import FileLock

    check_plain(base, f"model {adapter}")
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
        ModelError: peft cannot put the adapter on this base, all of it and nothing besides.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if not any(adapter.glob("adapter_model.*")):
        raise ModelError(f"model {adapter}", f"has no {WEIGHTS}", "save the adapter whole again")
    is_classifier = json.loads((adapter / CONFIG).read_text()).get("task_type") == "SEQ_CLS"
    try:
        with quiet_transformers():
            loader: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
            options: dict[str, Any] = {"num_labels": 1} if is_classifier else {}
            options |= {"dtype": "auto", "use_safetensors": True, "output_loading_info": True}
            model, found = loader.from_pretrained(base, **options)
            if lost := sorted(name for name in found["missing_keys"] if not name.startswith("score.")):
                raise ValueError(f"{len(lost)} weights are not there: {lost[0]}")
            _resize(model, adapter)
            with warnings.catch_warnings():  # it would warn of what is refused next
                warnings.filterwarnings("ignore", message="Found missing adapter keys")
                adapted: Any = PeftModel.from_pretrained(model, str(adapter))
            _check_taken(adapted, adapter)
            merged: Any = adapted.merge_and_unload(safe_merge=True)
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


def _check_taken(adapted: Any, adapter: Path) -> None:
    """Insist that an adapter's file holds what its config speaks of, by the names that the model has for it.

    Of what peft does not find there it makes a new adapter, which changes nothing.

    Raises:
        ValueError: something is not there, or not taken.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    if not (weights := adapter / WEIGHTS).is_file():  # peft has read pickled ones
        return
    with safe_open(weights, framework="pt") as file:
        stored = {name.replace(".default.", ".") for name in file.keys()}  # noqa: SIM118
    needed = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    known = needed | {name.replace(".default.", ".") for name in adapted.state_dict()}
    for names, what in ((needed - stored, "are not in the adapter"), (stored - known, "of the adapter have no place")):
        if names:
            raise ValueError(f"{len(names)} weights {what}, such as {min(names)}")


def _resize(model: Any, adapter: Path) -> None:
    """Give a base model as many embeddings as an adapter has that was saved with its own."""
    from safetensors import safe_open

    weights = adapter / WEIGHTS
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
