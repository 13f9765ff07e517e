"""User code by its import path: where it is looked for and how it is loaded.

A path is `module:name`, or `file.py:name`. `pin` turns what stands in a setting into the file it was found in, once,
where the command is given. It looks in the working directory first, then beside the graph file, then among what is
installed. So every process (Ray actors, reward workers) loads that same file, whatever its own directory and
PYTHONPATH. A class or function of the package that a setting's default comes from may be given by its name alone:
`algorithm=grpo`, `reward.function=exact_answer`.

Invariant: a file is one module in a process, however it is named.

Called by `config.resolve` and by whoever loads.

Tests: tests/unit/test_imports.py
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import os
import re
import sys
import traceback
from hashlib import blake2b
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_added: set[str] = set()  # directories in which only a process that was told of them finds modules
BY_FILE = "flowrl_file_"  # begins the name of a module that only its file leads to


def add_places(places: Iterable[Path]) -> None:
    """Let modules in these directories be imported, after everything that is installed."""
    for folder in map(str, places):
        if folder not in sys.path:
            sys.path.append(folder)
            _added.add(folder)


def pin(path: str, where: str, places: Sequence[Path]) -> str:
    """Return an import path that leads to the same file in every process.

    Raises:
        ConfigError: there is no such file or module; says where was looked.
    """
    if path.lstrip().startswith(("[", "{")):
        raise ConfigError(where, f"{path} is not a name", "write one function or class that calls the others")
    module_name, _, name = path.rpartition(":")
    if not module_name or not name:
        return path  # whoever loads it says what a path looks like
    is_file = _is_file(module_name)
    file_names = [module_name] if is_file else [f"{module_name}.py", *_in_package(module_name)]
    for folder in places:
        for file_name in file_names:
            if (file := folder / Path(file_name).expanduser()).is_file():
                return f"{file.resolve()}:{name}"
    looked = " or ".join(dict.fromkeys(str(folder) for folder in places))
    if is_file:
        raise ConfigError(where, f"no file {module_name} in {looked}", "check the path")
    package = module_name.partition(".")[0]
    if _spec_of(package) is None:
        what = f"no module {package!r} is installed, and there is no {package}.py in {looked}"
        raise ConfigError(where, what, f"check the name, or give the file's path, such as ./{package}.py:{name}")
    return path


def _in_package(module_name: str) -> list[str]:
    """Return where in a directory a module or package may lie; one that is installed is taken from there."""
    package, _, inner = module_name.partition(".")
    inside = inner.replace(".", os.sep) or "__init__"
    files = [f"{inside}.py", *([os.path.join(inside, "__init__.py")] if inner else [])]
    spec = _spec_of(package)
    homes = [Path(home) for home in (spec.submodule_search_locations or [] if spec else [])]
    is_installed = any((home / file).is_file() for home in homes if str(home.parent) not in _added for file in files)
    return [] if is_installed else [os.path.join(package, file) for file in files]


def _spec_of(package: str) -> ModuleSpec | None:
    return importlib.util.find_spec(package) if package else None


def load_object(path: str, where: str) -> Any:
    """Import `module:name` or load `file.py:name`.

    Raises:
        ConfigError: `path` is malformed, or the module or the name in it does not exist or does not load.
    """
    module_name, _, name = path.rpartition(":")
    if not module_name or not name:
        raise ConfigError(where, f"{path!r} is not of the form module:name", "write e.g. my_rewards.py:exact_match")
    try:
        module = _load_file(Path(module_name)) if _is_file(module_name) else importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            what = f"cannot import {module_name!r} (there is no module {error.name!r})"
            raise ConfigError(where, what, "check the name, or give the file's path, such as ./rewards.py:f") from error
        raise _failed(module_name, where, error) from error
    except (Exception, SystemExit) as error:
        raise _failed(module_name, where, error) from error
    try:
        return attrgetter(name)(module)
    except AttributeError as error:
        raise ConfigError(where, f"{module_name} has no {name!r}{suggest(name, vars(module))}") from error


def load_class(path: str, where: str) -> Any:
    """Load `module:Class` and insist that it is a class."""
    found = load_object(path, where)
    if not isinstance(found, type):
        raise ConfigError(where, f"{path} is not a class", "name a class as module:Class")
    return found


def path_of(kind: Any) -> str:
    """Return the import path of a class or function, by which every process can load it."""
    return place_of(kind.__module__, kind.__qualname__)


def place_of(module_name: str, name: str) -> str:
    """Return the import path of what has a name in a module that is loaded, or is just being loaded."""
    file = getattr(sys.modules.get(module_name), "__file__", None)
    if file is not None and (module_name.startswith(BY_FILE) or str(_home(Path(file))[1]) in _added):
        return f"{file}:{name}"
    return f"{module_name}:{name}"


def _home(file: Path) -> tuple[str, Path]:
    """Return a file's module name, and the directory in which that is found: the one that holds its package."""
    name, folder = file.stem, file.parent
    if name == "__init__":
        name, folder = folder.name, folder.parent
    while (folder / "__init__.py").is_file():
        name, folder = f"{folder.name}.{name}", folder.parent
    return name, folder


def home_of(file: Path) -> Path:
    """Return the directory in which a file's module is found."""
    return _home(file)[1]


def suggest(name: str, known: Iterable[str]) -> str:
    """Return what to add to an error about an unknown name: the nearest known one, or the known ones."""
    close = difflib.get_close_matches(name, list(known), n=1)
    if close:
        return f", did you mean {close[0]!r}?"
    public = sorted(k for k in known if not k.startswith("_"))
    return f" (known: {', '.join(public[:20])})"


def named_beside(name: str, example: str, where: str) -> str:
    """Return the import path of the class or function `name` in the package of `example`, an import path too.

    Letter case and marks do not count: with "flowrl.algorithms.grpo:GRPO" as the example "rloo" is
    "flowrl.algorithms.rloo:RLOO", and "Reinforce++" is ReinforcePP. The package is read, not imported.

    Raises:
        ConfigError: there is none; lists those there are.
    """
    known = classes_like(example) or functions_like(example)
    found = {_plain(each): path for each, path in known.items()}
    is_path = name.startswith(f"{_package_of(example)}.")  # and not "Dr. GRPO"
    wanted = _plain(name.rpartition(".")[2] if is_path else name)
    if wanted in found:
        return found[wanted]
    close = difflib.get_close_matches(wanted, found, n=1)
    hint = f"did you mean {found[close[0]].rpartition(':')[2]}? " if close else ""
    module, _, last = name.rpartition(".")
    own = "my_file.py:name" if not module else f"{name}:name" if last == "py" else f"{module}:{last}"
    hint = hint if not module or is_path else f"did you mean {own}? "
    remedy = f"{hint}{'there are ' + ', '.join(sorted(known)) + '; ' if known else ''}your own: {own}"
    raise ConfigError(where, f"there is none of the name {name!r}", remedy)


def classes_like(example: str) -> dict[str, str]:
    """Return name -> import path of the classes that stand in a package beside `example` and are of its kind.

    Of its kind are those that inherit from the same classes of the module in which the kind begins; one that classes of
    other modules inherit from is a base and no choice.
    """
    chosen = example.rpartition(":")[2]
    homes: dict[str, str] = {}
    bases: dict[str, list[str]] = {}
    for home, node in _defined_in(_package_of(example)):
        if isinstance(node, ast.ClassDef):
            homes[node.name] = home
            bases[node.name] = [ast.unparse(base) for base in node.bases]

    def above(name: str) -> list[str]:
        found = [base for base in bases.get(name, []) if base in homes]
        return [*found, *(upper for base in found for upper in above(base))]

    if not (ancestors := above(chosen)):
        return {chosen: example} if chosen in homes else {}
    first = homes[ancestors[-1]]
    kind = {name for name in ancestors if homes[name] == first}
    inherited = {base for name, given in bases.items() for base in given if homes.get(base, homes[name]) != homes[name]}
    return {
        name: f"{home}:{name}"
        for name, home in homes.items()
        if name not in inherited and {base for base in above(name) if homes[base] == first} == kind
    }


def functions_like(example: str) -> dict[str, str]:
    """Return name -> import path of the functions in a package beside `example` that take first what it does."""
    firsts = {
        f"{home}:{node.name}": node.args.args[0].arg
        for home, node in _defined_in(_package_of(example))
        if isinstance(node, ast.FunctionDef) and node.args.args
    }
    wanted = firsts.get(example)
    return {path.rpartition(":")[2]: path for path, first in firsts.items() if first == wanted}


def _package_of(path: str) -> str:
    return path.rpartition(":")[0].rpartition(".")[0]


@functools.cache
def _defined_in(package: str) -> list[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Return the public classes and functions in a package's modules, each with the module it stands in."""
    spec = _spec_of(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    return [
        (f"{package}.{file.stem}", node)
        for file in sorted(file for folder in folders for file in Path(folder).glob("*.py"))
        for node in ast.parse(file.read_bytes()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    ]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))


def _is_file(module_name: str) -> bool:
    return module_name.endswith(".py") or os.sep in module_name


def _load_file(path: Path) -> ModuleType:
    """Load a file as the module that importing it by name would give, else as one of its own."""
    path = path.expanduser().resolve()
    if (own := _own_name(path)) in sys.modules:
        return sys.modules[own]
    name, home = _home(path)
    add_places([home])  # what it imports from beside it
    if "." not in path.stem and _origin(name) == path:
        return importlib.import_module(name)
    return load_afresh(path)


def _own_name(path: Path) -> str:
    return f"{BY_FILE}{path.stem}_{blake2b(str(path).encode(), digest_size=6).hexdigest()}"


def load_afresh(path: Path) -> ModuleType:
    """Execute a file as a module of its own, in place of one that was made of it before.

    Raises:
        FileNotFoundError: there is none, or it is not a Python file.
        Exception: as the file raises it.
    """
    path = path.expanduser().resolve()
    name = _own_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that annotations in it can be resolved
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _origin(name: str) -> Path | None:
    """Return the file that importing `name` gives."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec, such as __main__
        return None
    return Path(spec.origin).resolve() if spec is not None and spec.origin else None


def _failed(module_name: str, where: str, error: BaseException) -> ConfigError:
    """Return the error for a module that raised while it was loaded, with the line in it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    place = f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f" at {error.filename}:{error.lineno}"
    what = f"cannot import {module_name!r}: it raised {type(error).__name__}{place}: {error}"
    is_relative = isinstance(error, ImportError) and "relative import" in str(error)
    return ConfigError(where, what, "put an __init__.py beside it" if is_relative else "mend the module")
