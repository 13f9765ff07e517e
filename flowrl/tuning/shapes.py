"""What of a model decides how much memory and time it takes: its shape, from config.json and the safetensors headers.

Nothing is loaded or fetched. Where weights are present their headers say how many parameters there are; where only a
config is, transformers builds the model on its meta device in a process of its own and counts. A model that is not here
at all is looked for in the Hugging Face cache and among the published configurations that recipes name; after that the
user names a config by `--model-config`. Fields are named as most families name them, with the other names known.
Called by memory.py and the planner.

Tests: tests/unit/tuning/test_shapes.py
"""

from __future__ import annotations

import json
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.data.model_process import run_in_process
from flowrl.data.models import DEFAULT_MODEL, HUB_NAME, newest_of_run, num_parameters, read_json
from flowrl.errors import ConfigError, ModelError, said_briefly
from flowrl.model_files import text_config
from flowrl.tuning.published import PARAMETERS, PUBLISHED

if TYPE_CHECKING:
    from collections.abc import Mapping

OPTION = "--model-config"
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
ANSWER_S = 10.0  # for the hub, on a model


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A model's sizes; elements, not bytes."""

    num_parameters: int  # a tied embedding counts once
    num_layers: int
    hidden: int
    vocab: int
    is_tied: bool
    heads: int
    query: int  # heads times their size
    key: int  # the same of keys, or of values
    inner: int  # of the feed-forward part, as far as one token passes through it
    is_gated: bool  # its feed-forward part multiplies two projections
    expert_parameters: int = 0  # of all experts of all layers
    routed: float = 1.0  # part of the experts that a token passes through
    largest: int = 0  # parameter, as transformers holds it: all experts of a layer are one
    kv: int = 0  # elements that a token leaves in the cache of all layers
    has_score: bool = False  # a classifier: a head of one number in place of the language head

    @property
    def embedding(self) -> int:
        """Return the elements of the language head, and of the embeddings."""
        return self.vocab * self.hidden

    @property
    def body(self) -> int:
        """Return the parameters without embeddings and head."""
        heads = 1 if self.is_tied or self.has_score else 2
        return max(0, self.num_parameters - heads * self.embedding)

    @property
    def matrices(self) -> int:
        """Return the parameters of all layers' matrices; norms are taken at two a layer and one behind them."""
        return max(0, self.body - (2 * self.num_layers + 1) * self.hidden)

    @property
    def active(self) -> float:
        """Return the parameters that multiply a token, the head's left out: 12.6 of Mixtral's 46.7 thousand million."""
        return self.body - (1 - self.routed) * self.expert_parameters

    def scored(self) -> Shape:
        """Return the shape with a head of one number in place of the language head."""
        if self.has_score:
            return self
        fewer = 0 if self.is_tied else self.embedding
        return msgspec.structs.replace(self, num_parameters=self.num_parameters - fewer + self.hidden, has_score=True)


def shape_of(settings: Mapping[str, Any], num_parameters: int) -> Shape:
    """Return the shape that a config and a number of parameters describe.

    Raises:
        ConfigError: the config lacks what every language model has.
    """
    text = text_config(settings)

    def of(*names: str, default: int | None = None) -> int:
        value = next((text[name] for name in names if isinstance(text.get(name), int | float)), default)
        if value is None:
            raise ConfigError("config.json", f"has no {names[0]}", "give the config of a causal language model")
        return int(value)

    hidden, layers = (
        of("hidden_size", "n_embd", "d_model"),
        of("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    )
    heads = of("num_attention_heads", "n_head", "n_heads", default=1) or 1
    size = of("head_dim", default=hidden // heads) or hidden // heads
    groups = 1 if text.get("multi_query") and not text.get("new_decoder_architecture") else heads
    groups = groups if groups == 1 else of("num_key_value_heads", "num_kv_heads", default=heads)
    inner = _first(text.get("intermediate_size")) or of("ffn_dim", "n_inner", "d_ff", default=4 * hidden)
    experts = of("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", default=0)
    each = of("moe_intermediate_size", default=inner)
    taken = _first(text.get("num_experts_per_tok")) or of("moe_topk", "moe_k", default=1)
    shared = each * of("n_shared_experts", default=0) or of("shared_expert_intermediate_size", default=0)
    latent = of("kv_lora_rank", default=0)
    per_layer = latent + of("qk_rope_head_dim", default=0) if latent else 2 * groups * size
    sparse = max(0, layers - of("first_k_dense_replace", default=0))
    fused = 2 * experts * each * hidden
    return Shape(
        num_parameters=num_parameters,
        num_layers=layers,
        hidden=hidden,
        vocab=of("vocab_size"),
        is_tied=bool(text.get("tie_word_embeddings", True)),
        heads=heads,
        query=heads * size,
        key=groups * size,
        inner=taken * each + shared if experts else inner,
        is_gated=str(text.get("model_type"))
        not in {"falcon", "gpt2", "gpt_neox", "opt", "bloom", "mpt", "phi", "gptj"},
        expert_parameters=3 * experts * each * hidden * sparse // 1 if experts else 0,
        routed=taken / experts if experts else 1.0,
        largest=max(of("vocab_size") * hidden, inner * hidden, fused),
        kv=layers * per_layer,
        has_score="ForSequenceClassification" in str(settings.get("architectures")),
    )


def _first(value: Any) -> int:
    """Return a number, the largest of several, or 0."""
    several = cast("list[Any]", value) if isinstance(value, list) else [value]
    return max((each for each in several if isinstance(each, int)), default=0)


def find_shape(name: str, configs: Mapping[str, Path], *, is_for_run: bool = False) -> Shape:
    """Return a model's shape by the name that a graph has for it; `configs` are files that the user names for it.

    For a run, which will fetch the model, the hub is asked for its config and the number of its parameters. Else
    nothing is fetched, and those of a config are counted, which takes its time.

    Raises:
        ModelError: nothing is known of it.
    """
    where = f"model {name}"
    given = configs.get(name) or configs.get("")
    directory = newest_of_run(Path(given or name).expanduser())
    if directory.is_file() and directory.suffix == ".json":
        return _counted(directory, where)
    if (directory / "config.json").is_file():
        held = num_parameters(directory, where)
        if held:
            return shape_of(read_json(directory / "config.json", where), held)
        if is_for_run:
            raise ModelError(where, "has no weights", "fetch the model again")
        return _counted(directory / "config.json", where)
    if given is not None:
        raise ModelError(where, f"{given} is neither a config.json nor a directory with one", f"mend {OPTION}")
    known = HUB_NAME if name == DEFAULT_MODEL else name
    if known in PUBLISHED:
        return shape_of(PUBLISHED[known], PARAMETERS[known])
    if (found := _cached(name)) is not None:
        with suppress(ModelError):  # that a part of its weights is not in the cache
            if held := num_parameters(found.parent, where):
                return shape_of(read_json(found, where), held)
        if not is_for_run:
            return _counted(found, where)
    if is_for_run and HUB_ID.fullmatch(name):
        return _fetched(name, where)
    what = "is not here, and what it is like is not known"
    raise ModelError(where, what, f"copy its config.json and name it by {OPTION} {name}=FILE")


def parse_configs(given: list[str]) -> dict[str, Path]:
    """Return model -> config of what `--model-config` was given; "" is every model of the graph.

    Raises:
        ConfigError: there is no such file.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, _, path = text.rpartition("=")
        if not Path(path).expanduser().exists():
            raise ConfigError(OPTION, f"{path} is not there", "name a config.json, or MODEL=config.json")
        found[name] = Path(path).expanduser()
    return found


def _cached(name: str) -> Path | None:
    """Return the config of a model in the Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _fetched(name: str, where: str) -> Shape:
    """Return the shape of a model of which nothing is here, from the hub; its weights stay there."""
    with tempfile.TemporaryDirectory(prefix="flowrl-shape-") as aside:
        run_in_process(fetch_shape, Path(name), Path(aside), where=where)
        return shape_of(read_json(Path(aside) / "config.json", where), int((Path(aside) / "count").read_text()))


def fetch_shape(name: Path, directory: Path) -> None:
    """Write into a directory the config of a model on the hub, and how many parameters the hub has counted in it."""
    import huggingface_hub

    hub: Any = huggingface_hub
    try:
        weights = hub.model_info(str(name), timeout=ANSWER_S).safetensors  # first: it is not tried again and again
        if weights is None:
            raise ValueError("it has no safetensors")
        config = Path(hub.hf_hub_download(str(name), "config.json")).read_bytes()
    except Exception as error:  # of the hub, its client or the network: each has kinds of its own
        what = f"is not here, and the hub says nothing of it ({said_briefly(error)})"
        raise ModelError(f"model {name}", what, "see that the hub can be reached, or give a directory") from error
    (directory / "config.json").write_bytes(config)
    (directory / "count").write_text(str(weights.total))


def _counted(config: Path, where: str) -> Shape:
    """Return the shape of a model of which only the config is here."""
    settings = read_json(config, where)
    with tempfile.TemporaryDirectory(prefix="flowrl-shape-") as aside:
        (Path(aside) / "config.json").write_text(json.dumps(settings))
        run_in_process(count_parameters, Path(aside), where=where)
        return shape_of(settings, int((Path(aside) / "count").read_text()))


def count_parameters(directory: Path) -> None:
    """Write beside a config how many parameters its model has, none of which is made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    where = f"model {directory}"
    try:
        settings = cast("Any", AutoConfig).from_pretrained(directory, local_files_only=True)
        is_scored = "ForSequenceClassification" in str(settings.architectures)
        kind: Any = AutoModelForSequenceClassification if is_scored else AutoModelForCausalLM
        with torch.device("meta"):
            count = kind.from_config(settings).num_parameters()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(where, f"transformers builds nothing from its config ({said})", "mend it") from error
    (directory / "count").write_text(str(count))
