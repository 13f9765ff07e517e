"""Prompts as text: the tokenizer's chat template applied to a string or a conversation.

Invariant: a prompt ends where the policy begins to write (the assistant's turn is open), and a prompt that the template
or the settings cannot render is refused, never repaired. Called by `load_prompts`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from flowrl.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    Conversation = list[Mapping[str, Any]]


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Insist that the tokenizer has a chat template.

    Raises:
        ModelError: it has none.
    """
    if not tokenizer.chat_template:
        remedy = "take an instruction-tuned model, or set data.chat_template=false to use prompts as they are"
        raise ModelError(f"tokenizer {tokenizer.name_or_path}", "has no chat template", remedy)


def render_chat(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Conversation, *, where: str, system_prompt: str | None
) -> str:
    """Return the prompt under the chat template, with the assistant's turn opened.

    Raises:
        DataError: the conversation is empty, malformed, ends with the assistant, or the template refuses it.
    """
    from jinja2 import TemplateError

    messages = as_messages(prompt, where=where, system_prompt=system_prompt)
    try:
        plain = [dict(message) for message in messages]
        return cast("str", tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise DataError(where, f"the chat template refuses the roles {roles} ({error})", "mend the row") from error


def as_messages(prompt: str | Conversation, *, where: str, system_prompt: str | None) -> Conversation:
    """Return the prompt as the messages that the template is given.

    A string becomes one user message. `system_prompt` is put before a prompt that has no system message of its own;
    None leaves that to the template.

    Raises:
        DataError: the conversation is empty, malformed or ends with the assistant.
    """
    messages: Conversation = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    _check_conversation(messages, where)
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return messages


def _check_conversation(messages: Conversation, where: str) -> None:
    if not messages:
        raise DataError(where, "the conversation is empty", "give at least one user message")
    for place, message in enumerate(cast("list[Any]", messages)):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            found = f"message {place} is {_short(message)}"
            raise DataError(where, found, "each message is an object with role and content")
    if messages[-1]["role"] == "assistant":
        remedy = "end it with the user's message; the policy writes the answer"
        raise DataError(where, f"message {len(messages) - 1}, the last, is the assistant's", remedy)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
