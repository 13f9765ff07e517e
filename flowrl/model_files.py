"""What lies in a model's directory beside its weights, and what of it another model of the same family takes along.

Everything that is neither weights nor the model's own description: a tokenizer in whatever files it has, with all its
chat templates, processors, code, licences. Nothing here is a list of tokenizers' file names, so a new kind of tokenizer
is carried along as well. Called by whoever writes a model: the engines' publishing, and the merging of adapters.

Tests: tests/unit/engines/test_saving.py
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".ckpt", ".npz"}
WRITTEN = {"config.json", "README.md", "trainer_state.json"}  # by whoever saves the model, or of no use to another
TEMPLATES = "additional_chat_templates"
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "*.vocab")
GENERATION = "generation_config.json"


def has_tokenizer(directory: Path) -> bool:
    """Say whether a directory has a tokenizer's vocabulary in one of the forms that transformers reads."""
    return any(any(directory.glob(pattern)) for pattern in TOKENIZERS)


def carry_along(source: Path, target: Path) -> None:
    """Copy what belongs to a model besides weights and config, as it is; what is there already is replaced."""
    for path in sorted(source.iterdir()):
        is_own = path.suffix in WEIGHTS or path.name in WRITTEN or path.name.endswith(".index.json")
        if path.is_file() and not is_own and not path.name.startswith((".", "adapter_")):
            shutil.copyfile(path, target / path.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES, dirs_exist_ok=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from saying what is no news (a new score head) and from drawing progress bars."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def check_classifier(directory: Path, where: str) -> None:
    """Insist that a directory holds a reward model.

    Raises:
        ModelError: it has no head of scores; a language model would score everything 0.
    """
    if not is_classifier(directory):
        what = f"{directory} is not a *ForSequenceClassification checkpoint"
        remedy = "train one with graphs/reward_model.py, or give the directory of one"
        raise ModelError(where, what, remedy)


def check_plain(directory: Path, where: str) -> None:
    """Insist that the weights in a directory are not quantized: nothing could be learned in them, or merged into them.

    Raises:
        ModelError: its config.json has a `quantization_config`.
    """
    settings = read_config(directory)
    found = settings.get("quantization_config") or text_config(settings).get("quantization_config")
    if found:
        how = found.get("quant_method", "quantized") if isinstance(found, dict) else "quantized"
        what = f"the weights in {directory} are quantized ({how}, by the quantization_config in its config.json)"
        remedy = "give the same model in bfloat16 or float32; lora.bits holds it in 4 or 8 bits while it learns"
        raise ModelError(where, what, remedy)


def read_config(directory: str | Path) -> dict[str, Any]:
    """Return what is in a directory's config.json, nothing where that cannot be read."""
    try:
        return dict(json.loads((Path(directory) / "config.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def is_classifier(directory: str | Path) -> bool:
    """Return whether a checkpoint's own architecture is a sequence classifier."""
    names = read_config(directory).get("architectures") or []
    return any(name.endswith("ForSequenceClassification") for name in names)


def text_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json says of its language model: those of several modalities nest that."""
    return {**settings, **(settings.get("text_config") or {})}


def num_positions(text: Mapping[str, Any]) -> int:
    """Return how many tokens the positions of a model reach, by its text config; 0 where nothing limits them."""
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
    most = next((int(text[name]) for name in names if (text.get(name) or 0) > 0), 0)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in ("linear", "dynamic", "yarn"):  # as vLLM counts
        most = max(most, int(rope.get("original_max_position_embeddings", most) * rope.get("factor", 1.0)))
    return 0 if text.get("alibi") else most
