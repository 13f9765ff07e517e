"""What an engine is: the adapter between a stage and vLLM, DeepSpeed or plain torch.

Two protocols. A `GenerationEngine` samples responses and swaps its weights while requests are in flight; it is
asynchronous and lives on the stage's event loop. A `TrainingEngine` scores token sequences, trains on them and
publishes its weights; its methods block and are called one at a time from one thread. An engine is named in a
node's config by import path (`engine="flowrl.engines.vllm:VllmEngine"`), so a new engine is one new file.

This module loads no torch: stages import it while a graph is being built.

Tests: tests/contracts/test_training_engines.py
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, cast

import msgspec

from flowrl.config import AUTO, Config, Count, ImportPath, Meta, Select, idle, load_class
from flowrl.errors import ConfigError
from flowrl.graph.stage import Ranks, StageConfig
from flowrl.imports import suggest
from flowrl.messages import Buffer, Routes, Sample, Weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from flowrl.messages import FloatArray
    from flowrl.telemetry.events import Slots

__all__ = [
    "Computing",
    "GenerationConfig",
    "GenerationEngine",
    "Lora",
    "Publishing",
    "Ranks",
    "Sampling",
    "Schedule",
    "Scoring",
    "Serving",
    "TokenGroup",
    "Training",
    "TrainingConfig",
    "TrainingEngine",
    "UpdateReport",
    "check_engine",
    "open_engine",
    "try_engine",
]

# What stages give to an engine's constructor; anything else that it takes is an option of its own.
GIVEN = {"config", "where", "name", "num_receivers", "receiver_index", "say"}
LEAST_CACHE_BYTES = 1 << 20  # for keys and values; less holds no sequence
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
AttentionKind = Literal["sdpa", "varlen", "flex"]
RoutingKind = Literal["own", "replay"]
CheckpointKeeps = Literal["inputs", "products"]


class Sampling(Config):
    """How responses are drawn; behaviour log-probs are those of this distribution."""

    # Response tokens at most, the stop token included; 256 where data.source, data.mix or data.tasks is set
    max_tokens: Annotated[int, Meta(ge=1)] = 16
    temperature: Annotated[float, Meta(gt=0)] = 1.0  # logits are divided by it; below 1 surer answers, less exploration
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0  # the likeliest tokens of this total probability; 1: all
    top_k: Annotated[int, Meta(ge=0)] = 0  # 0: no limit
    stop_token_ids: list[int] = []  # besides those where the model's answers end
    special_tokens: Literal["keep", "drop"] = "keep"  # in a sample's text, as <tool_call>; its end is never there
    ignore_stop: bool = False  # go on to max_tokens whatever is drawn; a stop token is then one like any other

    @property
    def is_cut(self) -> bool:
        """Return whether only a part of the distribution is drawn from."""
        return self.top_p < 1.0 or self.top_k > 0


class Lora(Config):
    """Low-rank adapters in place of full training: W stays as it is, W + scale * B A is learned."""

    rank: Annotated[int, Meta(ge=0)] = 0  # of B A; 0: every weight is trained
    alpha: Annotated[int, Meta(ge=1)] = 32  # scale is alpha / rank
    use_rslora: bool = False  # scale is alpha / sqrt(rank), which lets high ranks learn as fast as low ones
    # layers by the end of their names (["q_proj", "v_proj"]), or every linear layer but the head
    targets: Literal["all-linear"] | list[str] = "all-linear"
    start: str = ""  # directory of a peft adapter to go on from; "": a new one, which changes nothing at first
    bits: Literal[0, 4, 8] = 0  # QLoRA: W is held in so many bits (bitsandbytes, CUDA); 0: in dtype
    # What a policy's version brings its generators: A and B alone, which they apply beside their own W, or weights with
    # these merged in and rounded to dtype; auto: the adapter where the generators' engine serves it on this model.
    publish: Literal["auto", "adapter", "merged"] = "auto"
    dropout: float = 0.0  # must stay 0

    def __post_init__(self) -> None:
        if self.dropout:
            what = f"dropout {self.dropout}: the network that is trained would not be the one that samples"
            raise ValueError(f"{what}; leave it 0")
        if not self.rank and (self.bits or self.start):
            raise ValueError(f"bits {self.bits} and start {self.start!r} need an adapter; give its rank")


class Serving(StageConfig):
    """Settings of a node that samples with a generation engine."""

    engine_options: dict[str, Any] = {}  # further arguments of the engine's constructor
    dtype: Dtype = "auto"  # auto: bfloat16 where the processor is faster in it, else float32
    max_model_len: Annotated[int, Meta(ge=8)] = 512  # prompt plus response, tokens
    max_running: Annotated[int, Meta(ge=1), AUTO] = 64  # samples decoded together; auto: 256 on GPUs
    # for keys and values; 0, and auto on GPUs: what gpu_memory_utilization leaves
    kv_cache_bytes: Annotated[int, Meta(ge=0), AUTO] = 512 << 20
    # requests in flight when new weights arrive: go on (keep), are finished before (wait), or are ended and then drawn
    # anew (abort) or gone on with from the tokens that they have (resume)
    on_update: Literal["keep", "wait", "abort", "resume"] = "keep"
    # keys and values of earlier weights are used on by requests in flight; else they are computed again
    keep_cache: bool = False
    # where vLLM's core runs; auto: processes on GPUs and for tensor_parallel
    layout: Annotated[Literal["processes", "thread"], AUTO] = "thread"
    tensor_parallel: Annotated[Count, AUTO] = 1  # GPUs that one replica's model is split over; auto: its gpus
    # share of a GPU's memory for the engine; auto: less where others compute on it
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1), AUTO] = 0.85
    # nodes that train or score on the same devices (share) put aside what they hold while this one samples, and it
    # sleeps while they compute
    turns: Annotated[bool, AUTO] = False
    # with turns: a replica that others wait for, and of which no call ends for so long, is ended
    turn_limit_s: Annotated[float, Meta(gt=0)] = 900.0
    trust_remote_code: bool = False  # run the Python code that the model's directory brings
    threads: Annotated[Count, AUTO] = 1  # CPU threads for its kernels; auto: up to 8 beside a GPU
    transfer_timeout_s: Annotated[float, Meta(gt=0)] = 120.0  # for one weight update

    @property
    def pipeline_parallel(self) -> int:
        """Return the groups of layers that a model is split into, each on GPUs of its own: an option of vLLM's."""
        asked = self.engine_options.get("pipeline_parallel_size", 1)
        return asked if isinstance(asked, int) and asked > 0 else 1

    @property
    def num_workers(self) -> int:
        """Return the processes, and GPUs, that one replica's model is split over."""
        return self.tensor_parallel * self.pipeline_parallel

    def __post_init__(self) -> None:
        if 0 < self.kv_cache_bytes < LEAST_CACHE_BYTES:
            raise ValueError(f"kv_cache_bytes {self.kv_cache_bytes}: give {LEAST_CACHE_BYTES} or more, or 0")

    def implied(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the layout of an engine that needs several processes."""
        is_split = isinstance(ranks := given.get("tensor_parallel"), int) and ranks > 1
        return {".layout": "processes"} if is_split else {}


class GenerationConfig(Serving):
    """What a generation engine needs to open: the node's settings and the model."""

    model: str  # local directory in Hugging Face format
    adapter: Lora = Lora()  # that each version brings, and nothing else; of rank 0: versions bring the whole model
    routing: RoutingKind = "own"  # replay: samples bring the experts that their tokens were sent to


class UpdateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one weight update cost and how it was proved."""

    version: int
    pause_s: float  # from pausing generation to resuming it
    transfer_s: float  # receiving and loading the bytes
    mean_gap: float  # nats, canary against the learner; nan without a canary
    max_gap: float
    allowed_gap: float = float("nan")  # mean_gap above which the version would not be served
    note: str = ""  # what went otherwise than it should on the way


class GenerationEngine(Protocol):
    """Samples responses; every token knows its version and its behaviour log-prob."""

    @property
    def num_running(self) -> int:
        """Return how many samples are being decoded."""
        ...

    @property
    def slots(self) -> Slots:
        """Return its decode slots, filled with what it decodes and empty in pauses.

        An engine without them has no occupancy told.
        """
        ...

    async def open(self) -> None:
        """Load the model; the engine serves no version before the first update."""
        ...

    async def generate(
        self, *, request_id: str, prompt_ids: Sequence[int], num_samples: int, seed: int, sampling: Sampling,
        num_spare: int = 0,
    ) -> list[Sample]:  # fmt: skip
        """Sample `num_samples` responses; waits for the last of them. Cancelling it aborts the request.

        Sample i is drawn with seed + i and is the same alone or in a batch under the same weights. With `num_spare` so
        many more are begun, and those that have not ended when enough have are aborted; an engine may leave it out.
        """
        ...

    async def serve_loaded(self) -> None:
        """Serve what `open` loaded, as version 0: for graphs in which nothing is trained."""
        ...

    async def update_weights(self, weights: Weights) -> UpdateReport:
        """Receive and load a published version, prove it, and serve it.

        Raises:
            ProofError: the digest or the canary disagrees; the engine must not serve any more.
            TransferError: the bytes did not arrive before the deadline.
        """
        ...

    async def sleep(self) -> None:
        """Free what it holds on its devices; nothing is in flight, and nothing is asked for before `wake`."""
        ...

    async def wake(self) -> None:
        """Be as before `sleep`: the same version is served, proved again where it was loaded again."""
        ...

    async def close(self) -> None:
        """Stop every process and thread it started."""
        ...


class Schedule(Config):
    """Learning rate over the run: linear warm-up, then on from the peak.

    cosine and linear fall to `final_ratio` at the end; constant stays; wsd (warm-up, stable, decay: MiniCPM,
    2404.06395) stays, and falls linearly over the last `decay_ratio` of the steps.
    """

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # of the way from the peak to the end
    warmup_steps: Annotated[int, Meta(ge=0)] = 0  # optimizer steps from 0 up to lr
    total_steps: Annotated[int, Meta(ge=0)] = 0  # 0: filled in by the stage from the run's number of steps
    final_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.1  # of lr, at the end; cosine, linear and wsd
    decay_ratio: Annotated[float, Meta(gt=0, le=1)] = 0.1  # of wsd

    def ratio(self, step: int) -> float:
        """Return the learning rate of optimizer step `step` (0, 1, ...) over its peak.

        With 2 warm-up steps of 10 and final_ratio 0.1: 0.5, 1.0, 1.0, ... down to 0.1 at step 10; with wsd and
        decay_ratio 0.2 it is 1.0 up to step 8 and 0.55 at step 9.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        begin = self.warmup_steps
        if self.kind == "wsd":
            begin = max(begin, round(self.total_steps * (1 - self.decay_ratio)))
        progress = min(1.0, max(0.0, (step - begin) / max(1, self.total_steps - begin)))
        left = 0.5 * (1 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1 - progress
        return self.final_ratio + (1 - self.final_ratio) * left


class Computing(StageConfig):
    """Settings of a node that computes with a training engine, whether it trains or only scores."""

    engine: ImportPath = "flowrl.engines.torch:TorchEngine"  # module:Class of the training engine
    engine_options: dict[str, Any] = {}  # further arguments of the engine's constructor
    dtype: Dtype = "auto"  # auto: bfloat16 where the processor is faster in it, else float32
    # in which a policy's logits are multiplied; auto: float32 where that copy of the head is up to 256 MiB, else dtype
    head_dtype: Literal["auto", "float32", "model"] = "auto"
    # how what tokens see is given: by a mask (sdpa), or in memory linear in tokens: sequence by sequence (varlen), by
    # blocks (flex, on GPUs); a model or a device that cannot is said and has a mask; auto: varlen
    attention: Annotated[AttentionKind, AUTO] = "varlen"
    # DeepSpeed: 1 shards the optimizer over the ranks, 2 gradients too, 3 weights too. Fsdp2Engine shards all of them:
    # with 2 a layer's weights stay gathered from forward to backward, with 3 they are gathered twice
    zero_stage: Annotated[int, Meta(ge=0, le=3)] = 2
    # gradients are summed while backward goes on (DeepSpeed); auto: on GPUs
    overlap_comm: Annotated[bool, AUTO] = False
    # ranks that run each sequence together, every one a part of its tokens: activations of a rank are 1/N; must divide
    # ranks, and be at most the model's attention heads
    sequence_parallel: Count = 1
    # ranks that run the same tokens, every one with a part of each layer's matrices (Fsdp2Engine); must divide ranks,
    # the model's heads of queries and keys, and its inner width
    tensor_parallel: Count = 1
    micro_batch_tokens: Annotated[int, Meta(ge=1)] = 2048  # tokens in one forward and backward
    # those not in use on the CPU (DeepSpeed, zero_stage 3; Fsdp2Engine, with the optimizer's state and its step)
    offload_parameters: bool = False
    trust_remote_code: bool = False  # run the Python code that the model's directory brings
    threads: Annotated[Count, AUTO] = 1  # CPU threads of each rank; auto: up to 8 beside a GPU
    # on CPUs: where it puts aside what it holds while a generator has the devices (turns); "": for temporary files
    aside_dir: str = ""


class Scoring(Computing):
    """Settings of a node whose model is frozen."""

    bits: Literal[0, 4, 8] = 0  # the model is held in so many bits, as a policy with lora.bits; 0: in dtype

    @property
    def lora(self) -> Lora:
        """Return the adapter that a quantised model has: a new one, which changes nothing."""
        return Lora(rank=1, bits=self.bits) if self.bits else Lora()


# An adapter's learning rate over that of full training (Schulman et al. 2025, "LoRA Without Regret"). Twenty versions
# at the learner's 1e-5 left the held-out score of SmolLM2-135M where it was (0.145 to 0.141), at 1e-4 it rose to 0.531.
ADAPTER_RATE = 10


class Training(Computing):
    """Settings of a node that trains with a training engine."""

    lr: Annotated[float, Meta(ge=0)] = 1e-6  # peak learning rate of AdamW; ten times the default with an adapter
    lora: Lora = Lora()
    schedule: Schedule = Schedule()
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW: decay of the mean and of the square of gradients
    adam_eps: Annotated[float, Meta(gt=0)] = 1e-8  # added to the root of AdamW's mean square
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0  # of matrices; norms, biases and embeddings are left out
    max_grad_norm: Annotated[float, Meta(ge=0)] = 1.0  # the gradient is scaled down to it; 0: never
    gradient_checkpointing: bool = False  # keep only the inputs of layers and compute the rest again in backward
    checkpoint_every: Annotated[int, Meta(ge=1)] = 1  # with gradient_checkpointing: the first of so many layers only
    # with it, too: what of such a layer is kept; with its matrix products norms, activations and attention alone are
    # computed again, which costs little
    checkpoint_keeps: CheckpointKeeps = "inputs"
    # layers are compiled when they first run, once for all of them: a minute or more at the start, and each step faster
    compile: bool = False
    offload_optimizer: bool = False  # its state and its step on the CPU (DeepSpeed, zero_stage 1 to 3)
    freeze: list[str] = []  # parameters that are not trained, by name: ["model.embed_tokens.*", "model.layers.[01].*"]
    ema_decay: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # of an average of the weights, saved as ema_model; 0: none
    router_aux_loss: Annotated[float, Meta(ge=0)] = 0.0  # weight of the loss that uses experts evenly; 0: none
    seed: int = 0  # of a new adapter, and of the order in which a step's groups come into minibatches

    def idle_settings(self) -> list[str]:
        """Return which settings have no effect, and why, each by its address within these."""
        kind = self.schedule.kind
        unread = {"constant": ("total_steps", "final_ratio", "decay_ratio"), "wsd": ()}.get(kind, ("decay_ratio",))
        found = idle(self.schedule, unread, "schedule", f"with schedule.kind={kind}")
        if not self.lora.rank:
            found += idle(self.lora, ("alpha", "use_rslora", "targets", "publish"), "lora", "while lora.rank is 0")
        if not self.gradient_checkpointing:
            names = ("checkpoint_every", "checkpoint_keeps")
            found += idle(self, names, "", "without gradient_checkpointing=true", plain=Training())
        return found

    def implied(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return an adapter's learning rate where one is trained."""
        lora = given.get("lora")
        rank = cast("dict[str, Any]", lora).get("rank") if isinstance(lora, dict) else 0
        return {".lr": float(f"{ADAPTER_RATE * self.lr:g}")} if isinstance(rank, int) and rank > 0 else {}


class Publishing(Training):
    """Settings of a node whose weights go to generators, version by version."""

    # auto: shared memory within a machine, broadcast to others, for each generator
    transport: Literal["auto", "shm", "broadcast"] = "auto"
    transfer_timeout_s: Annotated[float, Meta(gt=0)] = 120.0  # for one weight transfer
    # versions from one whose tensors have digests to the next; those between are proved by their canary alone
    digest_every: Annotated[int, Meta(ge=1)] = 1


class TrainingConfig(Publishing):
    """What a training engine needs to open: the node's settings, the model and what to read off it."""

    model: str  # local directory in Hugging Face format
    # log-probs of tokens; or one value per token, read before it (V of PPO) or after it (reward models)
    head: Literal["policy", "value", "reward"] = "policy"
    temperature: Annotated[float, Meta(gt=0)] = 1.0  # logits are divided by it, as in sampling
    chat_template: str = ""  # that was learned with, and goes with the saved model; "": the tokenizer's own
    frozen: bool = False  # it is only scored with: no optimizer is made, however its weights are sharded
    routing: RoutingKind = "own"  # replay: tokens go to the experts that samples bring


class TokenGroup(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, its responses, and what is known of each response token.

    `columns[name][i]` has one float32 for each token of response i; names are those of the algorithm's batch
    ("behaviour", "reference", "advantages", "values", "returns").
    """

    prompt_ids: Buffer
    responses: list[Buffer]
    columns: dict[str, list[Buffer]] = {}
    routes: list[Routes] = []  # one for each response, or none: the model's own choice of experts


class TrainingEngine(Protocol):
    """Scores and trains on token groups. Blocking; rank 0 leads and the other ranks follow it."""

    def open(self, ranks: Ranks) -> None:
        """Load the model on this rank and join the others."""
        ...

    def follow(self) -> None:
        """Serve as a rank other than 0 until rank 0 closes; returns then."""
        ...

    def score(self, groups: Sequence[TokenGroup]) -> list[list[FloatArray]]:
        """Return log-probs or values of every response token, `[group][sample]` -> float32 [tokens]."""
        ...

    def compare(self, groups: Sequence[TokenGroup], objective: Select) -> list[list[FloatArray]]:
        """Return the KL between the objective's teacher and the model at every response token, as `score` does."""
        ...

    def accumulate(self, groups: Sequence[TokenGroup], objective: Select) -> dict[str, float]:
        """Run forward and backward over the groups; the gradient is that of total / count over all of them.

        `objective` is loaded on every rank (`objective.load(...)`) and has `loss(batch) -> Loss`; see
        flowrl.algorithms.base. Returns the objective's metrics, each divided once by its own global count.
        """
        ...

    def learned(self) -> dict[tuple[int, int], FloatArray]:
        """Return the log-probs or values that the last `accumulate` learned from, as far as rank 0 has them.

        By (group, sample), numbered as in that call; with several ranks the others have the rest.
        """
        ...

    def apply(self) -> dict[str, float]:
        """Take the optimizer step for what has been accumulated; returns lr and, where one was taken, grad_norm."""
        ...

    def publish(self, version: int, canary: Buffer | None) -> Weights:
        """Offer the current weights as `version`; returns the message for the generators."""
        ...

    def transfer(self, version: int) -> None:
        """Wait until the bytes of `version` no longer depend on the parameters (they may change afterwards)."""
        ...

    def retire(self, version: int, keep: frozenset[int] = frozenset()) -> None:
        """Forget the bytes of every version before `version` but those in `keep`."""
        ...

    def save_model(self, directory: Path, *, card: str) -> None:
        """Write Hugging Face format: safetensors, config, tokenizer, model card."""
        ...

    def save_state(self, directory: Path) -> None:
        """Write everything needed to go on training: weights, optimizer, schedule."""
        ...

    def load_state(self, directory: Path) -> None:
        """Read what `save_state` wrote."""
        ...

    def sleep(self) -> None:
        """Put aside what it holds on its devices; nothing else is called before `wake`."""
        ...

    def wake(self) -> None:
        """Be as before `sleep`, to the bit."""
        ...

    def close(self) -> None:
        """Release the ranks, the transport and the model."""
        ...


def check_engine(path: str, options: Mapping[str, Any], where: str, *, needs: Sequence[str] = ()) -> None:
    """Import an engine's class; hold it against what it `needs`, `engine_options` against what its constructor takes.

    Raises:
        ConfigError: it does not import, is no engine of this kind, or takes no such option.
    """
    kind = load_class(path, f"{where}.engine")
    if lacking := [name for name in needs if not hasattr(kind, name)]:
        what = f"{path} has no {', '.join(lacking)}, so it is no engine for {where}"
        raise ConfigError(f"{where}.engine", what, "take another, or write them (docs/extend/engine.md)")
    taken = inspect.signature(kind).parameters.values()
    known = {each.name for each in taken if each.kind is not each.VAR_KEYWORD} - GIVEN
    if hasattr(kind, "check_options"):  # it passes on what it does not take itself, and knows to whom
        passed_on = {name: value for name, value in options.items() if name not in known}
        kind.check_options(passed_on, f"{where}.engine_options")
    if any(each.kind is each.VAR_KEYWORD for each in taken):
        return
    for name in options:
        if name not in known:
            what = f"{path} takes no option {name!r}{suggest(name, known) if known else '; it has none'}"
            raise ConfigError(f"{where}.engine_options.{name}", what, "leave it out")


def travelling(lora: Lora, *, engine: str, model: Path, where: str) -> Lora:
    """Return the adapter that generators of an engine are sent as it is, or none where they are sent merged weights.

    An engine that serves adapters says on which models: by `unserved(lora, model)`, why it does not, or "".

    Raises:
        ConfigError: lora.publish asks for an adapter that they would not serve.
    """
    if not lora.rank or lora.publish == "merged":
        return Lora()
    why = unserved(lora, engine=engine, model=model)
    if why and lora.publish == "adapter":
        raise ConfigError(f"{where}.lora.publish", f"is adapter, but {why}", "set it to merged")
    return Lora() if why else lora


def unserved(lora: Lora, *, engine: str, model: Path) -> str:
    """Return why generators of an engine do not serve an adapter beside a model; "": they do."""
    if not engine:
        return "the graph's Sampler names no engine that would serve it"
    ask = getattr(load_class(engine, "generator.engine"), "unserved", None)
    return ask(lora, model) if ask else f"{engine} serves no adapters"


def try_engine(request: Path) -> None:
    """Construct the engine that a file describes (`open_engine`'s arguments) and have it try its options, and end.

    Raises:
        UserError: it would not start with them.
    """
    told = msgspec.json.decode(request.read_bytes())
    config = msgspec.convert(told["config"], GenerationConfig)
    open_engine(told["path"], config=config, where=told["where"], **told["options"]).try_options()


def open_engine(path: str, *, where: str, **arguments: Any) -> Any:
    """Import the engine class `module:Class` and construct it; nothing is loaded before its `open`."""
    return load_class(path, where)(where=where, **arguments)
