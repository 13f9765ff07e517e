"""The README.md of an exported model: what it is, what it was trained on and how, and what it scored.

Everything is read from the run's own files, and what a run does not have is left out. Called by export.

Tests: tests/graphs/test_export.py
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from flowrl.config import redacted
from flowrl.engines.checkpoint import checkpoint_version
from flowrl.runtime.rundir import read_settings
from flowrl.telemetry.intervals import mean_interval, prompt_means
from flowrl.telemetry.metrics import read_evaluations

if TYPE_CHECKING:
    from pathlib import Path

LOADING = {
    "policy": "Load it with `AutoModelForCausalLM.from_pretrained`, or serve it with vLLM.",
    "classifier": "The score of a response is the value at its last token.",
    "value": "The value before a token is read at the token before it.",
    "adapter": "A LoRA adapter of rank {rank}: load it with `PeftModel.from_pretrained(base, directory)`.",
}


def model_card(checkpoint: Path, node: str) -> str:
    """Return the card of the model that a checkpoint has of a node; "" is the learner."""
    settings = json.loads((checkpoint / node / "model" / "config.json").read_text())
    is_classifier = (settings.get("architectures") or [""])[0].endswith("ForSequenceClassification")
    kind = ("value" if node else "classifier") if is_classifier else "policy"
    if not is_classifier:
        return _card(checkpoint, node, "transformers", LOADING[kind])
    how = loading_of(checkpoint / node / "model")
    loading = f"{how[0].upper()}{how[1:]}. {LOADING[kind]}{_padding(settings)}"
    return _card(checkpoint, node, "transformers", loading)


def loading_of(directory: Path) -> str:
    """Return how a model is loaded, which for a head of scores that transformers has no class for takes two lines."""
    import transformers

    (architecture, *_) = json.loads((directory / "config.json").read_text()).get("architectures") or [""]
    if not architecture.endswith("ForSequenceClassification"):
        return 'load it with AutoModelForCausalLM.from_pretrained("DIRECTORY")'
    if hasattr(transformers, architecture):
        return 'load it with AutoModelForSequenceClassification.from_pretrained("DIRECTORY") (one label)'
    return (
        f'transformers has no {architecture}: load its body with AutoModel.from_pretrained("DIRECTORY") and multiply'
        " its last states with `score.weight` of the safetensors; flowrl takes it as it is"
    )


def _padding(settings: dict[str, Any]) -> str:
    """Return what to know of a classifier without a token to pad with."""
    return "" if settings.get("pad_token_id") is not None else " It has no padding token: score sequences one by one."


def adapter_card(checkpoint: Path, node: str) -> str:
    """Return the card of the adapter that a checkpoint has of a node."""
    rank = json.loads((checkpoint / node / "adapter" / "adapter_config.json").read_text())["r"]
    return _card(checkpoint, node, "peft", LOADING["adapter"].format(rank=rank))


def merged_card(adapter: Path) -> str:
    """Return the card of an adapter's base model with the adapter merged in."""
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    merged = f"`{base}` with the adapter of `{adapter.resolve().name}` merged in."
    return f"---\nlibrary_name: transformers\ntags: [flowrl, lora]\n---\n\n# {adapter.resolve().name}\n\n{merged}\n"


def _card(checkpoint: Path, node: str, library: str, loading: str) -> str:
    run = checkpoint.resolve().parent.parent
    version = checkpoint_version(checkpoint)
    settings = _settings(run)
    model = _start(settings, node)
    is_hub_name = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    head = ["---", f"library_name: {library}", *([f"base_model: {model}"] if is_hub_name else [])]
    sections = [
        [*head, "tags: [flowrl]", "---"],
        [f"# {run.name}", "", f"Version {version} of {node or 'learner'} in a run of flowrl. {loading}"],
        _facts(settings, node),
        _scores(run, version) if not node else [],
        _all_settings(settings),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _settings(run: Path) -> dict[str, Any]:
    path = run / "settings.yaml"
    return read_settings(path) if path.is_file() else {}


def _start(settings: dict[str, Any], node: str) -> str:
    """Return the model that a node started from, as the settings name it."""
    return str(settings.get(f"{node}_model") or settings.get("model", ""))


def _facts(settings: dict[str, Any], node: str) -> list[str]:
    trained: dict[str, Any] = settings.get(node or "learner") or {}
    method: dict[str, Any] = trained.get("objective") or settings.get("algorithm") or settings.get("objective") or {}
    options = ", ".join(f"{name}={value}" for name, value in method.get("options", {}).items())
    data: dict[str, Any] = settings.get("data") or {}
    mix: list[dict[str, Any]] = data.get("mix") or []
    sources = [str(each.get("source")) for each in mix]
    lora: dict[str, Any] = trained.get("lora") or {}
    adapter = ", ".join(f"{name} {lora[name]}" for name in ("rank", "alpha", "targets", "bits") if lora.get(name))
    rows = {
        "started from": _start(settings, node) or None,
        "trained by": f"`{method['use']}`{f' ({options})' if options else ''}" if method.get("use") else None,
        "data": ", ".join(sources) or data.get("source"),
        "steps": settings.get("steps"),
        "learning rate": trained.get("lr"),
        "LoRA": adapter if lora.get("rank") else None,
        "seed": settings.get("seed"),
    }
    return [f"- {name}: {value}" for name, value in rows.items() if value is not None]


def _scores(run: Path, version: int) -> list[str]:
    """Return the held-out scores up to this version as a table, with 95 % intervals over prompts."""
    path = run / "metrics.jsonl"
    evaluations = read_evaluations(path)
    newest = {each.version: each for each in evaluations if each.version <= version and each.scores}
    if not newest:
        return []
    rows = ["## Held-out scores", "", "| version | mean | 95 % interval | prompts |", "|---|---|---|---|"]
    for number in sorted(newest):
        interval = mean_interval(prompt_means(newest[number].scores))
        rows.append(f"| {number} | {interval.mean:.4f} | {interval.low:.4f} to {interval.high:.4f} | {interval.num} |")
    return rows


def _all_settings(settings: dict[str, Any]) -> list[str]:
    import yaml

    if not settings:
        return []
    return ["## Settings", "", "```yaml", yaml.safe_dump(redacted(settings), sort_keys=False).rstrip(), "```"]
