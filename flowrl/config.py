"""Settings: frozen structs, checked in full, never adjusted silently.

`Config` is the base of every settings struct (frozen, keyword-only, unknown fields refused). `resolve` applies a
YAML file and `--set path=value` overrides to a settings value and returns a new one; paths are field names joined by
dots (`learner.lr`), the same names that metrics and errors use. Called by the CLI and by tests; never by stages.

A field of type `Select` holds a class with its options: `--set algorithm=pkg.mod:Class` (or `my_file.py:Class`, or the
name alone of one that is shipped) chooses the class. `--set algorithm.clip_low=0.1` sets an option of it.

Tests: tests/unit/test_config.py
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Mapping
from itertools import count
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    cast,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec
from msgspec import Meta

from flowrl.errors import ConfigError, check_text
from flowrl.imports import load_class, load_object, named_beside, pin, suggest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

__all__ = [
    "AUTO", "IMPORT_PATH", "Config", "Count", "ImportPath", "Meta", "Select", "given", "load_class", "load_object",
    "resolve", "takes_auto", "to_tree", "widen", "written",
]  # fmt: skip

C = TypeVar("C", bound="Config")
ADDRESS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:[^/\s?#@]*@)?(?P<host>[^/\s?#]*)(?P<path>[^\s?#]*)(?P<secret>[?#]\S*)?"
)
# A setting of this type names user code, module:name or file.py:name; `resolve` finds the file (see flowrl.imports).
# What is shipped beside its default may be given by its name alone; without one, a path in the place of "" is that.
IMPORT_PATH = "names_code_beside"
ImportPath = Annotated[str, Meta(extra={IMPORT_PATH: ""})]
Count = Annotated[int, Meta(ge=1, le=65_536)]  # of processes, threads or parts: what more of them are is a slip
# Our settings, and what TRL, OpenRLHF, verl, vLLM and transformers call them, for hints.
CALLED = {
    "lr": "learning_rate actor_learning_rate",
    "critic.lr": "critic_learning_rate",
    "steps": "max_steps num_steps num_epochs num_train_epochs max_epochs total_epochs num_episodes",
    "groups_per_step": "batch_size train_batch_size rollout_batch_size per_device_train_batch_size",
    "examples_per_step": "batch_size train_batch_size per_device_train_batch_size",
    "micro_batch_tokens": "micro_batch_size micro_train_batch_size gradient_accumulation_steps",
    "group_size": "n num_generations num_return_sequences n_samples_per_prompt",
    "max_tokens": "max_new_tokens max_completion_length max_response_length response_length generate_max_len "
    "max_length max_seq_length max_len",
    "max_model_len": "max_length max_seq_len max_context_len",
    "max_prompt_tokens": "max_prompt_length prompt_max_len",
    "tensor_parallel": "tp tp_size tensor_parallel_size tensor_model_parallel_size",
    "replicas": "num_engines vllm_num_engines data_parallel_size",
    "ranks": "num_processes nproc_per_node world_size",
    "gpus": "num_gpus num_gpus_per_node n_gpus_per_node",
    "algorithm.kl.coef": "beta kl_coef init_kl_coef kl_loss_coef",
    "algorithm.clip_low": "epsilon eps_clip clip_eps clip_range cliprange clip_ratio",
    "model": "model_name model_path model_name_or_path pretrain",
    "data.source": "dataset dataset_name prompt_data train_files",
    "source": "path file files",
    "reward.function": "reward_funcs reward_fn custom_reward_function",
    "schedule.kind": "lr_scheduler lr_scheduler_type",
    "schedule.warmup_steps": "warmup_ratio warmup_steps lr_warmup_ratio num_warmup_steps",
    "lora.rank": "lora_rank lora_r",
    "lora.alpha": "lora_alpha",
    "max_grad_norm": "grad_clip gradient_clipping max_norm",
    "checkpoint_every": "save_steps save_freq save_interval ckpt_every",
    "evaluate_every": "eval_steps eval_freq eval_interval test_freq",
    "dtype": "torch_dtype bf16 fp16 precision",
    "wandb.project": "report_to use_wandb wandb_project",
}
# Annotates a setting that takes the word `auto` too, which leaves it to what is implied: by other settings, by devices.
AUTO = Meta(extra={"takes_auto": True})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class ConfigMeta(msgspec.StructMeta):
    """Make every subclass frozen, keyword-only and strict, which msgspec does not inherit."""

    def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> ConfigMeta:
        strict = {"frozen": True, "kw_only": True, "forbid_unknown_fields": True}
        return cast("ConfigMeta", super().__new__(mcls, name, bases, namespace, **{**strict, **options}))


class Config(msgspec.Struct, metaclass=ConfigMeta):
    """Base of every settings struct."""

    elsewhere: ClassVar[Mapping[str, str]] = {}  # what is looked for under other addresses, and where it is

    def implied(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return other defaults that what is given of these settings, which are themselves the defaults, implies.

        By address from the outermost settings, or from these with a dot before it (`.lr`). They hold where nobody sets
        them, and stand in a run's settings.yaml like all others.
        """
        return {}


class Select(Config):
    """A class chosen by import path, with the options its own Config accepts."""

    use: str  # "module:Class"
    options: dict[str, Any] = {}  # validated against the class by whoever loads it

    def changed(self, changes: Mapping[str, Any]) -> Select:
        """Return the same class with options changed by path: `{"kl.coef": 0.1}` sets that part of the option `kl`."""
        options = copy.deepcopy(self.options)
        for path, value in changes.items():
            _put(options, path, value)
        return Select(use=self.use, options=options)

    def load(self, where: str) -> Any:
        """Import the class and build it with the options; the class must be a Config.

        Raises:
            ConfigError: the class does not import, or an option is unknown, of the wrong type or out of range.
        """
        chosen = load_class(self.use, where)
        if not issubclass(chosen, Config):
            raise ConfigError(where, f"{self.use} is no Config", "inherit from one of those that come with flowrl")
        _reject_unknown(self.options, chosen, where)
        options = _settled(_merge(_nested_defaults(chosen), self.options), chosen)
        try:
            return msgspec.convert(options, chosen, strict=False)
        except (msgspec.ValidationError, ValueError) as error:
            raise _readable(error, options, chosen, where) from error


def widen(kind: type[C], settings: Config, **fields: Any) -> C:
    """Return `settings` as `kind`, which has the same fields and more, given in `fields`."""
    known = set(kind.__struct_fields__)
    return kind(**{**{k: v for k, v in msgspec.structs.asdict(settings).items() if k in known}, **fields})


def changed(settings: Config, names: Sequence[str], *, plain: Config | None = None) -> list[str]:
    """Return those of the settings that are not as they come: as in `plain`, where the kind's own are not."""
    plain = type(settings)() if plain is None else plain
    return [name for name in names if getattr(settings, name) != getattr(plain, name)]


def idle(settings: Config, names: Sequence[str], where: str, why: str, *, plain: Config | None = None) -> list[str]:
    """Return a line that those of the settings which are not as they come have no effect; none where all are."""
    found = [f"{where}.{name}".strip(".") for name in changed(settings, names, plain=plain)]
    return [f"{', '.join(found)}: no effect {why}"] if found else []


def redacted(tree: Any) -> Any:
    """Return plain data with whatever may be secret in its addresses left out: user, password, query and fragment.

    >>> redacted({"url": "https://me:pw@judge.example/score?key=abc"})
    {'url': 'https://judge.example/score?...'}
    """
    if isinstance(tree, dict):
        return {name: redacted(value) for name, value in cast("dict[str, Any]", tree).items()}
    if isinstance(tree, list):
        return [redacted(value) for value in cast("list[Any]", tree)]
    return ADDRESS.sub(_without_secrets, tree) if isinstance(tree, str) else tree


def _without_secrets(found: re.Match[str]) -> str:
    scheme, host, path, secret = found.group("scheme", "host", "path", "secret")
    return f"{scheme}{host}{path}{secret[0]}..." if secret else f"{scheme}{host}{path}"


def to_tree(settings: Config) -> dict[str, Any]:
    """Return settings as plain dicts, lists and scalars (for YAML and JSON)."""
    return cast("dict[str, Any]", msgspec.to_builtins(settings))


def given(kind: type[Config], *, config: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a YAML file and then `path=value` overrides give of the settings of type `kind`, as a tree.

    What is left to `auto` is not given.
    """
    return _without_auto(written(kind, config=config, overrides=overrides), kind)


def written(kind: type[Config], *, config: Path | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what is given, with the word `auto` where it stands; see `given`.

    Raises:
        ConfigError: an unknown path (with the nearest known one), or a file that cannot be read.
    """
    tree: dict[str, Any] = {}
    if config is not None:
        for path, value in sorted(_read_yaml(config).items(), key=lambda item: _depth(item[0])):
            _assign(tree, kind, path, value, where=str(config))
    for override in sorted(overrides, key=_depth):
        path, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override}", "no value given", "write --set path=value")
        _assign(tree, kind, path.strip(), _parse_set(text, f"--set {path}"), where=f"--set {override}", text=text)
    return tree


def resolve(
    kind: type[C],
    *,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    places: Sequence[Path] = (),
    implied: Mapping[str, Any] | None = None,
) -> C:
    """Build settings of type `kind` from defaults, then a YAML file, then `path=value` overrides.

    User code is looked for in the directories `places`, then among what is installed. `implied` are further defaults,
    by address, that hold where nothing else is given.

    Raises:
        ConfigError: an unknown path (with the nearest known one), a wrong type, a value out of range, defaults that are
            missing, or user code that is not where it was looked for.
    """
    tree = given(kind, config=config, overrides=overrides)
    defaults = _default_tree(kind)
    _imply(tree, kind)
    for path, value in (implied or {}).items():
        if not is_given(tree, path):
            _assign(tree, kind, path, value, where=path)
    merged = _settled(_merge(defaults, tree), kind)
    try:
        settings = msgspec.convert(merged, kind, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        raise _readable(error, merged, kind, "") from error
    _check_values(to_tree(settings), "")
    return _pinned(settings, kind(), "", places) if places else settings


def _check_values(value: Any, path: str) -> None:
    """Refuse numbers that no message can carry and no sum can be made of, and texts that cannot be written."""
    if isinstance(value, dict):
        for name, each in cast("dict[str, Any]", value).items():
            check_text(str(name), path or str(name))
            _check_values(each, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for place, each in enumerate(cast("list[Any]", value)):
            _check_values(each, f"{path}[{place}]")
    elif isinstance(value, str):
        check_text(value, path)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(path, f"expected a finite number, got {value}")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigError(path, f"expected an integer of up to 63 bits, got {_shown(value)}")


def _imply(tree: dict[str, Any], kind: type[Config]) -> None:
    """Put defaults that what is given implies into `tree`, where it has no value of its own."""
    defaults, fields = kind(), _fields(kind)
    parts = [("", defaults, tree), *((name, getattr(defaults, name), tree.get(name)) for name in fields)]
    for name, default, given in parts:
        if not isinstance(default, Config) or not isinstance(given, dict):
            continue
        for address, value in default.implied(cast("dict[str, Any]", given)).items():
            path = f"{name}{address}" if address.startswith(".") else address
            outer, _, last = path.partition(".")
            if outer in fields and last not in tree.get(outer, {}):
                _assign(tree, kind, path, value, where=name)


def is_given(tree: Mapping[str, Any], path: str) -> bool:
    """Say whether a tree of what was given has a value at a path.

    >>> is_given({"learner": {"lr": 1.0}}, "learner.lr"), is_given({"learner": {}}, "learner.lr")
    (True, False)
    """
    first, _, rest = path.partition(".")
    if not rest or first not in tree:
        return first in tree
    inner = tree[first]
    return not isinstance(inner, dict) or is_given(cast("dict[str, Any]", inner), rest)


def _without_auto(tree: dict[str, Any], kind: type[Config]) -> dict[str, Any]:
    """Return what was given without the settings that are left to what is implied."""
    fields = _fields(kind)
    kept: dict[str, Any] = {}
    for name, value in tree.items():
        inner = _struct_type(fields.get(name))
        if value == "auto" and takes_auto(kind, name):
            continue
        is_part = inner is not None and isinstance(value, dict)
        kept[name] = _without_auto(cast("dict[str, Any]", value), inner) if is_part and inner is not None else value
    return kept


@functools.cache
def takes_auto(kind: type[Config], field: str) -> bool:
    """Say whether a setting takes the word `auto` for what its device implies."""
    annotation = get_type_hints(kind, include_extras=True).get(field)
    return any(
        (getattr(each, "extra", None) or {}).get("takes_auto") for each in getattr(annotation, "__metadata__", ())
    )


def _pinned(settings: C, default: Any, at: str, places: Sequence[Path]) -> C:
    """Return settings whose import paths lead to the same files in every process."""
    changes: dict[str, Any] = {}
    for name in settings.__struct_fields__:
        value, here = getattr(settings, name), f"{at}.{name}" if at else name
        if isinstance(value, Select):
            example = getattr(default, name, value)
            use = value.use if ":" in value.use else named_beside(value.use, example.use, here)
            pinned: Any = Select(use=pin(use, here, places), options=value.options)
        elif isinstance(value, Config):
            pinned = _pinned(value, getattr(default, name, value), here, places)
        elif isinstance(value, str) and (beside := _names_code(type(settings), name)) is not None:
            example = beside or getattr(default, name, "") or ""
            is_name = bool(value and example) and ":" not in value and value.lstrip()[:1] not in ("[", "{")
            pinned = pin(named_beside(value, example, here) if is_name else value, here, places)
        else:
            continue
        if pinned != value:
            changes[name] = pinned
    return msgspec.structs.replace(settings, **changes) if changes else settings


@functools.cache
def _names_code(kind: type[Config], field: str) -> str | None:
    """Return what a field that names code has its names beside, "" where its default says that; None of another field.

    It goes on to where a subclass gives the field another default as plain text.
    """
    hints = (get_type_hints(base, include_extras=True) for base in kind.__mro__ if issubclass(base, Config))
    return next((found for each in hints if (found := _import_path(each.get(field))) is not None), None)


def _import_path(annotation: Any) -> str | None:
    """Return what an `ImportPath`, alone or in a union, is beside; None where an annotation is none."""
    for each in (annotation, *get_args(annotation)):
        if (found := (getattr(each, "extra", None) or {}).get(IMPORT_PATH)) is not None:
            return cast("str", found)
    inner = (_import_path(each) for each in get_args(annotation) if get_origin(each) is not None)
    return next((found for found in inner if found is not None), None)


def _depth(path: str) -> int:
    """Order wholes before their parts, so that `algorithm=X` does not undo an `algorithm.clip_low=0.1` before it."""
    return path.partition("=")[0].count(".")


def _default_tree(kind: type[Config]) -> dict[str, Any]:
    required = [f.name for f in msgspec.structs.fields(kind) if f.required]
    if required:
        raise ConfigError(kind.__name__, f"no default for {', '.join(required)}", "give every field a default")
    return to_tree(kind())


def _nested_defaults(kind: type) -> dict[str, Any]:
    """Return the defaults of the fields that are structs themselves, so that an option may set a part of one."""
    fields = msgspec.structs.fields(kind)
    return {f.name: to_tree(f.default) for f in fields if isinstance(f.default, Config)}


LARGEST = 2**63 - 1  # that a message carries
MOST_MEANT = 3  # addresses that an unknown setting is answered with
MOST_YAML_BYTES = 4 << 20  # reading takes a second for some hundred kilobytes
MOST_VALUES = 1_000_000
TRUTH = {"yes": True, "on": True, "no": False, "off": False}  # booleans in YAML 1.1, and words all the same


class Word(str):
    """One of the words in TRUTH as YAML has it, until the field that it is for says what it means."""

    __slots__ = ()


@functools.cache
def _loader() -> Any:
    """Return a loader that keeps words as they are written, and takes for numbers what is one in any language.

    1e-6 and 1_000 are; 010 and 1:30 (an octal number and a sexagesimal one to YAML 1.1) are texts, and so are dates.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def boolean(loader: Any, node: Any) -> Any:
        return Word(node.value) if node.value.lower() in TRUTH else loader.construct_yaml_bool(node)

    Loader.add_constructor("tag:yaml.org,2002:bool", boolean)
    kinds = {
        "int": r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F_]+|0b[01_]+)$",
        "float": r"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?i:inf|nan))$",
    }
    others = {*(f"tag:yaml.org,2002:{kind}" for kind in kinds), "tag:yaml.org,2002:timestamp"}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in pairs if tag not in others]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for kind, pattern in kinds.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern), list("-+.0123456789"))
    return Loader


def _load_yaml(content: str | bytes, where: str) -> Any:
    """Return what YAML holds; keys are texts.

    Raises:
        ConfigError: a path is given twice.
        YAMLError: it is none.
    """
    loader = _loader()(content)
    try:
        node = loader.get_single_node()
        if node is not None:
            _check_once(node, "", {}, where, count())
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _check_once(node: Any, path: str, lines: dict[str, int], where: str, values: Iterator[int]) -> None:
    """Insist that no path is given twice, by nesting or by dots; `lines` has those that were seen.

    What is written once and named often (`*name`) counts each time: few lines can stand for more than any memory holds.
    """
    if next(values) > MOST_VALUES:
        raise ConfigError(where, f"holds more than {MOST_VALUES:,} values", "write fewer")
    for place, each in enumerate(() if isinstance(node.value, str) else node.value):
        if not isinstance(each, tuple):
            _check_once(each, f"{path}[{place}]", lines, where, values)
            continue
        key, value = cast("tuple[Any, Any]", each)
        if not isinstance(key.value, str):
            continue
        is_merge = key.tag == "tag:yaml.org,2002:merge"
        if not is_merge:
            key.tag = "tag:yaml.org,2002:str"
        here, line = (f"{path}.{key.value}" if path else key.value), key.start_mark.line + 1
        if here in lines:
            raise ConfigError(where, f"gives {here!r} twice, in lines {lines[here]} and {line}", "write it once")
        lines[here] = line
        _check_once(value, path if is_merge else here, {} if is_merge else lines, where, values)


def _read_yaml(path: Path) -> dict[str, Any]:
    loaded = read_yaml(path, "check --config")
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(str(path), "must be a mapping of settings")
    return cast("dict[str, Any]", loaded)


def read_yaml(path: Path, remedy: str) -> Any:
    """Return what a YAML file holds.

    Raises:
        ConfigError: it cannot be read, which `remedy` answers, is not YAML, or gives something twice.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror})", remedy) from error
    return parse_yaml(content, str(path))


def parse_yaml(content: bytes, where: str) -> Any:
    """Return what the YAML of a file holds, JSON too; `where` is the file.

    Raises:
        ConfigError: it is not YAML, or too much of it, or gives something twice.
    """
    import yaml

    if len(content) > MOST_YAML_BYTES:
        what = f"has {len(content):,} bytes, of settings {MOST_YAML_BYTES:,} at most are read"
        raise ConfigError(where, what, "name another file, or restore it")
    try:
        return _load_yaml(content, where)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark is not None else where
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(place, f"is not valid YAML ({reason})", "mend the line") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(where, f"holds an invalid value ({error})", "mend it") from error


def _parse_set(text: str, where: str) -> Any:
    import yaml

    try:
        return _load_yaml(text, where) if text else ""
    except (yaml.YAMLError, ValueError):  # such as a date that there is not
        return text


def _settled(value: Any, annotation: Any) -> Any:
    """Return a tree with each word as its field takes it: `off` is a text, a choice, or false."""
    if isinstance(value, str):
        return _meant(value, annotation)
    if isinstance(value, dict):
        tree = cast("dict[str, Any]", value)
        kind = _struct_type(annotation)
        if kind is not None and issubclass(kind, Select):  # its options are settled when the class is loaded
            return {name: _as_texts(each) for name, each in tree.items()}
        fields = _fields(kind) if kind is not None else {}
        inner = _arguments(annotation, dict)[-1]
        return {name: _settled(each, fields.get(name, inner)) for name, each in tree.items()}
    if isinstance(value, list):
        inner = _arguments(annotation, list, tuple)[0]
        return [_settled(each, inner) for each in cast("list[Any]", value)]
    return value


def _as_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_texts(each) for name, each in cast("dict[str, Any]", value).items()}
    return (
        [_as_texts(each) for each in cast("list[Any]", value)]
        if isinstance(value, list)
        else (str(value) if isinstance(value, Word) else value)
    )


def _meant(text: str, annotation: Any) -> str | bool:
    if text.lower() not in TRUTH:
        return text
    kinds = _members(annotation)
    chosen = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    is_text = text in chosen or str in kinds
    if not is_text and (bool in kinds or (isinstance(text, Word) and Any in kinds)):
        return TRUTH[text.lower()]
    return str(text)


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one there is."""
    is_union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if is_union else (annotation,)


def _arguments(annotation: Any, *origins: type) -> tuple[Any, ...]:
    """Return what a container's type says of its contents; (Any,) where it says nothing."""
    found = (get_args(each) for each in _members(annotation) if get_origin(each) in origins)
    return next(found, ()) or (Any,)


def _assign(
    tree: dict[str, Any],
    kind: type[Config],
    path: str,
    value: Any,
    *,
    where: str,
    text: str | None = None,
    at: str = "",
    root: type[Config] | None = None,
) -> None:
    """Put `value` at `path` in `tree`, following the field types of `kind` to refuse unknown names.

    `text` is what `value` was read from: a field that takes a string gets `007` and `no` as they were written.
    `at` is the path of `tree` itself, within that of `root`.
    """
    part, _, rest = path.partition(".")
    here = f"{at}.{part}" if at else part
    elsewhere = (root or kind).elsewhere.get(here, "")
    if issubclass(kind, Select) and part not in ("use", "options"):
        _put(_inside(tree, "options"), path, value)
        return
    fields = _fields(kind)
    if part not in fields:
        inside = [] if at else sorted(_addresses(kind, part), key=_depth)[:MOST_MEANT]
        meant = elsewhere or " or ".join(f"{each}.{rest}" if rest else each for each in inside)
        meant = meant or " or ".join([*_ours(part, kind, at, root or kind)][:MOST_MEANT])
        hint = f", did you mean {meant}?" if meant else suggest(part, fields)
        raise ConfigError(where, f"{at or 'settings'} has no setting {part!r}{hint}")
    annotation, inner = fields[part], _struct_type(fields[part])
    if rest and inner is not None:
        _assign(_inside(tree, part), inner, rest, value, where=where, text=text, at=here, root=root or kind)
    elif rest and (annotation is dict or get_origin(annotation) is dict):
        _put(_inside(tree, part), rest, value)
    elif rest:
        raise ConfigError(where, f"{here} is a single value and has no {rest!r}")
    elif value == "None" and type(None) in _members(annotation):
        raise ConfigError(where, f"{here} would be the text 'None'", "write null, or quote another text")
    elif inner is not None and isinstance(value, dict):
        for name, each in cast("dict[Any, Any]", value).items():
            _assign(_inside(tree, part), inner, str(name), each, where=where, at=here, root=root or kind)
    elif inner is not None and issubclass(inner, Select) and isinstance(value, str):
        tree[part] = {"use": value, "options": {}}
    elif inner is not None and elsewhere and isinstance(value, str):
        raise ConfigError(where, f"{here} is a section of settings, not a single value, did you mean {elsewhere}?")
    else:
        tree[part] = text if text is not None and _takes_text(annotation, value, text) else value


def _inside(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the mapping at `name`, making one where there is none or a plain value was."""
    if not isinstance(tree.get(name), dict):
        tree[name] = {}
    return tree[name]


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set `a.b` in a free-form mapping as `{"a": {"b": value}}`."""
    *outer, last = path.split(".")
    for name in outer:
        tree = _inside(tree, name)
    tree[last] = value


@functools.cache
def _fields(kind: type[Config]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in msgspec.structs.fields(kind)}


def _takes_text(annotation: Any, value: Any, text: str) -> bool:
    """Say whether a field of this type wants the text itself and not what YAML read from it, unless it is quoted."""
    if isinstance(value, str) and text.lstrip()[:1] in ("'", '"'):
        return False
    return annotation is str or (value is not None and set(get_args(annotation)) == {str, type(None)})


def _addresses(kind: type[Config], name: str) -> Iterator[str]:
    """Yield the addresses of the settings of this name, however deep."""
    for field, annotation in _fields(kind).items():
        inner = _struct_type(annotation)
        if field == name:
            yield field
        elif inner is not None and not issubclass(inner, Select):
            yield from (f"{field}.{each}" for each in _addresses(inner, name))


def _ours(name: str, kind: type[Config], at: str, root: type[Config]) -> Iterator[str]:
    """Yield the addresses of what others call by a name: in the section `kind` at `at`, else anywhere in `root`."""
    called = [ours for ours, names in CALLED.items() if name in names.split()]
    here = [ours for ours in called if ours.partition(".")[0] in _fields(kind)]
    yield from (f"{at}.{ours}" if at else ours for ours in here)
    for ours in [] if here else called:
        first, dot, rest = ours.partition(".")
        yield from (f"{each}{dot}{rest}" for each in sorted(_addresses(root, first), key=_depth))


def _struct_type(annotation: Any) -> type[Config] | None:
    """Return the Config class inside an annotation such as `Learner.Config` or `X | None`."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Config) else None
    if get_origin(annotation) in (dict, list, tuple):
        return None
    for argument in get_args(annotation):
        found = _struct_type(argument)
        if found is not None:
            return found
    return None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and "use" not in value:
            merged[key] = _merge(cast("dict[str, Any]", old), cast("dict[str, Any]", value))
        else:
            merged[key] = value
    return merged


def _reject_unknown(options: dict[str, Any], kind: type, where: str) -> None:
    known = {f.name for f in msgspec.structs.fields(kind)}
    for name in options:
        if name not in known:
            called = (ours.removeprefix("algorithm.") for ours, names in CALLED.items() if name in names.split())
            meant = next((ours for ours in called if ours.partition(".")[0] in known), "")
            hint = f", did you mean {where}.{meant}?" if meant else suggest(name, known)
            raise ConfigError(f"{where}.{name}", f"{kind.__name__} has no setting {name!r}{hint}")


WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "null": "nothing (null)",
    "array": "a list",
    "object": "a mapping",
}


def _readable(error: Exception, tree: Any, kind: type, where: str) -> ConfigError:
    """Turn msgspec's "Expected `int` >= 1 - at `$.learner.steps`" into our form, with the value that was found.

    `tree` is what was converted to `kind`; `where` stands before the path in it.
    """
    what, _, at = str(error).partition(" - at `$")
    path = at.rstrip("`").lstrip(".")
    value, annotation = _follow(tree, kind, path)
    if what.startswith("Invalid enum value"):
        what = f"expected one of {', '.join(map(str, get_args(annotation)))}, got {_shown(value)}"
    elif what.startswith("Invalid RFC3339 encoded date"):
        what = f"expected a date such as 2026-01-31, got {_shown(value)}"
    elif what.startswith("Object contains unknown field"):
        name, holder = what.split("`")[1], _struct_type(annotation)
        what = f"has no setting {name!r}{suggest(name, _fields(holder)) if holder is not None else ''}"
    elif what.startswith("Expected"):
        expected, _, got = what.partition(", got ")
        what = re.sub(r"`([^`]*)`", lambda match: _in_words(match[1]), expected)
        if value is not _UNKNOWN:
            what += f", got {_shown(value)}"
        elif got:
            what += f", got {re.sub(r'`([^`]*)`', lambda match: _in_words(match[1]), got)}"
    return ConfigError(".".join(part for part in (where, path) if part) or "settings", what[:1].lower() + what[1:])


_UNKNOWN = object()  # msgspec names no key inside a dict, so the value there cannot be shown


def _follow(tree: Any, kind: Any, path: str) -> tuple[Any, Any]:
    """Return the value at a msgspec path such as `data.tasks[0].name`, and its annotation as far as it is known."""
    for part in re.findall(r"[^.\[\]]+|\[\d+\]|\[\.\.\.\]", path):
        if part.startswith("["):
            index = part[1:-1]
            tree = tree[int(index)] if index.isdigit() and isinstance(tree, list | tuple) else _UNKNOWN
            kind = next(iter(get_args(kind)), None)
        else:
            tree = cast("dict[str, Any]", tree).get(part, _UNKNOWN) if isinstance(tree, dict) else _UNKNOWN
            holder = _struct_type(kind)
            kind = _fields(holder).get(part) if holder is not None else None
    if get_origin(kind) is not Literal:
        kind = next((each for each in get_args(kind) if get_origin(each) is Literal), kind)
    return tree, kind


def _in_words(types: str) -> str:
    return " or ".join(WORDS.get(each, each) for each in types.split(" | "))


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
