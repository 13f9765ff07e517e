"""Messages as data write them, brought to the one shape that templates are given: online, offline and in files.

Data come from OpenAI's wire format, from Parquet, which gives every object the fields that any of them has, and from
hands.

Invariants:
- a content is a string (null is "", text parts are joined, a part that is no text is refused);
- a tool call is {"type": "function", "function": {"name", "arguments"}} with the arguments an object, every key of it
  kept;
- `weight` is 0 or 1;
- no other null is left among a message's own fields.

ShareGPT's messages (from, value) are messages too, and roles have their usual names (Human and model are the user and
the assistant). Called by formats.py for examples and by prompts.py for prompts.

Tests: tests/unit/data/test_turns.py
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

import msgspec

from flowrl.errors import DataError

if TYPE_CHECKING:
    from flowrl.data.sources import RawRow

Conversation = list[dict[str, Any]]
WEIGHTS = ("weight", "train", "training", "loss", "loss_mask")  # what OpenAI and Mistral, axolotl and ms-swift call it
LIKE_WEIGHTS = re.compile(r"train|learn|mask|loss|weight", re.IGNORECASE)  # what else could say whether it is learned
SYSTEM_ROLES = ("system", "developer")
SYSTEMS = ("system", "system_prompt")  # columns for what stands before a conversation
THOUGHTS = {"reasoning_content", "reasoning", "thinking"}  # what an assistant thought, where it is apart from content
OTHER_TOOLS = ("functions", "available_tools")  # what others call the column of tools
# Fields that neither a template nor training reads here.
ALIEN = {
    "function_call": "tool_calls",
    **dict.fromkeys(("functions", "tools"), "the column tools"),
    "train_detail": "weight, of the whole message",
}

ROLES = ("system", "developer", "user", "assistant", "tool")  # that every template may be given
SPEAKERS = {  # other names of them, whatever their case
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant"),
    **{role: role for role in ROLES},
}


def renamed(value: Any, place: str) -> Any:
    """Return messages with role and content and with the roles' usual names; anything else as it is.

    ShareGPT writes them with from and value; a single one may stand without a list.

    Raises:
        DataError: one of ShareGPT's is from somebody unknown.
    """
    given = cast("list[Any]", value if isinstance(value, list) else [value])
    if given and all(isinstance(each, dict) and {"from", "value"} <= each.keys() for each in given):
        return [_spoken(message, f"message {k}", place) for k, message in enumerate(given)]
    is_one = isinstance(value, dict) and {"role", "content"} <= cast("dict[str, Any]", value).keys()
    return [_named(each) for each in given] if isinstance(value, list) or is_one else value


def _named(message: Any) -> Any:
    role = cast("dict[str, Any]", message).get("role") if isinstance(message, dict) else None
    known = SPEAKERS.get(role.casefold()) if isinstance(role, str) else None
    return {**message, "role": known} if known and known != role else message


def _spoken(message: dict[str, Any], which: str, place: str) -> dict[str, Any]:
    speaker = message["from"]
    known = {**SPEAKERS, "observation": "tool"}
    role = known.get(speaker.casefold()) if isinstance(speaker, str) else None
    if role is None:
        remedy = f"{', '.join(known)} are known; write a call as tool_calls of a message with role and content"
        raise DataError(place, f"{which} is from {speaker!r}", remedy)
    others = {name: each for name, each in message.items() if name not in ("from", "value")}
    return {"role": role, "content": message["value"], **others}


def messages_of(row: RawRow, name: str, words: str = "") -> Conversation:
    """Return the messages in a column; `words` are what errors call it, where the file may have another name for it.

    Raises:
        DataError: it holds none, or one of them is malformed.
    """
    value, words = row.columns[name], words or f"column {name!r}"
    if not isinstance(value, list):
        raise DataError(row.place, f"{words} holds {noun(value)}", "a string or a list of messages was expected")
    if not value:
        raise DataError(row.place, f"{words} holds no message", "drop the row, or set data.on_bad=skip")
    return [_message(row, f"{words}: message {k}", each) for k, each in enumerate(cast("list[Any]", value))]


def with_system(messages: Conversation, system_prompt: str | None) -> Conversation:
    """Put a system prompt before messages that have none of their own; None leaves that to the template."""
    if system_prompt is None or messages[0]["role"] in SYSTEM_ROLES:
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def system_of(row: RawRow) -> str | None:
    """Return the system prompt in a column of its own, if there is one: a text, or Anthropic's text parts.

    Raises:
        DataError: among the parts is one that is no text.
    """
    given = ((name, row.columns.get(name)) for name in SYSTEMS)
    texts = (_content(row, f"column {name!r}", value) for name, value in given if isinstance(value, str | list))
    return next((text for text in texts if text.strip()), None)


def check_history(row: RawRow) -> None:
    """Refuse earlier turns in a column of their own, beside a prompt that is a text.

    Raises:
        DataError: there are some.
    """
    earlier = row.columns.get("history")
    if isinstance(earlier, list) and earlier:
        what = f"has earlier turns in a column 'history' ({len(cast('list[Any]', earlier))}), which nothing here reads"
        raise DataError(row.place, what, "write them and the prompt as messages")


def tools_of(row: RawRow) -> list[dict[str, Any]] | None:
    """Return the tools a row offers: JSON schemas, or strings that hold them as JSON.

    Raises:
        DataError: the column holds something else.
    """
    if other := next((name for name in OTHER_TOOLS if row.columns.get(name)), ""):
        raise DataError(row.place, f"has a column {other!r}, which nothing here reads", "call it tools, or otherwise")
    value = _decoded(row, "tools")
    if not value:
        return None
    tools: list[Any] = []
    for each in cast("list[Any]", value) if isinstance(value, list) else [None]:
        tool = _from_json(each) if isinstance(each, str) else each
        if not isinstance(tool, dict):
            raise DataError(row.place, f"column 'tools' holds {noun(value)}", "a list of JSON schemas was expected")
        tools.append(_unfilled(row, tool))
    return tools


def options_of(row: RawRow) -> dict[str, Any]:
    """Return what a row gives the chat template besides its messages.

    Raises:
        DataError: the column holds no object, or names what the renderer gives itself.
    """
    value = _decoded(row, "chat_template_kwargs") or {}
    if not isinstance(value, dict):
        raise DataError(row.place, f"column 'chat_template_kwargs' holds {noun(value)}", "an object was expected")
    options = {name: each for name, each in cast("dict[str, Any]", _unfilled(row, value)).items() if each is not None}
    taken = [name for name in ("messages", "tools", "add_generation_prompt", "chat_template") if name in options]
    if taken:
        what = f"column 'chat_template_kwargs' sets {taken[0]}, which is not the template's own"
        raise DataError(row.place, what, "take it out; tools have a column, a template data.chat_template")
    return options


def _message(row: RawRow, where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        what = f"{where} is {noun(message)}"
        raise DataError(row.place, what, "an object with role and content (or tool_calls) was expected")
    found = {name: each for name, each in cast("dict[str, Any]", message).items() if each is not None}
    found = cast("dict[str, Any]", _unfilled(row, found))
    content, calls = found.get("content"), found.get("tool_calls")
    is_silent = content is None and not calls and found.get("role") == "assistant" and not THOUGHTS & found.keys()
    if not isinstance(found.get("role"), str) or not ("content" in message or calls) or is_silent:
        what = f"{where} holds {', '.join(found) or 'nothing'}"
        raise DataError(row.place, what, "an object with role and content (or tool_calls) was expected")
    for name in found:
        alien = name in ALIEN or (name not in WEIGHTS and LIKE_WEIGHTS.search(name))
        if alien:
            remedy = f"write {ALIEN.get(name, 'weight, 0 (not learned) or 1')}"
            raise DataError(row.place, f"{where} has {name}, which nothing here reads", remedy)
    found = {"role": found["role"], "content": _content(row, where, content), **_others(found)}
    if isinstance(calls, list) and calls:
        found["tool_calls"] = [_call(row, where, call) for call in cast("list[Any]", calls)]
    elif calls:
        raise DataError(row.place, f"{where} has for tool_calls {noun(calls)}", "a list of calls was expected")
    return _weighed(row, where, found)


def _others(message: dict[str, Any]) -> dict[str, Any]:
    return {name: each for name, each in message.items() if name not in ("role", "content", "tool_calls")}


def _content(row: RawRow, where: str, content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise DataError(row.place, f"{where} has for content {noun(content)}", "a string was expected")
    texts: list[str] = []
    for part in cast("list[Any]", content):
        text = cast("dict[str, Any]", part).get("text") if isinstance(part, dict) else part
        kind = cast("dict[str, Any]", part).get("type", "text") if isinstance(part, dict) else "text"
        if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
            shown = f"a part of type {kind!r}" if isinstance(part, dict) else f"{noun(part)} among its parts"
            raise DataError(row.place, f"{where} has {shown}", "only text can be trained on; drop the row")
        texts.append(text)
    return "".join(texts)


def _call(row: RawRow, where: str, call: Any) -> dict[str, Any]:
    given = cast("dict[str, Any]", call) if isinstance(call, dict) else {}
    function = given.get("function", given)
    if not isinstance(function, dict) or not isinstance(cast("dict[str, Any]", function).get("name"), str):
        what = f"{where} has a tool call without a function's name"
        raise DataError(row.place, what, 'write {"type": "function", "function": {"name": ..., "arguments": {...}}}')
    inner = cast("dict[str, Any]", function)
    arguments = inner.get("arguments")
    arguments = _from_json(arguments or "{}") if arguments is None or isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        what = f"{where} calls {inner['name']} with {noun(arguments)} for arguments"
        raise DataError(row.place, what, "an object, or an object as JSON, was expected")
    outer = {name: each for name, each in given.items() if name not in ("function", "name", "arguments")}
    outer = {name: each for name, each in outer.items() if each is not None}
    return {"type": "function", **outer, "function": {**inner, "arguments": arguments}}


def _weighed(row: RawRow, where: str, message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its weight, 0 or 1, under one name; without one it is learned if it is the assistant's."""
    for name in WEIGHTS:
        value = message.pop(name, None)
        if isinstance(value, bool | int | float) and value in (0, 1):
            message["weight"] = int(value)
        elif value is not None:
            raise DataError(row.place, f"{where} has {name}={value!r}", "0 (not learned) or 1 was expected")
        if message.get("weight") and message["role"] != "assistant":
            what = f"{where}, the {message['role']}'s, has {name}={value!r}, and only the assistant's are learned"
            raise DataError(row.place, what, "leave it out, or write 0")
    return message


def _decoded(row: RawRow, name: str) -> Any:
    """Return a column that may be written as JSON."""
    value = row.columns.get(name)
    return _from_json(value) if isinstance(value, str) and value else value


def _from_json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _unfilled(row: RawRow, value: Any) -> Any:
    """Return a nested value without the nulls that a columnar file fills objects with; others' nulls are meant."""
    if not row.is_columnar:
        return value
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {name: _unfilled(row, each) for name, each in fields.items() if each is not None}
    return [_unfilled(row, each) for each in cast("list[Any]", value)] if isinstance(value, list) else value


def noun(value: Any) -> str:
    """Name a value's JSON type, with its article."""
    if isinstance(value, list):
        kinds = {type(each) for each in cast("list[Any]", value)}
        return "a list of strings" if kinds == {str} else "a list of objects" if kinds == {dict} else "a list"
    numbers = dict.fromkeys((int, float), "a number")
    nouns = {str: "a string", dict: "an object", bool: "true or false", bytes: "bytes, not text", **numbers}
    return nouns.get(cast("Any", type(value)), "nothing")
