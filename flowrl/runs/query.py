"""A small language for choosing rollouts: Python's own expressions over the columns of the recorded samples.

    reward < 0 and staleness > 0
    score.exact == 1 and tokens > 200 and finish in ("length", "abort")
    "sorry" in response and not matches(response, "[0-9]+")

Comparisons (chained ones too), `and`, `or`, `not`, `in`, `is None`, `+ - * /`, `len(column)`, `abs(column)` and
`matches(column, "pattern")`; names are columns, `tokens` and `prompt_tokens` are the lengths of their lists.

Invariants:
- an expression is never run as Python;
- every node of what it is parsed into is on a list of known ones;
- it becomes a `pyarrow.compute.Expression`, so that the worst it can do is to be refused.

As in SQL, a comparison with a missing value chooses nothing. Called by inspection.py.

Tests: tests/unit/runs/test_query.py
"""

from __future__ import annotations

import ast
import difflib
import operator
from typing import TYPE_CHECKING, Any

from flowrl.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

COUNTED = {"tokens": "token_ids", "prompt_tokens": "prompt_token_ids"}  # a length, and the column it is of
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: a.cast("float64") / b,  # Arrow would divide whole numbers as whole numbers
}
FUNCTIONS = ("len", "abs", "matches")
MOST_DEPTH = 64  # levels: the reader and Arrow go down into each by a call of their own
MOST_NUMBER = 2**63 - 1
MOST_CHARACTERS = 2000  # of an expression; deeper nesting than that allows would need a longer one
HELP = "such as 'reward < 0 and staleness > 0'"


def parse(text: str, columns: Mapping[str, str]) -> Any:
    """Return an expression as a `pyarrow.compute.Expression`.

    Args:
        columns: name -> "number", "text", "list" or "other".

    Raises:
        ConfigError: it is not of this language, or names a column that is not there.
    """
    if len(text) > MOST_CHARACTERS:
        raise ConfigError("--where", f"has {len(text)} characters, at most {MOST_CHARACTERS} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError("--where", f"{text!r} is not an expression ({error.args[0]})", f"write one {HELP}") from error
    _check_size(tree.body)
    return _Reader(columns).condition(tree.body)


def _check_size(whole: ast.expr) -> None:
    """See that the expression and its constants are of a size that can be evaluated."""
    rest: list[tuple[ast.AST, int]] = [(whole, 1)]
    while rest:
        node, depth = rest.pop()
        if depth > MOST_DEPTH:
            raise ConfigError("--where", f"is nested more than {MOST_DEPTH} deep", f"write an expression {HELP}")
        match node:
            case ast.Constant(value=int(value)) if value > MOST_NUMBER:
                raise ConfigError("--where", "has a number of more than 64 bits", "write it with an exponent, as 1e20")
            case ast.Constant(value=str(value)) if not _is_text(value):
                raise ConfigError(
                    "--where",
                    f"{value!r} is half a character (a lone surrogate), which no text holds",
                    "write the whole of it",
                )
            case _:
                rest += [(child, depth + 1) for child in ast.iter_child_nodes(node)]


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def column(name: str, columns: Mapping[str, str]) -> Any:
    """Return a column, or the length of one, as an expression.

    Raises:
        ConfigError: there is none of that name.
    """
    pc = _compute()
    if name in columns:
        return pc.field((name,))
    if name in COUNTED and COUNTED[name] in columns:
        return pc.list_value_length(pc.field((COUNTED[name],)))
    raise unknown_column(name, columns, "--where")


def _compute() -> Any:
    """Return pyarrow.compute, whose functions are made as it is imported, where no type checker sees them."""
    import pyarrow.compute

    return pyarrow.compute


def unknown_column(name: str, columns: Sequence[str] | Mapping[str, str], where: str) -> ConfigError:
    """Return the refusal of a name, with the nearest known one."""
    known = [*columns, *COUNTED]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    return ConfigError(where, f"the rollouts have no column {name!r}", hint)


class _Reader:
    """Turns syntax into expressions; knows the columns' kinds, so that what cannot be compared is refused at once."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self._columns = columns

    def condition(self, node: ast.expr) -> Any:
        """Return what is true or false of a sample."""
        match node:
            case ast.BoolOp(op=ast.And(), values=values):
                return _reduce(operator.and_, [self.condition(value) for value in values])
            case ast.BoolOp(values=values):
                return _reduce(operator.or_, [self.condition(value) for value in values])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ~self.condition(operand)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                lefts = [left, *rights[:-1]]
                pairs = zip(lefts, ops, rights, strict=True)
                return _reduce(operator.and_, [self._comparison(a, op, b) for a, op, b in pairs])
            case ast.Call(func=ast.Name(id="matches"), args=[subject, ast.Constant(value=str(pattern))], keywords=[]):
                return self._matches(subject, pattern)
            case _:
                raise _refused(node, "is neither true nor false")

    def _comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(op, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise _refused(right, "cannot stand behind 'is'; only None can")
            missing = self._value(left)[0].is_null()
            return missing if isinstance(op, ast.Is) else ~missing
        if isinstance(op, ast.In | ast.NotIn):
            found = self._membership(left, right)
            return found if isinstance(op, ast.In) else ~found
        (a, first), (b, second) = self._value(left), self._value(right)
        if first != second:
            raise _refused(left, f"is {first} and {ast.unparse(right)} is {second}: they cannot be compared")
        if first == "list":
            raise _refused(left, "is a list; compare its length, len(...)")
        return COMPARISONS[type(op)](a, b)

    def _membership(self, left: ast.expr, right: ast.expr) -> Any:
        pc = _compute()
        if isinstance(right, ast.List | ast.Tuple | ast.Set):
            value, kind = self._value(left)
            values = [self._constant(each, kind) for each in right.elts]
            if not values:
                raise _refused(right, "is empty")
            return value.isin(values)
        text, kind = self._value(right)
        if isinstance(left, ast.Constant) and isinstance(left.value, str) and kind == "text":
            return pc.match_substring(text, left.value)
        raise _refused(right, "cannot stand behind 'in'; a list of values can, or a column of text behind a text")

    def _matches(self, subject: ast.expr, pattern: str) -> Any:
        import pyarrow as pa

        pc = _compute()
        text, kind = self._value(subject)
        if kind != "text":
            raise _refused(subject, f"is {kind}; a pattern is matched against text")
        try:
            pc.match_substring_regex(pa.array([""]), pattern)
        except pa.ArrowInvalid as error:
            raise ConfigError(
                "--where", f"{pattern!r} is not a pattern ({error})", "write it as RE2 reads it"
            ) from error
        return pc.match_substring_regex(text, pattern)

    def _value(self, node: ast.expr) -> tuple[Any, str]:
        """Return an expression and what it is of: "a number", "text" or "list"."""
        pc = _compute()
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return pc.scalar(value), "text" if isinstance(value, str) else "number"
            case ast.Name() | ast.Attribute():
                name = _name(node)
                kind = self._columns.get(name, "number")
                return column(name, self._columns), kind
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return pc.negate(self._number(operand)), "number"
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                return ARITHMETIC[type(op)](self._number(left), self._number(right)), "number"
            case ast.Call(func=ast.Name(id="abs"), args=[operand], keywords=[]):
                return pc.abs(self._number(operand)), "number"
            case ast.Call(func=ast.Name(id="len"), args=[operand], keywords=[]):
                value, kind = self._value(operand)
                if kind not in ("text", "list"):
                    raise _refused(operand, f"is {kind} and has no length")
                return (pc.utf8_length(value) if kind == "text" else pc.list_value_length(value)), "number"
            case _:
                raise _refused(node, f"is not read here; {', '.join(FUNCTIONS)} are the functions there are")

    def _number(self, node: ast.expr) -> Any:
        value, kind = self._value(node)
        if kind != "number":
            raise _refused(node, f"is {kind}, not a number")
        return value

    def _constant(self, node: ast.expr, kind: str) -> Any:
        sign = 1
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            node, sign = node.operand, -1
        if isinstance(node, ast.Constant):
            value = node.value
            if kind == "text" and isinstance(value, str):
                return value
            if kind == "number" and isinstance(value, bool | int | float):
                return sign * value
        raise _refused(node, f"is no constant {kind}")


def _name(node: ast.expr) -> str:
    """Return a dotted name."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attribute):
            return f"{_name(value)}.{attribute}"
        case _:
            raise _refused(node, "is no column")


def _reduce(join: Callable[[Any, Any], Any], parts: list[Any]) -> Any:
    whole = parts[0]
    for part in parts[1:]:
        whole = join(whole, part)
    return whole


def _refused(node: ast.expr, why: str) -> ConfigError:
    return ConfigError("--where", f"{ast.unparse(node)!r} {why}", f"write an expression {HELP}")
