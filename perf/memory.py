"""Memory of real processes at their peak, beside what the planner predicts of them.

Each setting opens a real engine on a random model made on the spot, in processes of its own: training engines take two
optimizer steps of two micro-batches each (moments exist, gradients add up), scoring engines score, vLLM answers as many
requests as may run together. Measured is the peak of the process's resident memory (the kernel's own, VmHWM, set back
before the engine opens) less what the same process held once its libraries were warm from a model of 100 k parameters:
what the model, its states and its passes took. The allocator gives freed memory back at once (MALLOC_TRIM_THRESHOLD_),
or the peak would be that of fragments, and oneDNN keeps no kernels that it compiled for a shape: tens of MB in
bfloat16, whatever the model's size. vLLM serves one engine a process, so what it takes whatever it serves is
measured in another (`BARE`). Predicted is the same process's entry in `flowrl.tuning.memory`, without the part named
`process`. Run `python -m perf.memory`; it takes ten minutes on two free cores.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from flowrl.tuning.shapes import Shape

MIB = 1 << 20
VOCABULARY = 16000
SIZES = {"17M": (384, 6, 1024), "52M": (576, 12, 1536), "99M": (768, 14, 2048)}  # hidden, layers, intermediate
HEAD = 64  # of an attention head
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
    "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
}  # fmt: skip
TRAINED, SERVED = {"micro_batch_tokens": 640}, {"max_model_len": 256}
PROMPT, RESPONSE, SAMPLES = 64, 64, 4


class Setting(NamedTuple):
    """One engine on one model."""

    size: str
    changes: dict[str, Any]  # of the node's settings
    kind: str = "train"  # train, score or serve
    ranks: int = 1
    groups: int = 4  # of one step


DEEPSPEED = "flowrl.engines.deepspeed:DeepSpeedEngine"
TORCH = "flowrl.engines.torch:TorchEngine"
SETTINGS = [
    Setting("17M", {"engine": TORCH, "dtype": "float32"}),
    Setting("52M", {"engine": TORCH, "dtype": "bfloat16"}),
    Setting("17M", {"zero_stage": 0, "dtype": "float32"}),
    Setting("52M", {"zero_stage": 1, "dtype": "bfloat16"}),
    Setting("52M", {"zero_stage": 2, "dtype": "bfloat16"}),
    Setting("99M", {"zero_stage": 2, "dtype": "bfloat16", "gradient_checkpointing": True}),
    Setting("52M", {"zero_stage": 2, "dtype": "bfloat16", "micro_batch_tokens": 320}),
    Setting("52M", {"zero_stage": 2, "dtype": "float32"}),
    Setting("52M", {"zero_stage": 3, "dtype": "bfloat16"}),
    Setting("52M", {"zero_stage": 1, "dtype": "bfloat16"}, ranks=2),
    Setting("52M", {"zero_stage": 2, "dtype": "bfloat16"}, ranks=2),
    Setting("99M", {"zero_stage": 3, "dtype": "bfloat16", "gradient_checkpointing": True}, ranks=2),
    Setting("52M", {"zero_stage": 2, "dtype": "bfloat16", "lora": {"rank": 16}}),
    Setting("99M", {"engine": TORCH, "dtype": "bfloat16", "lora": {"rank": 16}, "gradient_checkpointing": True}),
    Setting("52M", {"engine": TORCH, "dtype": "bfloat16"}, kind="score"),
    Setting("52M", {"zero_stage": 3, "dtype": "bfloat16"}, kind="score", ranks=2),
    Setting("52M", {"zero_stage": 2, "dtype": "bfloat16", "head": "value"}),
    Setting("52M", {"dtype": "bfloat16", "kv_cache_bytes": 256 * MIB, "max_running": 16}, kind="serve"),
    Setting("99M", {"dtype": "bfloat16", "kv_cache_bytes": 768 * MIB, "max_running": 16}, kind="serve"),
]


BARE = Setting("warm", {"dtype": "bfloat16", "kv_cache_bytes": 16 * MIB, "max_running": 16}, kind="serve")
# MiB, by the place of a setting: what `python -m perf.memory` measured (docs/how/memory.md has the table).
MEASURED: dict[int, int] = {
    0: 418, 1: 1182, 2: 425, 3: 1429, 4: 1330, 5: 2542, 6: 1323, 7: 1396, 8: 1632, 9: 993, 11: 1673, 12: 450,
    13: 423, 14: 188, 16: 1327, 17: 390,
}  # fmt: skip


def settings_of(hidden: int, layers: int, intermediate: int) -> dict[str, Any]:
    """Return the config of a size."""
    heads = hidden // HEAD
    return {
        "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 3), "head_dim": HEAD,
        "tie_word_embeddings": True, "max_position_embeddings": 2048,
    }  # fmt: skip


def count(hidden: int, layers: int, intermediate: int) -> int:
    """Return the parameters of a size."""
    keys = max(1, hidden // HEAD // 3) * HEAD
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * intermediate + 2 * hidden
    return VOCABULARY * hidden + layers * layer + hidden


def describe(setting: Setting) -> str:
    """Return a setting as a table has it."""
    lora = setting.changes.get("lora", {})
    plain = {**setting.changes, **{f"lora.{name}": value for name, value in lora.items()}}
    words = [f"{name}={str(value).rpartition(':')[2]}" for name, value in plain.items() if name != "lora"]
    ranks = [f"{setting.ranks} ranks"] * (setting.ranks > 1)
    return f"{setting.kind} {setting.size}: {', '.join([*words, *ranks])}"


def write_model(directory: Path, hidden: int, layers: int, intermediate: int) -> Path:
    """Write a random model with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    ends = "<end>"
    words = {word: place for place, word in enumerate([ends, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=ends, pad_token=ends).save_pretrained(directory)
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**settings_of(hidden, layers, intermediate)))
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def predicted(setting: Setting, shape: Shape) -> float:
    """Return the bytes that the planner says of the largest of a setting's processes, without its libraries."""
    import msgspec

    from flowrl.engines.base import GenerationConfig, Scoring, TrainingConfig
    from flowrl.tuning.memory import Work, computing, serving

    work = Work(prompt=PROMPT, response=RESPONSE, samples=SAMPLES)
    given = {"engine": DEEPSPEED, **TRAINED, **setting.changes, "ranks": setting.ranks, "model": ""}
    head = given.get("head", "policy")
    if setting.kind == "serve":
        config = msgspec.convert({**setting.changes, **SERVED, "model": ""}, GenerationConfig)
        need = serving(shape, config, on_gpu=False)
    else:
        kind: Any = TrainingConfig
        if setting.kind == "score":
            kind, given = Scoring, {n: v for n, v in given.items() if n in Scoring.__struct_fields__}
        need = computing(shape, msgspec.convert(given, kind), work, head, on_gpu=False)
    return sum(size for name, size in need.host.items() if name not in ("process", "weights on their way"))


# The measured process.


def resident(name: str) -> int:
    """Return a figure of this process's status, such as VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def measured(spec: dict[str, Any], answer: Any) -> None:
    """Open the engine of `spec`, let it work and send what it took."""
    answer.send(asyncio.run(_serve(spec)) if spec["kind"] == "serve" else _computed(spec))
    os._exit(0)  # without taking engines apart


def _computed(spec: dict[str, Any]) -> int:
    engine = _opened(spec, spec["warm"], {"engine": TORCH, "dtype": spec["config"]["dtype"]}, rank=0, ranks=1)
    _work(engine, spec | {"groups": 1}, "train")
    engine.close()
    del engine
    before = _reset()
    engine = _opened(spec, spec["model"], spec["config"], rank=spec["rank"], ranks=spec["ranks"])
    if spec["rank"]:
        engine.follow()
    else:
        _work(engine, spec, spec["kind"])
        engine.close()
    return resident("VmHWM") - before


def _reset() -> int:
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def _opened(spec: dict[str, Any], model: str, config: dict[str, Any], *, rank: int, ranks: int) -> Any:
    from flowrl.config import load_class
    from flowrl.engines.base import Ranks, Schedule, TrainingConfig

    given = {"engine": DEEPSPEED, **TRAINED, **config, "model": model, "threads": spec["threads"], "ranks": ranks}
    import msgspec

    settings = msgspec.convert(given | {"schedule": Schedule(kind="constant")}, TrainingConfig)
    engine: Any = load_class(settings.engine, "perf")(settings, where="perf", name=f"perf-{os.getpid()}")
    place = Ranks(rank=rank, world_size=ranks, port=spec["port"], token="perf") if ranks > 1 else Ranks()
    engine.open(place)
    return engine


def _groups(spec: dict[str, Any]) -> list[Any]:
    import numpy as np

    from flowrl.engines.base import TokenGroup
    from flowrl.messages import Buffer

    draw = np.random.default_rng(0)
    ones = [Buffer.floats(np.ones(RESPONSE, dtype=np.float32))] * SAMPLES
    columns = {name: ones for name in ("advantages", "behaviour", "returns", "values")}
    return [
        TokenGroup(
            prompt_ids=Buffer.ints(draw.integers(0, 300, PROMPT, dtype=np.int32)),
            responses=[Buffer.ints(draw.integers(0, 300, RESPONSE, dtype=np.int32)) for _ in range(SAMPLES)],
            columns=columns,
        )
        for _ in range(spec["groups"])
    ]


def _work(engine: Any, spec: dict[str, Any], kind: str) -> None:
    from flowrl.config import Select

    groups = _groups(spec)
    if kind == "score":
        engine.score(groups)
        return
    for those in (groups[:1], groups):  # the optimizer's state comes with the first step
        engine.accumulate(those, Select(use="perf.learner:TokenMean"))
        engine.apply()


async def _serve(spec: dict[str, Any]) -> int:
    import msgspec
    import numpy as np

    from flowrl.engines.base import GenerationConfig, Sampling
    from flowrl.engines.vllm import VllmEngine

    given = {**spec["config"], **SERVED, "threads": spec["threads"]}
    config = msgspec.convert({**given, "model": spec["model"]}, GenerationConfig)
    import vllm.v1.engine.async_llm  # noqa: F401

    before = _reset()
    engine = VllmEngine(config, where="perf", receiver_index=0)
    await engine.open()
    await engine.serve_loaded()
    draw = np.random.default_rng(0)
    sampling = Sampling(max_tokens=RESPONSE, ignore_stop=True)
    asked = [
        engine.generate(request_id=str(i), prompt_ids=draw.integers(0, 300, PROMPT).tolist(), num_samples=1, seed=i,
                        sampling=sampling)
        for i in range(config.max_running)
    ]  # fmt: skip
    await asyncio.gather(*asked)
    return resident("VmHWM") - before


# The process that asks for it.


def measure(setting: Setting, models: dict[str, Path], threads: int) -> int:
    """Return the bytes that the largest of a setting's processes took."""
    spec = {
        "kind": setting.kind, "config": setting.changes, "model": str(models[setting.size]),
        "warm": str(models["warm"]), "ranks": setting.ranks, "threads": threads,
        "groups": setting.groups * setting.ranks,
        "port": _free_port(),
    }  # fmt: skip
    context = multiprocessing.get_context("fork")  # what is imported already need not be imported again
    answers: list[Any] = []
    for rank in range(setting.ranks):
        mine, theirs = context.Pipe(duplex=False)
        child = context.Process(target=measured, args=(spec | {"rank": rank}, theirs))
        child.start()
        theirs.close()
        answers.append((mine, child))
    try:
        return max(mine.recv() for mine, _ in answers)
    finally:
        for _, child in answers:
            child.join()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def main(argv: list[str] | None = None) -> int:
    """Measure every setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", type=int, action="append", help="the settings of these places in the table")
    arguments = parser.parse_args(argv)
    if ENVIRONMENT.items() - os.environ.items():  # read when a process begins
        os.execve(
            sys.executable, [sys.executable, "-m", "perf.memory", *(argv or sys.argv[1:])], os.environ | ENVIRONMENT
        )
    import deepspeed  # noqa: F401
    import torch

    import flowrl.engines.deepspeed  # noqa: F401
    from flowrl.tuning.shapes import find_shape
    from perf.machine import machine

    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="flowrl-memory-") as folder:
        models = {size: write_model(Path(folder) / size, *shape) for size, shape in SIZES.items()}
        models["warm"] = write_model(Path(folder) / "warm", 64, 2, 128)
        print(
            f"{machine()}\n\n| | setting | measured, MiB | predicted | difference |\n|---|---|---|---|---|", flush=True
        )
        bare = 0.0  # MiB
        for place, setting in enumerate(SETTINGS):
            if arguments.only and place not in arguments.only:
                continue
            found = measure(setting, models, arguments.threads) / MIB
            if setting.kind == "serve":
                bare = bare or measure(BARE, models, arguments.threads) / MIB
                found -= bare - predicted(BARE, find_shape(str(models["warm"]), {})) / MIB
            said = predicted(setting, find_shape(str(models[setting.size]), {})) / MIB
            print(f"| {place} | {describe(setting)} | {found:.0f} | {said:.0f} | {said / found - 1:+.1%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
