"""What leaves a training engine: versions for the generators, and models on disk.

`Publisher` owns the transport, which it opens at the first version. Invariants: parameters travel under the names and
in the shapes of a saved checkpoint, tied ones once; every version can carry a canary, the log-probs of a fixed
sequence at temperature 1, whatever temperature the policy is trained at. Called by trainer on rank 0; `cast_saved` by
`flowrl export`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flowrl.ending import write_stops
from flowrl.engines.base import TokenGroup
from flowrl.engines.models import copy_tokenizer
from flowrl.engines.packing import pack, plan
from flowrl.errors import ModelError
from flowrl.messages import Buffer, Canary, Weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from flowrl.engines.base import Dtype, TrainingConfig

# Mean |log-prob difference| in nats that still counts as the same weights. Engines of equal weights differ by up to
# 2e-6 in float32 and about 0.04 in bfloat16; a stale layer differs by 0.5 and more.
CANARY_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.15}


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
        if config.transport == "auto":
            self.transport = "broadcast" if device.type == "cuda" else "shm"

    def open_sender(self) -> Any:
        """Return the transport's sender."""
        from flowrl.engines.weights import open_sender

        return open_sender(
            self.transport,
            name=self._name,
            num_receivers=self._num_receivers,
            timeout_s=self._config.transfer_timeout_s,
            device=self._device,
            host=self._host,
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

    def retire(self, version: int) -> None:
        """Forget every version before `version`."""
        if self._sender is not None:
            self._sender.retire(version)

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
    return Canary(token_ids=tokens, logprobs=logprobs, max_mean_gap=CANARY_GAP[dtype])


def as_saved(model: PreTrainedModel, parameters: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters under the names and in the shapes of a saved checkpoint, which generators load.

    Transformers holds some families (mixtures of experts) in another form than their checkpoints; those are turned
    back, at the price of a second copy of the weights.
    """
    if not getattr(model, "_weight_conversions", None):
        yield from parameters
        return
    from transformers.core_model_loading import revert_weight_conversion

    whole = {name: tensor.clone() for name, tensor in parameters}
    yield from revert_weight_conversion(model, whole).items()


def write_model(
    model: PreTrainedModel, parameters: dict[str, Tensor], directory: Path, *, source: str, card: str,
    chat_template: str = "",
) -> None:  # fmt: skip
    """Write parameters and the model's buffers as safetensors, with config, tokenizer and model card.

    A chat template goes with it in place of the tokenizer's own; the tokens that end its answers are named.
    """
    buffers = {name for name, _ in model.named_buffers()}
    kept = {name: tensor.cpu() for name, tensor in model.state_dict().items() if name in buffers}
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory, state_dict={**parameters, **kept})
    copy_tokenizer(Path(source), directory)
    if chat_template:
        (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    if model.can_generate():
        write_stops(directory)
    (directory / "README.md").write_text(card)


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
