"""vLLM's side of the weight transport: a WeightTransferEngine named "flowrl", and how a worker learns of it.

Two phases. `prefetch` starts a thread that receives a version into host memory and verifies its digests while the
worker goes on generating, and reports the outcome over a socket of the serving process. `update_weights` then only
loads those buffers, between `start_weight_update` and `finish_weight_update`, while generation is paused. So a version
that does not arrive, or arrives damaged, never touches the model. Imported by vLLM workers only.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from flowrl.engines.weights.base import WeightFetcher, unpack
from flowrl.engines.weights.broadcast import BroadcastFetcher
from flowrl.engines.weights.manifest import AnyManifest, ShmManifest, decode_manifest
from flowrl.engines.weights.shm import ShmFetcher
from flowrl.errors import ProofError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

BACKEND = "flowrl"


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
        self._fetchers = {
            "shm": ShmFetcher(init_info.where),
            "broadcast": BroadcastFetcher(
                init_info.where,
                replica=init_info.replica,
                rank=ranks.rank % ranks.world_size,
                size=ranks.world_size,
                device=self.device,
                timeout_s=init_info.timeout_s,
            ),
        }

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
        kind = "shm" if isinstance(manifest, ShmManifest) else "broadcast"
        outcome: dict[str, Any] = {}
        try:
            self._staged = manifest, self._fetchers[kind].fetch(manifest)
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
        """Hand every tensor of the version to the model in one pass."""
        assert self._staged is not None, "a version is prefetched before it is loaded"
        manifest, buffers = self._staged
        assert manifest.version == update_info.version, f"{manifest.version} is staged, not {update_info.version}"
        model: Any = self.model
        model.load_weights(_on_device(manifest, buffers, self.device))

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

    def flowrl_prefetch(self, wire: str) -> None:
        """Start receiving a version (see FlowrlWeightTransferEngine.prefetch)."""
        self.weight_transfer_engine.prefetch(wire)


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


def _on_device(
    manifest: AnyManifest, buffers: list[torch.Tensor], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    for bucket, raw in zip(manifest.buckets, buffers, strict=True):
        yield from unpack(bucket, raw.to(device))


def register() -> None:
    """Make the engine known to vLLM, once in a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, FlowrlWeightTransferEngine)


register()
