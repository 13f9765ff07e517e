"""What lies in memory at the peak of each process of a graph, part by part, from settings and a model's shape.

Two places: the device the process computes on, and its host's memory. On a CPU they are one.

Invariants:
- every part has a name that says what it is, and it is what the engines of this version hold (DeepSpeed 0.19, vLLM
  0.33), not a rule of thumb;
- a peak is the largest of the moments at which memory is full: the end of a forward pass, the optimizer's step.

Held against real processes by `python -m perf.memory` (docs/how/memory.md: 14 of 16 settings within 10 %).
Called by the planner; nothing is loaded here.

b are the bytes of a weight, P all parameters, T those that are trained, n the ranks of a node.

Tests: tests/unit/tuning/test_memory_plan.py
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from flowrl.engines.base import Computing, Lora, Scoring, Serving, Training
from flowrl.errors import number_of
from flowrl.processor import bfloat16_here

if TYPE_CHECKING:
    from flowrl.tuning.shapes import Shape

Head = Literal["policy", "value", "reward"]
Parts = dict[str, float]

FLOAT = 4  # bytes of a float32
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_LOGITS = 1 << 26  # elements; flowrl/engines/head.py
CACHED_LOGITS = 1 << 24  # made at once on CPUs; the same file
CONTEXT = 600e6  # a CUDA context with cuBLAS and NCCL, on a device
GRAPHS = 1.0e9  # vLLM's captured graphs and workspace
WORKER = 1.1e9  # host memory of a process with torch, transformers and an engine, before a model
SERVER = 1.9e9  # of one with vLLM
PLAIN = 0.25e9  # of one that computes nothing
FIXED = 1.5e9  # Ray and the driver
BUCKET = 64 << 20  # of weights on their way; two at either end
DS_BUCKET = 500_000_000  # elements that DeepSpeed collects gradients in (reduce_bucket_size)
DS_LIVE = 1_000_000_000  # elements that ZeRO-3 keeps whole at once (stage3_max_live_parameters)
PERSISTENT = ("weights", "float32 weights", "Adam's moments", "gradients", "teacher")  # from one call to the next
OF_RANK_0 = ("weights on their way", "average of weights")  # that no other rank of a node holds
# What vLLM rounds weights to while it loads them (`quantization`): bytes of each, its part of a scale included. These
# are the layers' matrices, or those of experts alone; embeddings, the head and norms stay (vllm/config/quantization.py;
# how many weights share a scale: model_executor/layers/quantization/online).
ROUNDED = {
    "fp8": 1.0,
    "fp8_per_tensor": 1.0,
    "fp8_per_channel": 1.0,
    "fp8_per_block": 1 + 4 / 128**2,
    "mxfp8": 1 + 1 / 32,
    "mxfp4": 1 / 2 + 1 / 32,
}
ROUNDED_EXPERTS = {"int8_per_channel_weight_only": 1.0, "nvfp4_per_token": 1 / 2 + 1 / 16}
CACHED_IN = {"float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1}  # bytes of a number
FRAGMENTS = 0.04  # of what an allocator has asked of a device, lost between blocks


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """The sequences that a graph's nodes see."""

    prompt: int  # tokens at most
    response: int
    samples: int = 1  # of one prompt

    @property
    def whole(self) -> int:
        """Return the tokens of the longest sequence."""
        return self.prompt + self.response

    @property
    def read(self) -> float:
        """Return the part of a batch's tokens that a loss is of; prompts are computed once for their samples."""
        return self.samples * self.response / (self.prompt + self.samples * self.response)


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """What one process holds at its peak."""

    device: Parts = {}  # on its GPU; {}: it has none
    host: Parts = {}

    @property
    def device_bytes(self) -> float:
        """Return all of it."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> float:
        """Return all of it."""
        return sum(self.host.values())


def width_of(dtype: str, *, on_gpu: bool) -> int:
    """Return the bytes of a weight; "auto" as the engines choose it."""
    return WIDTHS[dtype] if dtype != "auto" else 2 if on_gpu or bfloat16_here() == "fast" else FLOAT


def adapted(shape: Shape, lora: Lora) -> float:
    """Return the parameters of an adapter: rank times both sides of each layer; fused experts have none."""
    h, q, k, f = shape.hidden, shape.query, shape.key, shape.inner
    sides = {"q_proj": h + q, "k_proj": h + k, "v_proj": h + k, "o_proj": q + h}
    if not shape.expert_parameters:
        sides |= {"up_proj": h + f, "down_proj": f + h} | ({"gate_proj": h + f} if shape.is_gated else {})
    targets = sides if lora.targets == "all-linear" else {name.rpartition(".")[2] for name in lora.targets}
    return lora.rank * shape.num_layers * sum(size for name, size in sides.items() if name in targets)


def computing(shape: Shape, config: Computing, work: Work, head: Head, *, on_gpu: bool) -> Need:
    """Return what a rank of a node with a training engine holds: of one that trains, or only scores."""
    if head != "policy":
        shape = shape.scored()
    rank = _Rank(shape, config, work, head, on_gpu=on_gpu)
    device = rank.held()
    moments = [rank.pass_peak(), rank.step_peak()] if rank.trains else [rank.score_peak()]
    for name, size in max(moments, key=lambda parts: sum(parts.values())).items():
        device[name] = device.get(name, 0.0) + size
    host: Parts = {"process": WORKER, **rank.offloaded}
    if not on_gpu:
        return Need(host=_merged(host, device, rank.published()))
    device["CUDA context"] = CONTEXT
    device["fragments"] = FRAGMENTS * (sum(device.values()) - CONTEXT)
    return Need(device=device, host=_merged(host, rank.published()))


class _Rank:
    """One rank of a training engine; each method returns parts of its memory."""

    def __init__(self, shape: Shape, config: Computing, work: Work, head: Head, *, on_gpu: bool) -> None:
        self.shape, self.config, self.work, self.head, self.on_gpu = shape, config, work, head, on_gpu
        self.b = width_of(config.dtype, on_gpu=on_gpu)
        self.is_fsdp = config.engine.endswith(":Fsdp2Engine")
        self.is_sharded = self.is_fsdp or config.engine.endswith(":DeepSpeedEngine")
        self.stage = 3 if self.is_fsdp else config.zero_stage if self.is_sharded else -1
        self.parts = config.tensor_parallel  # ranks that a layer's matrices are shared out to
        self.n: float = config.ranks if self.is_sharded and self.stage else 1
        if self.parts > 1:  # the embedding and the head are sharded over the groups of ranks alone
            outside = shape.num_parameters - shape.body
            self.n *= shape.num_parameters / (shape.body + outside * self.parts)
        self.trains = isinstance(config, Training)
        lora: Any = getattr(config, "lora", Lora())
        self.lora = lora
        self.total = float(shape.num_parameters)
        self.trained = adapted(shape, lora) if lora.rank and self.trains else self.total if self.trains else 0.0
        self.offloaded: Parts = {}

    # What is there all the time.

    def held(self) -> Parts:
        """Return weights, gradients and the optimizer's states."""
        b, n, trained = self.b, self.n, self.trained
        frozen = self.total if trained != self.total else 0.0
        parts: Parts = defaultdict(float)
        if self.lora.bits:
            parts["weights"] = (
                self.total - self.shape.embedding
            ) * self.lora.bits / 8 * 1.06 + self.shape.embedding * b
            parts["weights"] += b * trained
        elif self.stage == 3:
            only = self.is_fsdp and b < FLOAT  # what is trained there has its float32 weights only
            sharded = b * (frozen + trained * (not only)) / n
            self._put(parts, "weights", sharded, aside=self.config.offload_parameters)
            parts["weights gathered"] = self._gathered()
        else:
            parts["weights"] = b * (frozen + trained)
        if not self.trains:
            return dict(parts)
        aside = bool(getattr(self.config, "offload_optimizer", False)) or (
            self.is_fsdp and self.config.offload_parameters
        )
        copies = b < FLOAT if self.stage in (-1, 3) else self.stage > 0
        self._put(parts, "float32 weights", FLOAT * trained / n * copies, aside=aside)
        self._put(parts, "Adam's moments", 2 * FLOAT * trained / n, aside=aside)
        self._put(parts, "gradients", self._gradients(), aside=aside)
        if getattr(self.config, "ema_decay", 0.0):
            self.offloaded["average of weights"] = FLOAT * self.total
        return dict(parts)

    def _gathered(self) -> float:
        """Return what is whole of sharded weights at a time: of fully_shard's, the head's and those of two layers."""
        if not self.is_fsdp:
            return self.b * min(self.total, DS_LIVE + self.shape.largest)
        layers = 2 * self._layer() if self.config.zero_stage == 3 else self.shape.body / self.parts
        return self.b * min(self.total, self.total - self.shape.body + layers)

    def _layer(self) -> float:
        return self.shape.body / self.shape.num_layers / self.parts

    def _put(self, parts: Parts, name: str, size: float, *, aside: bool) -> None:
        if aside and self.on_gpu:
            self.offloaded[name] = self.offloaded.get(name, 0.0) + size
        elif size:
            parts[name] += size

    def _gradients(self) -> float:
        if self.stage == 1:
            return FLOAT * self.trained
        return FLOAT * self.trained / self.n

    # What comes on top of it at a time.

    def pass_peak(self) -> Parts:
        """Return what a forward and backward hold at their fullest, between the two or in the first layers back."""
        found = self._activations()
        head = self._head(with_gradient=True)
        layer = self._layer_back()
        found |= head if sum(head.values()) > layer else {"a layer's backward": layer}
        return found | {"gradients on their way": self._fresh()} if self.stage > 0 else found

    def step_peak(self) -> Parts:
        """Return what an optimizer step holds besides the states.

        ZeRO steps on one tensor of all of a rank's parameters (stage 3: of DS_LIVE at most) and puts its gradients
        together for it; on CPUs torch's AdamW, which is not fused there, makes two more of that size on its way.
        """
        if self.stage < 0:
            return {}
        if self.is_fsdp:  # the norm, of one gradient at a time in float64
            return {"the step's own": 2 * 2 * FLOAT * self.shape.largest / self.n}
        kept = self.b * self.trained * (self.stage == 1 and self.b < FLOAT)  # gradients in the model's dtype
        at_once = min(self.trained / self.n, DS_LIVE) if self.stage else float(self.shape.largest)
        together = self.stage == 3 or (self.on_gpu and self.stage > 0 and not kept)
        return {"the step's own": (together + 2 * (not self.on_gpu)) * FLOAT * at_once + kept}

    def score_peak(self) -> Parts:
        """Return what a forward without gradients holds."""
        tokens = self._tokens() / self.config.sequence_parallel
        layer = self.b * tokens * (4 * self.shape.hidden + (2 * self.shape.query + 3 * self.shape.inner) / self.parts)
        head = self._head(with_gradient=False)
        return head if sum(head.values()) > layer else {"activations": layer}

    def _fresh(self) -> float:
        """Return the buffers that gradients are collected in; on CPUs they fill while activations go."""
        if self.is_fsdp:  # of a layer or the head, and their copy to be summed in float32
            return (self.b + FLOAT) * max(self._layer(), self.total - self.shape.body) * (self.trained > 0)
        if self.stage == 1 and self.b < FLOAT:  # in the model's dtype, all of them
            return self.b * self.trained
        return self.b * DS_BUCKET if self.on_gpu and self.stage > 0 else 0.0

    def _tokens(self) -> float:
        return max(self.config.micro_batch_tokens, self.work.whole)

    def _of_layer(self) -> float:
        """Return the bytes that a token leaves in a layer for its backward."""
        s, b = self.shape, self.b
        wide = 8 * s.hidden if b < FLOAT else 0  # the norms' float32 copies
        normed = (4 if b < FLOAT else 6) * s.hidden
        inner = (4 if s.is_gated else 2) * s.inner
        return wide + b * (normed + (4 * s.query + inner) / self.parts) + 24

    def _activations(self) -> Parts:
        fed, layers = self._tokens(), self.shape.num_layers
        tokens = fed / self.config.sequence_parallel
        each = self._of_layer()
        if self.lora.rank:
            each += self.b * self.lora.rank * (7 if self.shape.is_gated else 6)
        kept = float(layers)
        parts: Parts = {}
        if getattr(self.config, "gradient_checkpointing", False):
            every: int = getattr(self.config, "checkpoint_every", 1)
            again = -(-layers // every)
            kept = layers - again + 1
            parts["inputs of layers"] = self.b * tokens * self.shape.hidden * again
            if getattr(self.config, "checkpoint_keeps", "inputs") == "products":
                s = self.shape
                products = 2 * s.hidden + (s.query + 2 * s.key + (2 if s.is_gated else 1) * s.inner) / self.parts
                parts["products of layers"] = self.b * tokens * products * again
        parts["activations"] = tokens * each * kept
        if self._has_mask:
            parts["activations"] += self.b * fed * self.work.whole
        return parts

    @property
    def _has_mask(self) -> bool:
        """Say whether what tokens see is given by a mask, of each token against its row."""
        return self.config.attention == "sdpa"

    def _layer_back(self) -> float:
        s = self.shape
        wide = 2 * s.hidden + (3 * s.inner + 2 * s.query) / self.parts
        return self._tokens() / self.config.sequence_parallel * self.b * wide

    def _head(self, *, with_gradient: bool) -> Parts:
        """Return what the language head holds: its float32 copy and the logits of a part of the tokens.

        Where a head multiplies in float32 it makes them a few rows at a time, and keeps one number of each in its
        weights' dtype for its backward; else a loss holds them, their exponents and their gradient.
        """
        if self.head != "policy":
            return {}
        s, asked = self.shape, self.config.head_dtype
        is_wide = asked == "float32" or (asked == "auto" and s.embedding <= MAX_LOGITS)
        is_lone = is_wide and self.config.dtype != "float16"  # flowrl/engines/head.py: LanguageHead.linear
        read = self._tokens() * self.work.read / self.config.sequence_parallel
        chunks = max(1, math.ceil(read * s.vocab / (MAX_LOGITS * 8 // self.b if is_lone else MAX_LOGITS)))
        logits = FLOAT * read / chunks * s.vocab
        copy = FLOAT * s.embedding * (self.b < FLOAT and is_wide)
        back = self.b * s.embedding * (self.trained == self.total) * is_wide
        if is_lone:
            kept = logits * self.b / FLOAT * with_gradient
            at_once = min(logits, 2 * FLOAT * (MAX_LOGITS if self.on_gpu else CACHED_LOGITS))
            if with_gradient and back > at_once + copy:
                return {"logits": kept, "the head's gradient": back}
            return {"logits": kept + at_once, "head in float32": copy}
        if not with_gradient:
            return {"logits": (1 + self.on_gpu) * logits, "head in float32": copy}
        return {"logits": 3 * logits, "head in float32": 2 * copy + back * (copy > 0)}

    # What goes out.

    def published(self) -> Parts:
        """Return what two versions take, the newest and the one before, or a model that is being saved; of rank 0."""
        if not self.trains or self.head != "policy":
            return {}
        return {"weights on their way": 2 * self.b * self.total + 2 * BUCKET * self.on_gpu}


def serving(shape: Shape, config: Serving, *, on_gpu: bool) -> Need:
    """Return what each device of a generator's replica holds, and the host; on GPUs the cache takes what is left."""
    b, parts = width_of(config.dtype, on_gpu=on_gpu), config.num_workers
    weights = served_weights(shape, config, on_gpu=on_gpu)
    if not on_gpu:
        tokens = config.max_model_len + max(
            config.max_running, config.max_model_len
        )  # of a step, as engines/vllm sets it
        activations, cache = _decoding(shape, config, b, tokens), float(config.kv_cache_bytes)
        return Need(host={"process": SERVER, "weights": weights, "KV cache": cache, "activations": activations})
    device = {
        "weights": weights / parts,
        "activations": _decoding(shape, config, b, 8192) / parts,
        "graphs and workspace": GRAPHS,
        "CUDA context": CONTEXT,
        "weights on their way": 2.0 * BUCKET,
    }
    return Need(device=device, host={"process": SERVER + (parts > 1) * parts * WORKER})


def served_weights(shape: Shape, config: Serving, *, on_gpu: bool) -> float:
    """Return the bytes of the weights that a generator's replica serves, as its engine rounds them."""
    b, method = width_of(config.dtype, on_gpu=on_gpu), _rounding_of(config)
    is_of_experts = method in ROUNDED_EXPERTS
    rounded = shape.expert_parameters if is_of_experts else shape.matrices if method in ROUNDED else 0
    width = (ROUNDED_EXPERTS if is_of_experts else ROUNDED).get(method, b)
    return b * (shape.num_parameters - rounded) + width * rounded


def _rounding_of(config: Serving) -> str:
    """Return the name of what rounds a generator's weights; "": nothing does. A dict says it layer by layer."""
    options = config.engine_options
    return "quantization_config" if "quantization_config" in options else str(options.get("quantization") or "")


def cache_width(config: Serving) -> int:
    """Return the bytes of a number in a generator's KV cache."""
    return CACHED_IN.get(str(config.engine_options.get("kv_cache_dtype")), width_of(config.dtype, on_gpu=True))


def rounding(config: Serving) -> list[str]:
    """Return in words how options of its engine make a generator smaller, and which of them are not counted."""
    found: list[str] = []
    method, cache = _rounding_of(config), str(config.engine_options.get("kv_cache_dtype", "auto"))
    for widths, what in ((ROUNDED, "layers"), (ROUNDED_EXPERTS, "experts")):
        if method in widths:
            found.append(f"matrices of {what} at {widths[method]:.4g} bytes a weight ({method}), all else in its dtype")
    if method and not found:
        found.append(f"weights in their dtype: what {method} makes of them is not known")
    if cache in CACHED_IN:
        found.append(f"KV cache at {number_of(CACHED_IN[cache], 'byte')} a number ({cache})")
    elif cache != "auto":
        found.append(f"KV cache in the model's dtype: what {cache} makes of it is not known")
    return found


def asleep(need: Need) -> Need:
    """Return what a process holds while others have its devices in turns (engines/aside, vLLM's sleep level 1).

    On a GPU its context and captured graphs stay, and what it held moves to the host, its cache excepted; on a CPU it
    goes to the disk, or is given up.
    """
    if not need.device:
        kept = ("process", "weights on their way", "average of weights")
        return Need(host={name: size for name, size in need.host.items() if name in kept})
    stays = {name: size for name, size in need.device.items() if name in ("CUDA context", "graphs and workspace")}
    moved = sum(size for name, size in need.device.items() if name in PERSISTENT)
    return Need(device=stays, host={**need.host, "put aside": moved})


def cached(shape: Shape, config: Serving, work: Work) -> float:
    """Return the KV cache of as many samples as may run together, each as long as it may get; bytes."""
    most = min(config.max_running, getattr(config, "max_groups", 1 << 30) * getattr(config, "group_size", 1))
    tokens = min(work.whole, config.max_model_len)
    return cache_width(config) * float(shape.kv) * tokens * most


def _decoding(shape: Shape, config: Serving, b: int, tokens: int) -> float:
    """Return what one step of an engine holds for so many tokens: a layer's states, and the logits of all samples."""
    layer = b * tokens * (4 * shape.hidden + 2 * shape.query + 3 * shape.inner)
    return layer + 3 * FLOAT * config.max_running * shape.vocab


def _merged(*parts: Parts) -> Parts:
    found: Parts = {}
    for each in parts:
        for name, size in each.items():
            found[name] = found.get(name, 0.0) + size
    return found


__all__ = [
    "CONTEXT",
    "FIXED",
    "PLAIN",
    "Need",
    "Scoring",
    "Work",
    "asleep",
    "cache_width",
    "cached",
    "computing",
    "rounding",
    "served_weights",
    "serving",
    "width_of",
]
