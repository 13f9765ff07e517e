"""What leaves a training engine: versions for the generators, and models on disk.

`Publisher` owns the transport, which it opens at the first version.

Invariants:
- parameters travel under the names and in the shapes of a saved checkpoint, tied ones once, or an adapter's alone under
  peft's names;
- every version can carry a canary, the log-probs of a fixed sequence at temperature 1, whatever temperature the policy
  is trained at.

Called by trainer on rank 0; `cast_saved` by `flowrl export`.

Tests: tests/unit/engines/test_saving.py
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from ipaddress import ip_address
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowrl.ending import ending_of, write_stops
from flowrl.engines.agreement import SAME_WEIGHTS
from flowrl.engines.base import TokenGroup
from flowrl.engines.packing import pack, plan
from flowrl.errors import ModelError
from flowrl.messages import Buffer, Canary, Weights
from flowrl.model_files import GENERATION, carry_along, is_classifier, quiet_transformers
from flowrl.scratch import SHARED_MEMORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from flowrl.engines.base import Dtype, TrainingConfig


LAYER = re.compile(r".*?\.\d+\.")  # the part of a parameter's name that all of its layer have


class Publisher:
    """Offers versions over one transport; `transfer` and `retire` may be called from any thread."""

    def __init__(
        self, config: TrainingConfig, *, name: str, num_receivers: int, host: str, device: torch.device
    ) -> None:
        self._config = config
        self._name = name
        self._num_receivers = num_receivers
        self._host = host
        self._device = device
        self._sender: Any = None
        self.transport = config.transport
        self.said = ""  # what the user should know of the choice
        if config.transport == "auto":
            self.said = self._no_room()
            others = "shm" if ip_address(host).is_loopback else "nearest"  # some could be elsewhere
            self.transport = "broadcast" if self.said else others

    def _no_room(self) -> str:
        """Return why two versions, as large as the model on the disk, do not fit into shared memory, or ""."""
        if not SHARED_MEMORY.is_dir():
            return f"weights are broadcast: there is no {SHARED_MEMORY}"
        if self._config.lora.publish == "adapter":
            return ""
        needed = 2 * sum(file.stat().st_size for file in Path(self._config.model).glob("*.safetensors"))
        free = shutil.disk_usage(SHARED_MEMORY).free
        if needed <= free:
            return ""
        sizes = f"{SHARED_MEMORY} has {free / 1e9:.2f} GB free, and two versions take {needed / 1e9:.2f} GB"
        return f"weights are broadcast: {sizes} (docker: --shm-size)"

    def open_sender(self) -> Any:
        """Return the transport's sender."""
        from flowrl.engines.weights import open_sender

        return open_sender(
            self.transport,
            name=self._name,
            num_receivers=self._num_receivers,
            timeout_s=self._config.transfer_timeout_s,
            # An adapter is small, and the process that takes it in for a generator has no device.
            device="cpu" if self._config.lora.publish == "adapter" else self._device,
            host=self._host,
            digest_every=self._config.digest_every,
        )

    def publish(self, version: int, tensors: Iterable[tuple[str, Tensor]], canary: Canary | None) -> Weights:
        """Offer the tensors, which are copied while they are iterated."""
        if self._sender is None:
            self._sender = self.open_sender()
        manifest, size_bytes = self._sender.publish(version, tensors)
        return Weights(
            version=version, transport=self.transport, manifest=manifest, canary=canary, size_bytes=size_bytes
        )

    def transfer(self, version: int) -> None:
        """Wait until the receivers have the bytes of `version`."""
        if self._sender is not None:
            self._sender.transfer(version)

    def retire(self, version: int, keep: frozenset[int] = frozenset()) -> None:
        """Forget every version before `version` but those in `keep`."""
        if self._sender is not None:
            self._sender.retire(version, keep)

    def close(self) -> None:
        """Release the transport."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None


def score_canary(module: nn.Module, tokens: Buffer, *, dtype: torch.dtype, device: torch.device) -> Canary:
    """Return the model's log-probs of tokens [1:] at temperature 1; collective where parameters are sharded."""
    ids = tokens.numpy()
    group = TokenGroup(prompt_ids=Buffer.ints(ids[:1]), responses=[Buffer.ints(ids[1:])])
    ((rows,),) = plan([group], layout="padded", reads="before", budget=len(ids))
    batch = pack([group], rows, layout="padded", reads="before", device=device)
    with torch.no_grad():
        logprobs_N, _ = module(batch, temperature=1.0)
    logprobs = Buffer.floats(logprobs_N.float().cpu().numpy())
    return Canary(token_ids=tokens, logprobs=logprobs, max_mean_gap=SAME_WEIGHTS[dtype])


def as_saved(model: PreTrainedModel, parameters: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters under the names and in the shapes of a saved checkpoint, which generators load.

    Transformers holds some families (mixtures of experts) in another form than their checkpoints; those are turned
    back, layer by layer, at the price of a second copy of a layer.
    """
    if not getattr(model, "_weight_conversions", None):
        yield from parameters
        return
    from transformers.core_model_loading import revert_weight_conversion

    for _, layer in groupby(parameters, _layer_of):
        yield from revert_weight_conversion(model, {name: tensor.clone() for name, tensor in layer}).items()


def _layer_of(named: tuple[str, Tensor]) -> str:
    """Return the layer of a parameter, "" for none: `model.layers.3.` of `model.layers.3.mlp.gate.weight`."""
    found = LAYER.match(named[0])
    return found[0] if found else ""


def carried_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers that a saved checkpoint holds: routers' corrections, decays, scales of layers."""
    for prefix, module in model.named_modules():
        for name, tensor in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, tensor


def write_model(
    model: PreTrainedModel, parameters: dict[str, Tensor], directory: Path, *, source: str, card: str,
    chat_template: str = "", trust_remote_code: bool = False,
) -> None:  # fmt: skip
    """Write parameters and the model's buffers as safetensors, with what else belongs to a model.

    A chat template goes with it in place of the tokenizer's own; the tokens that end its answers are named. What
    `try_saving` tries and no more is done besides writing the weights.
    """
    directory.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.cpu() for name, tensor in carried_buffers(model)}
    generation = getattr(model, "generation_config", None)
    try:
        if generation is not None and (Path(source) / GENERATION).is_file():  # it is copied as it is, right or wrong
            model.generation_config = type(generation)()
        with quiet_transformers():
            model.save_pretrained(directory, state_dict={**parameters, **kept})
    finally:
        setattr(model, "generation_config", generation)  # noqa: B010
    _write_rest(Path(source), directory, chat_template=chat_template, trust_remote_code=trust_remote_code)
    (directory / "README.md").write_text(card)


def try_saving(directory: Path, where: str, *, trust_remote_code: bool = False) -> None:
    """Do once what writing a model that started from `directory` takes, all but its weights.

    Raises:
        ModelError: its config cannot be written, or its tokenizer not be read from where it was written.
    """
    from transformers import AutoConfig, AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="flowrl-saving-") as aside:
        try:
            settings: Any = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
            settings.save_pretrained(aside)
            _write_rest(directory, Path(aside), chat_template="", trust_remote_code=trust_remote_code)
            AutoTokenizer.from_pretrained(aside, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever transformers or a tokenizer's own code may raise
            what = f"{directory} could not be saved again after training ({type(error).__name__}: {error})"
            raise ModelError(where, what, "repair the file it names") from error


def _write_rest(source: Path, directory: Path, *, chat_template: str, trust_remote_code: bool) -> None:
    """Add to weights and config what else belongs to a model, and take back what was set for training only."""
    carry_along(source, directory)
    given = json.loads((source / "config.json").read_bytes()).get("use_cache", True)
    _amend(directory / "config.json", lambda settings: settings | {"use_cache": given})
    if chat_template:
        (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    if is_classifier(directory):
        _choose_padding(directory, trust_remote_code=trust_remote_code)
    else:
        write_stops(directory)


def _choose_padding(directory: Path, *, trust_remote_code: bool) -> None:
    """Let a classifier pad with a token that is in no text, for transformers reads the last that is no padding.

    Where padding is the end of a text, or nothing, that would be another token than the one it was trained on. A
    special token takes its place that no text ends with and no template writes; without one there is none, and
    sequences are scored one by one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):  # the model came without one that can be read, so no text goes through it here
        return
    settings = json.loads((directory / "config.json").read_bytes())
    ends = ending_of(tokenizer, directory=directory).stops
    written = json.dumps(tokenizer.chat_template or "")
    special = {tokenizer.pad_token: tokenizer.pad_token_id} if tokenizer.pad_token else {}
    special |= {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    taken = {tokenizer.bos_token, *(token for token, number in special.items() if number in ends or token in written)}
    rows = settings.get("vocab_size") or len(tokenizer)
    token = next((token for token, number in special.items() if token not in taken and number < rows), None)
    _amend(directory / "config.json", lambda settings: settings | {"pad_token_id": special.get(token or "")})
    if token is not None and token != tokenizer.pad_token and (directory / "tokenizer_config.json").is_file():
        _amend(directory / "tokenizer_config.json", lambda settings: settings | {"pad_token": token})


def cast_saved(directory: Path, dtype: Dtype) -> None:
    """Bring a saved model to another floating-point type, one file of weights at a time.

    Raises:
        ModelError: a weight is too large for it.
    """
    from safetensors.torch import load_file, save_file

    kind: torch.dtype = getattr(torch, dtype)
    size_bytes = 0
    for file in sorted(directory.glob("*.safetensors")):
        tensors = {name: t.to(kind) if t.is_floating_point() else t for name, t in load_file(file).items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ModelError(str(file), f"{name} does not fit into {dtype}", "choose bfloat16 or float32")
        save_file(tensors, file, metadata={"format": "pt"})
        size_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    _amend(directory / "config.json", lambda settings: settings | {"dtype": dtype})
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        _amend(index, lambda written: written | {"metadata": written["metadata"] | {"total_size": size_bytes}})


def _amend(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text())), indent=2) + "\n")
