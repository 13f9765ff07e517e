"""Load Hugging Face models and read per-token numbers off them.

`load_model` returns the model for a head: "policy" (causal language model), "value" or "reward" (sequence
classification with one label, used as one linear head on every position; read before a token it is V(s_t), read
after it a reward). `TokenReader` runs the body once on a packed batch and applies the head only where a response
token is read, so logits of prompts are never computed. Invariants: safetensors only, no remote code unless asked, no
dropout (log-probs of a sample must be those of the network that sampled it), heads and log-softmax in float32, and
never more than `max_logits` logits held at once.

Called by the training engines. Shapes: R rows, L row length, H hidden size, V vocabulary, N response tokens.
"""

from __future__ import annotations

import inspect
import json
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowrl.engines.quantization import check_quantization, forget_quantization, quantized_loading
from flowrl.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flowrl.engines.base import Dtype, TrainingConfig
    from flowrl.engines.packing import Layout, PackedBatch, Reads
    from flowrl.engines.router import Routing
    from flowrl.engines.teacher import Reading

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_loading = threading.Lock()  # transformers sets process-wide state (the meta device) while it loads
MAX_LOGITS = 1 << 26  # float32 logits held at once: 256 MiB, and about three times that with their gradient


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the torch dtype; "auto" is bfloat16 where the processor computes in it, else float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def reads_of(config: TrainingConfig) -> Reads:
    """Return whether the head is read before or after each response token."""
    return "after" if config.head == "reward" else "before"


def load_model(config: TrainingConfig, *, where: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the model of a head from a local directory.

    A value or reward model from a sequence-classification checkpoint keeps its head; from a language model it starts
    with a head of zeros, so that its first values are 0.

    Raises:
        ModelError: no such directory, no tokenizer in it, or transformers cannot load it for this head.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    directory = Path(config.model)
    _check_directory(directory, where)
    loading: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
    loading |= {"dtype": dtype, "use_safetensors": True}
    if config.lora.bits:
        check_quantization(config.lora, where, has_gpu=device.type == "cuda")
        loading |= quantized_loading(config.lora, dtype, device)
    verbosity, has_bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # a new score head is not news here
    transformers.logging.disable_progress_bar()
    try:
        with _loading:
            if config.head == "policy":
                model = AutoModelForCausalLM.from_pretrained(directory, **loading)
            else:
                model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, **loading)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        remedy = "give a directory in Hugging Face format with safetensors"
        raise ModelError(where, f"{directory} cannot be loaded as a {config.head} model ({error})", remedy) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
        if has_bar:
            transformers.logging.enable_progress_bar()
    if config.head != "policy":
        _prepare_score(model, where, keep=is_classifier(directory))
    _silence_dropout(model)
    if config.lora.bits:
        forget_quantization(model)
    nn.Module.to(model, device)
    return model


def _check_directory(directory: Path, where: str) -> None:
    if not (directory / "config.json").is_file():
        raise ModelError(where, f"{directory} has no config.json", "give a local directory in Hugging Face format")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES[:4]):
        raise ModelError(where, f"{directory} has no tokenizer", "save the tokenizer beside the model")


def is_classifier(directory: str | Path) -> bool:
    """Return whether a checkpoint's own architecture is a sequence classifier."""
    try:
        settings = json.loads((Path(directory) / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return any(name.endswith("ForSequenceClassification") for name in settings.get("architectures") or [])


class _FloatLinear(nn.Linear):
    """A linear layer computed in float32 whatever its weights are stored in."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


def _prepare_score(model: PreTrainedModel, where: str, *, keep: bool) -> None:
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        raise ModelError(where, f"{type(model).__name__} has no linear `score` head", "choose another architecture")
    if not keep:
        with gathered([*score.parameters()]), torch.no_grad():
            for parameter in score.parameters():
                parameter.zero_()
    score.__class__ = _FloatLinear


def gathered(parameters: list[nn.Parameter]) -> Any:
    """Return a context in which ZeRO-3 shards are whole; for other parameters it does nothing."""
    from contextlib import nullcontext

    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def _silence_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, whichever of them there are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def choose_layout(model: PreTrainedModel, longest: int) -> Layout:
    """Return "shared" where every layer obeys a 4D attention mask and explicit positions up to `longest` tokens."""
    settings = model.config.get_text_config()
    obeys_mask = settings._attn_implementation in ("sdpa", "eager") and not getattr(settings, "alibi", False)
    kinds = set(getattr(settings, "layer_types", None) or ["full_attention"])
    is_attention = not model._is_stateful and kinds <= {"full_attention", "sliding_attention"}
    window = getattr(settings, "sliding_window", None) or longest
    takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
    return "shared" if obeys_mask and is_attention and takes_positions and longest <= window else "padded"


class TokenReader(nn.Module):
    """A model with its head, read at the response tokens of packed batches."""

    def __init__(self, model: PreTrainedModel, *, head: str, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.is_policy = head == "policy"
        self.temperature = temperature
        self.max_logits = MAX_LOGITS
        parameters = inspect.signature(model.base_model.forward).parameters
        self._takes_positions = "position_ids" in parameters

    @property
    def _layer(self) -> nn.Module:
        return cast("nn.Module", self.model.get_output_embeddings() if self.is_policy else self.model.score)

    def num_chunks(self, num_tokens: int) -> int:
        """Return into how many parts the head must be applied to keep within `max_logits`."""
        return -(-num_tokens * int(self.model.config.get_text_config().vocab_size) // self.max_logits)

    def states(self, batch: PackedBatch) -> Tensor:
        """Return the body's last states where the N response tokens are read, [N, H]."""
        return self._body(batch).last_hidden_state.flatten(0, 1).index_select(0, batch.read_N)

    def _body(self, batch: PackedBatch, **options: bool) -> Any:
        extra = {"position_ids": batch.position_ids_RL} if self._takes_positions else {}
        mask = batch.attention(self.model.dtype)
        return self.model.base_model(
            input_ids=batch.input_ids_RL, attention_mask=mask, use_cache=False, **extra, **options
        )

    def _routed(self, batch: PackedBatch, routing: Routing) -> tuple[Tensor, Tensor]:
        """Return the body's states at the response tokens, and what is to be measured at its routers."""
        output = self._body(batch, output_router_logits=True)
        top_k = int(self.model.config.get_text_config().num_experts_per_tok)
        states_NH = output.last_hidden_state.flatten(0, 1).index_select(0, batch.read_N)
        return states_NH, routing.measure(output.router_logits, batch.copies_RL.flatten(), top_k)

    def forward(
        self, batch: PackedBatch, *, needs_entropy: bool = False, num_chunks: int = 1, temperature: float | None = None,
        reading: Reading | None = None, routing: Routing | None = None,
    ) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:  # fmt: skip
        """Return the float32 log-probs or values of the N response tokens, and their entropy where asked.

        With a teacher's `reading` the second is the KL between its distribution at each token and the model's; with
        `routing` a third is what it measures at the routers, which stands alone in the first place while it counts.
        `num_chunks` must be the same on every rank, because ZeRO-3 gathers the head at each call.
        """
        states_NH, *routed = (self.states(batch),) if routing is None else self._routed(batch, routing)
        if routing is not None and routing.shares_AE is None:
            return routed[0], None
        if not self.is_policy:
            return self._layer(states_NH).squeeze(-1), None, *routed
        scale = self.temperature if temperature is None else temperature
        parts = [
            self._log_probs(states, targets, scale, part if part is not None else needs_entropy, is_one=num_chunks == 1)
            for states, targets, part in zip(
                states_NH.tensor_split(num_chunks),
                batch.target_N.tensor_split(num_chunks),
                reading.split(num_chunks) if reading is not None else [None] * num_chunks,
                strict=True,
            )
        ]
        further = [each for _, each in parts if each is not None]
        return torch.cat([logprobs for logprobs, _ in parts]), torch.cat(further) if further else None, *routed

    def _log_probs(
        self, states_NH: Tensor, targets_N: Tensor, temperature: float, further: bool | Reading, *, is_one: bool
    ) -> tuple[Tensor, Tensor | None]:
        arguments = (states_NH, targets_N, temperature, further)
        if is_one or not torch.is_grad_enabled():
            return self._head(*arguments)
        return checkpoint(self._head, *arguments, use_reentrant=False)  # logits are computed again in backward

    def _head(
        self, states_NH: Tensor, targets_N: Tensor, temperature: float, further: bool | Reading
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probs and, with `further`, entropies (True) or KLs to a teacher (its reading)."""
        logits_NV = self.logits(states_NH)
        if temperature != 1.0:
            logits_NV = logits_NV / temperature
        if further is False:  # one pass over the logits fewer, forward and backward, than the normaliser on its own
            return -nn.functional.cross_entropy(logits_NV, targets_N, reduction="none"), None
        normaliser_N = logits_NV.logsumexp(-1)
        logprobs_N = logits_NV.gather(-1, targets_N[:, None]).squeeze(-1) - normaliser_N
        if further is not True:
            return logprobs_N, further.divergence(logits_NV - normaliser_N[:, None])
        probs_NV = (logits_NV - normaliser_N[:, None]).exp()
        return logprobs_N, normaliser_N - (probs_NV * logits_NV).sum(-1)

    def logits(self, states_NH: Tensor) -> Tensor:
        """Return the language head's float32 logits with the scaling that some families add."""
        settings = self.model.config.get_text_config()
        logits_NV = self._layer(states_NH).float()
        if (divisor := getattr(settings, "logits_scaling", None)) is not None:  # Granite
            logits_NV = logits_NV / divisor
        for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon H1
            if (factor := getattr(settings, name, None)) is not None:
                logits_NV = logits_NV * factor
        if (cap := getattr(settings, "final_logit_softcapping", None)) is not None:  # Gemma 2
            logits_NV = torch.tanh(logits_NV / cap) * cap
        return logits_NV
