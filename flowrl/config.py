"""Settings: frozen structs, checked in full, never adjusted silently.

`Config` is the base of every settings struct (frozen, keyword-only, unknown fields refused). `resolve` applies a
YAML file and `--set path=value` overrides to a settings value and returns a new one; paths are field names joined by
dots (`learner.lr`), the same names that metrics and errors use. Called by the CLI and by tests; never by stages.

A class setting is written `module:Class`. A field of type `Select` holds such a class with its options:
`--set algorithm=pkg.mod:Class` chooses the class, `--set algorithm.clip_low=0.1` sets an option of it.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, dataclass_transform, get_type_hints

import msgspec
from msgspec import Meta

from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Config", "Meta", "Select", "load_class", "load_object", "resolve", "to_tree", "widen"]

C = TypeVar("C", bound="Config")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class ConfigMeta(msgspec.StructMeta):
    """Make every subclass frozen, keyword-only and strict, which msgspec does not inherit."""

    def __new__(
        mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any
    ) -> ConfigMeta:
        strict = {"frozen": True, "kw_only": True, "forbid_unknown_fields": True}
        return cast("ConfigMeta", super().__new__(mcls, name, bases, namespace, **{**strict, **options}))


class Config(msgspec.Struct, metaclass=ConfigMeta):
    """Base of every settings struct."""


class Select(Config):
    """A class chosen by import path, with the options its own Config accepts."""

    use: str  # "module:Class"
    options: dict[str, Any] = {}  # validated against the class by whoever loads it

    def load(self, where: str) -> Any:
        """Import the class and build it with the options; the class must be a Config.

        Raises:
            ConfigError: the class does not import, or an option is unknown, of the wrong type or out of range.
        """
        chosen = load_class(self.use, where)
        _reject_unknown(self.options, chosen, where)
        try:
            return msgspec.convert(self.options, chosen, strict=False)
        except (msgspec.ValidationError, ValueError) as error:
            raise _readable(error, where) from error


def load_object(path: str, where: str) -> Any:
    """Import `module:name`.

    Raises:
        ConfigError: `path` is malformed, or the module or the name in it does not exist.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ConfigError(where, f"{path!r} is not of the form module:name", "write e.g. my_rewards:exact_match")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(where, f"cannot import {module_name!r} ({error})", "check the name and PYTHONPATH") from error
    if not hasattr(module, name):
        raise ConfigError(where, f"module {module_name} has no {name!r}{_suggest(name, vars(module))}")
    return getattr(module, name)


def load_class(path: str, where: str) -> Any:
    """Import `module:Class` and insist that it is a class."""
    found = load_object(path, where)
    if not isinstance(found, type):
        raise ConfigError(where, f"{path} is not a class", "name a class as module:Class")
    return found


def widen(kind: type[C], settings: Config, **fields: Any) -> C:
    """Return `settings` as `kind`, which has the same fields and more, given in `fields`."""
    known = {f.name for f in msgspec.structs.fields(kind)}
    return kind(**{**{k: v for k, v in msgspec.structs.asdict(settings).items() if k in known}, **fields})


def to_tree(settings: Config) -> dict[str, Any]:
    """Return settings as plain dicts, lists and scalars (for YAML and JSON)."""
    return cast("dict[str, Any]", msgspec.to_builtins(settings))


def resolve(kind: type[C], *, config: Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Build settings of type `kind` from defaults, then a YAML file, then `path=value` overrides.

    Raises:
        ConfigError: an unknown path (with the nearest known one), a wrong type, a value out of range, or
            defaults that are missing.
    """
    tree: dict[str, Any] = {}
    if config is not None:
        for path, value in _flatten(_read_yaml(config)):
            _assign(tree, kind, path, value, where=str(config))
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(f"--set {override}", "no value given", "write --set path=value")
        _assign(tree, kind, path.strip(), _parse_scalar(text), where=f"--set {override}")
    try:
        merged = _merge(_default_tree(kind), tree)
        return msgspec.convert(merged, kind, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        raise _readable(error, "settings") from error


def _default_tree(kind: type[Config]) -> dict[str, Any]:
    required = [f.name for f in msgspec.structs.fields(kind) if f.required]
    if required:
        raise ConfigError(kind.__name__, f"no default for {', '.join(required)}", "give every field a default")
    return to_tree(kind())


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror})", "check --config") from error
    except yaml.YAMLError as error:
        raise ConfigError(str(path), f"is not valid YAML ({error})") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(str(path), "must be a mapping of settings")
    return cast("dict[str, Any]", loaded)


def _parse_scalar(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return text


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            rows.extend(_flatten(cast("dict[str, Any]", value), f"{path}."))
        else:
            rows.append((path, value))
    return rows


def _assign(tree: dict[str, Any], kind: type[Config], path: str, value: Any, where: str) -> None:
    """Put `value` at `path` in `tree`, following the field types of `kind` to refuse unknown names."""
    parts = path.split(".")
    node, current = tree, kind
    for depth, part in enumerate(parts):
        is_last = depth == len(parts) - 1
        if issubclass(current, Select) and part not in ("use", "options"):
            node.setdefault("options", {})[".".join(parts[depth:])] = value
            return
        fields = _fields(current)
        if part not in fields:
            here = ".".join(parts[:depth]) or "settings"
            raise ConfigError(where, f"{here} has no setting {part!r}{_suggest(part, fields)}")
        inner = _struct_type(fields[part])
        if is_last:
            if inner is not None and issubclass(inner, Select) and isinstance(value, str):
                node[part] = {"use": value, "options": {}}
            else:
                node[part] = value
            return
        if inner is None:
            if fields[part] is dict or getattr(fields[part], "__origin__", None) is dict:
                node.setdefault(part, {})[".".join(parts[depth + 1 :])] = value
                return
            raise ConfigError(where, f"{'.'.join(parts[: depth + 1])} is a single value and has no {parts[depth + 1]!r}")
        node = node.setdefault(part, {})
        current = inner


def _fields(kind: type[Config]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in msgspec.structs.fields(kind)}


def _struct_type(annotation: Any) -> type[Config] | None:
    """Return the Config class inside an annotation such as `Learner.Config` or `X | None`."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, Config) else None
    for argument in getattr(annotation, "__args__", ()):
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
            raise ConfigError(f"{where}.{name}", f"{kind.__name__} has no setting {name!r}{_suggest(name, known)}")


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f", did you mean {close[0]!r}?"
    public = sorted(k for k in known if not k.startswith("_"))
    return f" (known: {', '.join(public[:20])})"


def _readable(error: Exception, where: str) -> ConfigError:
    """Turn msgspec's "Expected `int` >= 1 - at `$.learner.lr`" into our form."""
    what, _, at = str(error).partition(" - at `$")
    path = at.rstrip("`").lstrip(".")
    return ConfigError(path or where, what[:1].lower() + what[1:])
