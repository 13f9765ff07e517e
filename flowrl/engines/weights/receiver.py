"""vLLM's side of the weight transport: a WeightTransferEngine named "flowrl", and how a worker learns of it.

Two phases. `prefetch` starts a thread that receives a version into host memory and verifies its digests while the
worker goes on generating. It reports the outcome over a socket of the serving process. `update_weights` then only loads
those buffers, between `start_weight_update` and `finish_weight_update`, while generation is paused. So a version that
does not arrive, or arrives damaged, never touches the model. Imported by vLLM workers only.

Tests: tests/contracts/test_vllm_engine.py
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info
from vllm.model_executor.model_loader.reload.utils import get_layer_size, get_layer_tensors
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from flowrl.engines.vllm_adapters import left_out, spare_copies
from flowrl.engines.weights.base import WeightFetcher, unpack
from flowrl.engines.weights.manifest import AnyManifest, decode_manifest, transport_of
from flowrl.engines.weights.nearest import fetchers
from flowrl.errors import ProofError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

BACKEND = "flowrl"

# vLLM warns at every version of each layer that was sent no weights of its own, as a tied head and a table of rotations
# are; that a version has arrived whole is proved otherwise (its canary).
logging.getLogger(get_layerwise_info.__module__).addFilter(lambda record: "Failed to load weights" not in record.msg)


class Prefetched(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker reports of a prefetch."""

    version: int
    seconds: float
    kind: Literal["ok", "proof", "transfer"] = "ok"
    what: str = ""
    remedy: str = ""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """What a worker needs to know once."""

    where: str  # node and replica, for errors
    replica: int
    timeout_s: float
    replies: str  # path of the serving process's socket


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Which of the prefetched versions to load."""

    version: int


class FlowrlWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives verified buckets and loads them layer by layer."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._fetchers: dict[str, WeightFetcher] = {}
        self._staged: tuple[AnyManifest, list[torch.Tensor]] | None = None
        self._thread: threading.Thread | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Note where this worker stands; connections are made when the first version comes."""
        ranks = self.parallel_config
        self._init = init_info
        self._fetchers = fetchers(
            init_info.where,
            replica=init_info.replica,
            rank=ranks.rank % ranks.world_size,
            size=ranks.world_size,
            device=self.device,
            timeout_s=init_info.timeout_s,
            together=init_info.replies,
        )

    def prefetch(self, wire: str) -> None:
        """Start receiving the version a manifest describes and return at once."""
        manifest = decode_manifest(wire)
        if self._thread is not None:
            self._thread.join(self._init.timeout_s)
        self._staged = None
        self._thread = threading.Thread(target=self._fetch, args=(manifest,), name="flowrl-fetch", daemon=True)
        self._thread.start()

    def _fetch(self, manifest: AnyManifest) -> None:
        start_s = time.monotonic()
        outcome: dict[str, Any] = {}
        try:
            fetcher = self._fetchers[transport_of(manifest)]
            self._staged = manifest, fetcher.fetch(manifest)
            outcome = {"what": fetcher.note}
        except RunError as error:
            failure = "proof" if isinstance(error, ProofError) else "transfer"
            outcome = {"kind": failure, "what": error.what, "remedy": error.remedy}
        except Exception as error:  # whatever it was, the serving process must hear of it
            outcome = {"kind": "transfer", "what": f"receiving failed: {error!r}"}
        report = Prefetched(version=manifest.version, seconds=time.monotonic() - start_s, **outcome)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._init.replies)
            connection.sendall(msgspec.json.encode(report) + b"\n")

    def start_weight_update(self) -> None:
        """Put the parameters aside for a layer-by-layer reload."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load a prefetched version; the base class would wait for an accelerator, which CPUs have none of."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Hand every tensor of the version to the model in one pass.

        They stay on the host, as they do when vLLM reads them from files. Its loaders take the part that this worker
        serves before they copy, so no more than that comes to its device.
        """
        assert self._staged is not None, "a version is prefetched before it is loaded"
        manifest, buffers = self._staged
        assert manifest.version == update_info.version, f"{manifest.version} is staged, not {update_info.version}"
        model: Any = self.model
        with DirectCopies(model) as copies:
            model.load_weights(copies.follow(_tensors_of(manifest, buffers)))

    def finish_weight_update(self) -> None:
        """Repack what CPUs keep packed and put the parameters back in place."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model, self.device)
        repack_experts(self.model, self.device)
        self._staged = None

    def shutdown(self) -> None:
        """Close every connection."""
        for fetcher in self._fetchers.values():
            fetcher.close()
        self._fetchers = {}
        self._staged = None


class WorkerExtension:
    """Methods added to vLLM's worker; importing this module there registers the engine."""

    weight_transfer_engine: Any
    model_runner: Any

    def flowrl_prefetch(self, wire: str) -> None:
        """Start receiving a version (see FlowrlWeightTransferEngine.prefetch)."""
        self.weight_transfer_engine.prefetch(wire)

    def flowrl_left_out(self) -> list[str]:
        """Return the layers of the adapter that this worker does not apply."""
        return left_out(self.model_runner)


class DirectCopies(TorchDispatchMode):
    """Catches what a model's loader copies into parameters by itself, past their weight loaders, and loads it.

    A layerwise reload holds parameters without storage and goes by their weight loaders. What gpt-oss copies straight
    into its experts and sinks would vanish there, and the layers go on serving the old weights.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._places = {
            tensor.untyped_storage()._cdata: (layer, name, tensor)
            for layer in model.modules()
            for name, tensor in get_layer_tensors(layer).items()
            if tensor.is_meta
        }
        self._found: dict[torch.nn.Module, dict[str, torch.Tensor]] = {}
        self._num_copied: Counter[torch.nn.Module] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].is_meta and not args[1].is_meta:
            place = self._places.get(args[0].untyped_storage()._cdata)
            if place is not None and self._is_past_its_loader(*place[:2]):
                self._keep(*place, target=args[0], source=args[1])
        return func(*args, **(kwargs or {}))

    def _keep(
        self, layer: torch.nn.Module, name: str, whole: torch.Tensor, *, target: torch.Tensor, source: torch.Tensor
    ) -> None:
        """Copy what was meant for a parameter, or for a part of it, into memory."""
        found = self._found.setdefault(layer, {})
        if name not in found:
            found[name] = torch.zeros_like(whole, device=source.device)
        found[name].as_strided(target.size(), target.stride(), target.storage_offset()).copy_(source)
        self._num_copied[layer] += source.numel()

    def _is_past_its_loader(self, layer: torch.nn.Module, name: str) -> bool:
        known = get_layerwise_info(layer)
        return known.can_load() and all(name != loaded for loaded, _ in known.loaded_weights)

    def follow(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield weights, and load the layers that have all of theirs between two of them."""
        for weight in weights:
            yield weight
            self._load(*(layer for layer, count in self._num_copied.items() if count >= get_layer_size(layer)))
        self._load(*self._found)

    def _load(self, *layers: torch.nn.Module) -> None:
        for layer in layers:
            known = get_layerwise_info(layer)
            for name, tensor in self._found.pop(layer).items():
                parameter = getattr(layer, name)
                parameter.weight_loader = default_weight_loader
                known.loaded_weights.append((name, signature(default_weight_loader).bind(parameter, tensor)))
                known.load_numel += tensor.numel()
            del self._num_copied[layer]
            if not is_deferred_attention_layer(layer):
                _layerwise_process(layer, known)


def repack_tied_head(model: torch.nn.Module, device: torch.device) -> None:
    """Repack the output head of a model with tied embeddings from the weights just loaded.

    On CPUs linear layers are served from a packed copy, and the layerwise reload repacks only the layers that received
    weights; a tied head receives none and would go on serving the old ones while success is reported.
    """
    if device.type != "cpu":
        return
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for head in model.modules():
        if isinstance(head, ParallelLMHead) and owners[id(head.weight)] > 1:
            head.quant_method.process_weights_after_loading(head)


def repack_experts(model: torch.nn.Module, device: torch.device) -> None:
    """Repack the experts of a model from the weights just loaded.

    On CPUs experts are served from a packed copy too, which vLLM makes at the first load only; after a reload it would
    read plain weights as packed ones.
    """
    if device.type != "cpu":
        return
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)


def _tensors_of(manifest: AnyManifest, buffers: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for bucket, raw in zip(manifest.buckets, buffers, strict=True):
        yield from unpack(bucket, raw)


def register() -> None:
    """Make the engine known to vLLM, once in a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FlowrlWeightTransferEngine)


register()
spare_copies()
