"""Load Hugging Face models and read per-token numbers off them.

`load_model` returns the model, in eval mode, for a head: "policy" (causal language model), "value" or "reward"
(sequence classification with one label, used as one linear head on every position; read before a token it is V(s_t),
read after it a reward). `TokenReader` runs the body once on a packed batch and applies the head only where a response
token is read (head.py), so logits of prompts are never computed.

Invariants:
- safetensors only, no remote code unless asked, no dropout (log-probs of a sample must be those of the network that
  sampled it);
- no weight of a model is made up, but those of a new head: what its files lack is refused, and what they have besides
  is said;
- logits and log-softmax are in float32, the product that gives the logits too where `head_dtype` says so, and never
  more than `max_logits` logits held at once;
- whether it all is what the model itself says is looked at when an engine opens (agreement.py).

Called by the training engines. Shapes: R rows, L row length, H hidden size, V vocabulary, N response tokens.

Tests: tests/unit/engines/test_models.py
"""

from __future__ import annotations

import bisect
import inspect
import math
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowrl.engines import attention, sequence
from flowrl.engines.head import MAX_LOGITS, FloatLinear, LanguageHead, body_of
from flowrl.engines.packing import LAYOUTS
from flowrl.engines.quantization import check_quantization, forget_quantization, quantized_loading
from flowrl.errors import FlowrlError, ModelError
from flowrl.model_files import check_plain, has_tokenizer, is_classifier, quiet_transformers
from flowrl.processor import bfloat16_here

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedConfig, PreTrainedModel

    from flowrl.algorithms.base import Direction, Head
    from flowrl.engines.base import AttentionKind, Dtype, TrainingConfig
    from flowrl.engines.packing import Layout, PackedBatch, Reads
    from flowrl.engines.router import Routing
    from flowrl.engines.routes import RouteReplay
    from flowrl.engines.sequence import SequenceSplit
    from flowrl.graph.stage import Say

MOST_REASON = 300  # characters of transformers' own words; some list every model there is
_loading = threading.Lock()  # transformers sets process-wide state (the meta device) while it loads


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the torch dtype; "auto" is bfloat16 where the device is faster in it, else float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if bfloat16_here() == "fast" else torch.float32


def reads_of(config: TrainingConfig) -> Reads:
    """Return whether the head is read before or after each response token."""
    return "after" if config.head == "reward" else "before"


def load_model(
    config: TrainingConfig, *, where: str, dtype: torch.dtype, device: torch.device, say: Say = lambda _: None
) -> PreTrainedModel:
    """Load the model of a head from a local directory.

    A value or reward model from a sequence-classification checkpoint keeps its head; from a language model it starts
    with a head of zeros, so that its first values are 0. `say` is told of weights that the model has no place for.

    Raises:
        ModelError: no such directory, no tokenizer in it, transformers cannot load it for this head, or it lacks some
            of the model's weights.
    """
    directory = Path(config.model)
    _check_directory(directory, where)
    source: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
    loading = {**source, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    loading |= {"ignore_mismatched_sizes": True}  # for `_check_whole` to say which
    if config.lora.bits:
        check_quantization(config.lora, where, has_gpu=device.type == "cuda")
        loading |= quantized_loading(config.lora, dtype, device)
    try:
        with _loading, quiet_transformers():
            settings, kind = _kind_of(directory, config.head, where, source)
            model, found = kind.from_pretrained(directory, config=settings, **loading)
    except (FlowrlError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever transformers or a model's own code may raise
        raise _unloadable(directory, config.head, where, error) from error
    if extra := _check_whole(model, found, config.head, directory, where):
        say(extra)
    if config.head != "policy":
        _prepare_score(model, where, keep=is_classifier(directory))
    elif config.head_dtype == "float32" or (config.head_dtype == "auto" and _has_small_head(model)):
        _widen_head(model)
    if config.lora.bits:
        forget_quantization(model)
    nn.Module.to(model, device)
    return model


def outline(directory: Path, head: Head, where: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """Return what `load_model` would, without any weights: its modules and the names and shapes of its parameters."""
    from transformers import AutoModelForCausalLM

    source = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    settings, kind = _kind_of(directory, head, where, source)
    with torch.device("meta"), quiet_transformers():
        if head == "policy":
            return AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
        return kind(settings)


def check_weights(directory: Path, head: Head, where: str, declared: Mapping[str, Any]) -> None:
    """Insist that what the headers of a directory's weights declare, by name, is the whole of what `load_model` needs.

    Code of the model's own is left to `load_model`.

    Raises:
        ModelError: transformers has no such model, or some of its weights are not there in its shapes.
    """
    from transformers import AutoModelForCausalLM

    tensors = {name: torch.empty(each["shape"], dtype=torch.bfloat16, device="meta") for name, each in declared.items()}
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "device_map": {"": "meta"}}
    try:
        settings, kind = _kind_of(directory, head, where, {"local_files_only": True})
        if head == "policy":
            kind = cast("Any", AutoModelForCausalLM._model_mapping[type(settings)])
            if kind.config_class == settings.sub_configs.get("text_config"):
                settings = settings.get_text_config()
        if not hasattr(kind, "base_model_prefix"):
            return
        with _loading, quiet_transformers():
            model, found = kind.from_pretrained(None, config=settings, state_dict=tensors, **options)
    except FlowrlError:
        raise
    except Exception as error:  # whatever transformers may raise
        raise _unloadable(directory, head, where, error) from error
    _check_whole(model, found, head, directory, where)


def _kind_of(directory: Path, head: Head, where: str, source: dict[str, Any]) -> tuple[PreTrainedConfig, Any]:
    """Return a model's config and the class that loads it for a head.

    Raises:
        ModelError: a policy that is no causal language model, or quantized weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_plain(directory, where)
    settings: Any = AutoConfig.from_pretrained(directory, **source, **({} if head == "policy" else {"num_labels": 1}))
    if head != "policy":
        return settings, _class_with_score(settings, where)
    if settings.is_encoder_decoder or is_classifier(directory):
        kind = "an encoder-decoder" if settings.is_encoder_decoder else "a classifier"
        what = f"{directory} is {kind} ({', '.join(settings.architectures or [settings.model_type])})"
        raise ModelError(where, what, "give a causal language model (*ForCausalLM)")
    if not source.get("trust_remote_code") and type(settings) not in AutoModelForCausalLM._model_mapping:
        what = f"transformers has no causal language model for the {type(settings).__name__} in {directory}"
        raise ModelError(where, what, "choose another architecture")
    return settings, AutoModelForCausalLM


def _unloadable(directory: Path, head: Head, where: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:MOST_REASON] or type(error).__name__
    remedy = "give a directory in Hugging Face format with safetensors"
    return ModelError(where, f"{directory} cannot be loaded as a {head} model ({reason})", remedy)


def _check_whole(model: PreTrainedModel, found: dict[str, Any], head: Head, directory: Path, where: str) -> str:
    """Insist that every weight came from the files; returns in words what these hold besides, "" for nothing.

    Transformers would fill the others with random numbers.

    Raises:
        ModelError: some did not, or in another shape.
    """
    is_new = head != "policy" and not is_classifier(directory)
    missing = sorted(name for name in found["missing_keys"] if not (is_new and name.startswith("score.")))
    unknown, kind = sorted(found["unexpected_keys"]), type(model).__name__
    if head != "policy" and is_new:  # a language model's head gives way to one of scores
        unknown = [name for name in unknown if name.partition(".")[0] == body_of(model)[0]]
    besides = f"; besides they hold {_some(unknown)}" if unknown else ""
    if missing:
        what = f"the weights in {directory} lack {len(missing)} that {kind} has ({_some(missing)}{besides})"
        raise ModelError(where, what, "save it whole again, or correct its config.json")
    for name, there, here in sorted(found["mismatched_keys"]):
        what = f"{name} is {list(there)} in {directory} and {list(here)} in {kind} by its config.json"
        raise ModelError(where, what, "correct config.json, or give the weights that belong to it")
    extra = f"{len(unknown)} weights in {directory}, for which {kind} has no place, are left out ({_some(unknown)})"
    return extra if unknown else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_directory(directory: Path, where: str) -> None:
    if not (directory / "config.json").is_file():
        raise ModelError(where, f"{directory} has no config.json", "give a local directory in Hugging Face format")
    if not has_tokenizer(directory):
        raise ModelError(where, f"{directory} has no tokenizer", "save the tokenizer beside the model")


def _class_with_score(config: PreTrainedConfig, where: str) -> type[PreTrainedModel]:
    """Return the class of a family's models with a linear `score` head: transformers' own, or one made here.

    What is made has the names that transformers gives to such models: the family's body under its usual name, `score`.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
    from transformers.modeling_layers import GenericForSequenceClassification

    causal: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    theirs: Any = AutoModelForSequenceClassification._model_mapping.get(type(config), None)
    if isinstance(theirs, type) and issubclass(theirs, GenericForSequenceClassification):
        return cast("type[PreTrainedModel]", theirs)
    with torch.device("meta"):  # looked at, not used
        if theirs is not None and isinstance(getattr(theirs(config), "score", None), nn.Linear):
            return theirs
        if causal is None:  # code of the model's own
            return cast("type[PreTrainedModel]", AutoModelForSequenceClassification)
        name, body = body_of(causal(config), where)
    body_class, family = type(body), next(c for c in causal.__mro__ if c.__name__.endswith("PreTrainedModel"))
    assert issubclass(family, PreTrainedModel)

    class Scored(family):
        base_model_prefix = name

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.num_labels = config.num_labels
            setattr(self, name, body_class(config))
            self.score = nn.Linear(config.get_text_config().hidden_size, config.num_labels, bias=False)
            self.post_init()

    Scored.__module__ = family.__module__  # where transformers looks for what the class supports
    stem = causal.__name__.replace("ForCausalLM", "")
    if hasattr(transformers, f"{stem}ForSequenceClassification"):  # theirs has another head than `score`
        stem = causal.__name__
    Scored.__name__ = Scored.__qualname__ = f"{stem}ForSequenceClassification"
    return Scored


def _prepare_score(model: PreTrainedModel, where: str, *, keep: bool) -> None:
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        raise ModelError(where, f"{type(model).__name__} has no linear `score` head", "choose another architecture")
    if not keep:
        with gathered([*score.parameters()]), torch.no_grad():
            for parameter in score.parameters():
                parameter.zero_()
    score.__class__ = FloatLinear


def _has_small_head(model: PreTrainedModel) -> bool:
    """Say whether a float32 copy of the language head's weight is no more than the logits that may be held at once."""
    settings = model.config.get_text_config()
    return int(settings.vocab_size) * int(settings.hidden_size) <= MAX_LOGITS


def _widen_head(model: PreTrainedModel) -> None:
    """Have the language head multiply in float32 (MiniMax-M1, 2506.13585, section 3.2), where it is a plain layer."""
    layer: Any = model.get_output_embeddings()
    if type(layer) is nn.Linear:
        layer.__class__ = FloatLinear


def gathered(parameters: list[nn.Parameter]) -> Any:
    """Return a context in which ZeRO-3 shards are whole; for other parameters it does nothing."""
    from contextlib import nullcontext

    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def choose_layout(model: PreTrainedModel, longest: int, kind: AttentionKind) -> Layout:
    """Return a layout with shared prompts where layers obey a 4D mask and explicit positions up to `longest` tokens.

    It is the one without a mask where the model looks its attention up (`look_up_attention`).
    """
    settings = model.config.get_text_config()
    narrow = {name for name, value in vars(settings).items() if value and ("window" in name or "attention_c" in name)}
    looks_up = settings._attn_implementation in (attention.NAME, sequence.NAME) and kind != "sdpa"
    obeys_mask = settings._attn_implementation in ("sdpa", "eager", attention.NAME, sequence.NAME)
    obeys_mask = obeys_mask and not getattr(settings, "alibi", False)
    kinds = set(getattr(settings, "layer_types", None) or ["full_attention"])
    is_attention = not model._is_stateful and kinds <= {"full_attention", "sliding_attention"}
    is_attention = is_attention and narrow <= {"sliding_window", "use_sliding_window", "max_window_layers"}
    window = getattr(settings, "sliding_window", None) or longest
    takes_positions = "position_ids" in inspect.signature(body_of(model)[1].forward).parameters
    if not (obeys_mask and is_attention and takes_positions and longest <= window):
        return "padded"
    return "unmasked" if looks_up else "shared"


def look_up_attention(model: PreTrainedModel) -> None:
    """Let a model take its attention from ours, where it takes one by name and torch's is what it has."""
    code = sys.modules[type(body_of(model)[1]).__module__]
    if model.config.get_text_config()._attn_implementation == "sdpa" and hasattr(code, "ALL_ATTENTION_FUNCTIONS"):
        attention.register()
        model.config._attn_implementation = attention.NAME


def reach_of_positions(rotary: nn.Module, device: torch.device, dtype: torch.dtype, most: int) -> int:
    """Return the longest sequence, up to `most` tokens, beside which the first positions are what they are alone.

    Longer than that, RoPE of the kinds "dynamic" and "longrope" turns every position of a batch otherwise.
    """
    kinds = getattr(rotary, "rope_type", None)
    options = [{"layer_type": kind} for kind in kinds] if isinstance(kinds, dict) else [{}]

    def turned(last: int) -> list[Tensor]:
        positions = torch.tensor([[0, 1, 2, last]], device=device)
        found = [rotary(torch.zeros(1, device=device, dtype=dtype), positions, **chosen) for chosen in options]
        return [part[:, :3] for pair in found for part in pair]

    def is_as_alone(length: int) -> bool:
        alone, beside = turned(3), turned(length - 1)
        turned(3)  # some remember the longest they have seen
        return all(map(torch.equal, alone, beside))

    return most if is_as_alone(most) else bisect.bisect_left(range(4, most), True, key=lambda n: not is_as_alone(n)) + 3


class TokenReader(nn.Module):
    """A model with its head, read at the response tokens of packed batches."""

    def __init__(
        self, model: PreTrainedModel, *, head: str, temperature: float, attention: AttentionKind = "sdpa"
    ) -> None:
        super().__init__()
        self.model = model
        self.attention: AttentionKind = attention
        if attention != "sdpa":
            look_up_attention(model)
        self.dtype, self.device = model.dtype, model.device  # it computes in and on, however its weights are kept
        self.is_policy = head == "policy"
        self.temperature = temperature
        self.max_logits = MAX_LOGITS
        # None: logits are read off the model's own forward, all of them at once.
        self.language_head: LanguageHead | None = LanguageHead(model) if self.is_policy else None
        self.layouts: tuple[Layout, ...] = LAYOUTS  # in which the model reads right
        self.split: SequenceSplit | None = None  # of rows over ranks
        self.replay: RouteReplay | None = None  # of the experts that batches bring
        self._body_name, body = body_of(model)
        self._takes_positions = "position_ids" in inspect.signature(body.forward).parameters
        known = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)
        most = 8 * (known if known > 0 else 4096)  # -1 is what XLNet and T5 say who know no limit
        reaches = {
            module: reach_of_positions(module, model.device, model.dtype, most)
            for module in body.modules()
            if any(name.endswith("inv_freq") for name in module._buffers)
            and "position_ids" in inspect.signature(module.forward).parameters
        }
        self._stretching = tuple(module for module, reach in reaches.items() if reach < most)
        self.reach = min(reaches.values(), default=most)  # tokens; longer sequences change those beside them

    def layout(self, longest: int) -> Layout:
        """Return the layout for sequences of up to `longest` tokens: the first in which all are read right."""
        found: Layout = "alone"
        if longest <= self.reach or not self._stretching:
            found = choose_layout(self.model, longest, self.attention)
        return next(layout for layout in LAYOUTS[LAYOUTS.index(found) :] if layout in self.layouts)

    def attention_in_words(self) -> str:
        """Return what the user should know where the attention asked for is not what the model takes."""
        if self.attention == "sdpa" or "unmasked" in self.layouts:
            return ""
        return f"{type(self.model).__name__} takes no attention={self.attention}: what its tokens see is masked"

    def num_chunks(self, num_tokens: int, *, lone: bool = False) -> int:
        """Return into how many parts the head must be applied to keep within `max_logits`.

        Of `lone` log-probs, with no entropy and no teacher's, less is kept where the head's layer makes them by itself.
        """
        at_once = self.max_logits * 8 // self.dtype.itemsize if lone and self._linear else self.max_logits
        return -(-num_tokens * int(self.model.config.get_text_config().vocab_size) // at_once)

    @property
    def _linear(self) -> FloatLinear | None:
        return getattr(self.language_head, "linear", None)

    def states(self, batch: PackedBatch) -> Tensor:
        """Return the body's last states where the N response tokens are read, [N, H]; or logits, as `logits` takes.

        Where rows are split, they are those of the tokens that this rank judges.
        """
        is_whole = self.is_policy and self.language_head is None
        return self._run(self.model if is_whole else self._body, batch)[0]

    @property
    def _body(self) -> nn.Module:
        return cast("nn.Module", getattr(self.model, self._body_name))

    def _run(self, part: nn.Module, batch: PackedBatch, **options: bool) -> tuple[Tensor, Any]:
        """Return what the model or its body gives at the response tokens, and its routers' logits where asked."""
        for rotary in self._stretching:  # which may remember a longer batch
            rotary(torch.zeros(1, dtype=self.dtype, device=self.device), batch.position_ids_RL[:1, :1] * 0)
        if batch.layout == "alone":
            found = [self._run_row(part, batch, row, options) for row in range(len(batch.input_ids_RL))]
            states = torch.cat([states for states, _ in found])
            routers = [torch.cat(layer) for layer in zip(*(each for _, each in found), strict=True)]
        else:
            length, split = batch.input_ids_RL.shape[1], self._split_of(batch)
            batch = batch if split is None else split.padded(batch)
            mask = batch.attention(self.dtype, is_flex=self.attention == "flex")
            ids, positions = batch.input_ids_RL, batch.position_ids_RL
            if split is not None:
                ids, positions = split.part(ids), split.part(positions)
            extra = {"position_ids": positions} if self._takes_positions else {}
            routes, copies = batch.routes_RLAK, batch.copies_RL
            if split is not None and routes is not None:
                routes, copies = split.part(routes), split.part(copies)
            self._send(routes, copies)
            output = part(input_ids=ids, attention_mask=mask, use_cache=False, **extra, **options)
            if split is not None:
                return split.deal(output[0], batch.read_N, length), []
            states, routers = output[0].flatten(0, 1), output.router_logits if options else []
        return states.index_select(0, batch.read_N), routers

    def _split_of(self, batch: PackedBatch) -> SequenceSplit | None:
        """Return what splits a batch's rows over ranks; None: every rank runs them whole."""
        return None if batch.layout == "alone" else self.split

    def _send(self, routes: Tensor | None, copies: Tensor) -> None:
        """Have the tokens of the pass that comes go to these experts, [..., layers, experts of a token]."""
        if self.replay is not None:
            self.replay.use(None if routes is None else routes.flatten(0, -3), copies.flatten())

    def _run_row(self, part: nn.Module, batch: PackedBatch, row: int, options: dict[str, bool]) -> tuple[Tensor, Any]:
        """Return what a row's sequence gives when it is run as it is, followed by zeros to the row's length."""
        length = batch.piece_RL.shape[1]
        ids = batch.input_ids_RL[row, : int((batch.piece_RL[row] >= 0).sum())]
        routes, copies = batch.routes_RLAK, batch.copies_RL[row, : len(ids)]
        self._send(None if routes is None else routes[row, : len(ids)], copies)
        output = part(input_ids=ids[None], use_cache=False, **options)
        grown = (0, 0, 0, length - len(ids))
        routers = output.router_logits if options else []
        return nn.functional.pad(output[0][0], grown), [
            nn.functional.pad(each.flatten(0, -2), grown) for each in routers
        ]

    def _routed(self, batch: PackedBatch, routing: Routing) -> tuple[Tensor, Tensor]:
        """Return the body's states at the response tokens, and what is to be measured at its routers."""
        states_NH, logits = self._run(self._body, batch, output_router_logits=True)
        top_k = int(self.model.config.get_text_config().num_experts_per_tok)
        return states_NH, routing.measure(logits, batch.copies_RL.flatten(), top_k)

    def forward(
        self, batch: PackedBatch, *, needs_entropy: bool = False, num_chunks: int = 1, temperature: float | None = None,
        reading: Reading | None = None, routing: Routing | None = None, as_states: bool = False,
    ) -> tuple[Tensor, Tensor | None, *tuple[Tensor, ...]]:  # fmt: skip
        """Return the float32 log-probs or values of the N response tokens, and their entropy where asked.

        With a teacher's `reading` the second is the KL between its distribution at each token and the model's; with
        `routing` a third is what it measures at the routers, which stands alone in the first place while it counts.
        `as_states` gives what comes before the head instead. `num_chunks` must be the same on every rank, because
        ZeRO-3 gathers the head at each call.
        """
        states_NH, *routed = (self.states(batch),) if routing is None else self._routed(batch, routing)
        if routing is not None and routing.shares_AE is None:
            return routed[0], None
        targets_N, split = batch.target_N, self._split_of(batch)
        if split is not None:
            targets_N = split.own(targets_N)
            reading = None if reading is None else reading.split(split.size)[split.place]
        found, further_N = states_NH, None
        if not as_states and not self.is_policy:
            found = cast("nn.Module", self.model.score)(states_NH).squeeze(-1)
        elif not as_states:
            scale = self.temperature if temperature is None else temperature
            further = needs_entropy if reading is None else reading
            found, further_N = self._judge(states_NH, targets_N, scale, further, num_chunks)
        if split is not None:
            num_read = len(batch.target_N)
            found = split.tell(found, num_read)
            further_N = None if further_N is None else split.tell(further_N, num_read)
        return found, further_N, *routed

    def _judge(
        self, states_NH: Tensor, targets_N: Tensor, temperature: float, further: bool | Reading, num_chunks: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return the head's log-probs of tokens, and what `_head` gives further, part by part."""
        told = [further] * num_chunks if isinstance(further, bool) else further.split(num_chunks)
        chunks = zip(states_NH.tensor_split(num_chunks), targets_N.tensor_split(num_chunks), told, strict=True)
        parts = [self._log_probs(*chunk[:2], temperature, chunk[2], is_one=num_chunks == 1) for chunk in chunks]
        more = [each for _, each in parts if each is not None]
        return torch.cat([logprobs for logprobs, _ in parts]), torch.cat(more) if more else None

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
        if further is False and self._linear is not None:
            return self._linear(states_NH, targets_N, temperature), None
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
        """Return the language head's float32 logits."""
        return states_NH.float() if self.language_head is None else self.language_head(states_NH)


@dataclass(frozen=True)
class Reading:
    """The teacher's last states at some response tokens, from which its distribution there is made when needed."""

    reader: TokenReader
    states_NH: Tensor
    direction: Direction
    share: float  # the teacher's in the mixture of jsd
    temperature: float

    def split(self, num_chunks: int) -> list[Reading]:
        """Return the reading in parts, as the student's states are split."""
        return [replace(self, states_NH=states) for states in self.states_NH.tensor_split(num_chunks)]

    def divergence(self, student_NV: Tensor) -> Tensor:
        """Return the divergence at each token from the student's log-probs over the vocabulary.

        The gradient is the student's. With p_T = (1/2, 1/2) and p_S = (1/4, 3/4), forward is (log 2 + log 2/3) / 2,
        0.1438.
        """
        with torch.no_grad():
            teacher_NV = torch.log_softmax(self.reader.logits(self.states_NH) / self.temperature, -1)
        if self.direction == "jsd":
            mixture_NV = torch.logaddexp(teacher_NV + math.log(self.share), student_NV + math.log1p(-self.share))
            teacher_N = (teacher_NV.exp() * (teacher_NV - mixture_NV)).sum(-1)
            student_N = (student_NV.exp() * (student_NV - mixture_NV)).sum(-1)
            return self.share * teacher_N + (1.0 - self.share) * student_N
        if self.direction == "forward":
            return (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1)
        return (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)
