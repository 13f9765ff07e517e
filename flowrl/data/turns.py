"""Turns as tokens: what stands between the policy's turn and its next one, in the chat template's own words.

The policy's tokens are never tokenized again: a conversation grows by what it sampled and by the tokens of `between`,
which hold the end of its turn (where it did not sample that itself), the observation's message and the opening of its
next turn. Invariants: the tokens depend on the observation alone; appended turn by turn they are those of the whole
conversation rendered at once, as far as the policy's text tokenizes to what it sampled. That a template only ever
appends, in the same way at any length, and ends a turn with a token of its own is checked when a `TurnFormat` is made.
Called by the agent stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from flowrl.data.chat import render_chat, require_chat_template
from flowrl.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from flowrl.data.chat import Conversation

DEPTHS = 3  # turns that the template is tried with
REMEDY = "give the model a chat template that ends each turn with a special token and only appends"


class TurnFormat:
    """A tokenizer's chat template as it is used turn by turn."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, role: str, prefix: str = "", system_prompt: str | None = None
    ) -> None:
        """Try the template; `role` is that of an observation's message, `prefix` begins each of the policy's turns.

        Raises:
            ModelError: there is no template, or it does not merely append, or turns end without a special token.
            DataError: it refuses the role.
        """
        require_chat_template(tokenizer)
        self._tokenizer = tokenizer
        self._role = role
        self._prefix = prefix
        self._system_prompt = system_prompt
        self._where = f"tokenizer {tokenizer.name_or_path}"
        self._probe: Conversation = [{"role": "user", "content": "xqzask"}]
        self._turn_end = self._check()

    def first(self, observation: str | Conversation, *, where: str) -> list[int]:
        """Return the prompt's tokens: the first observation, with the policy's turn opened.

        Raises:
            DataError: the conversation is malformed or the template refuses it.
        """
        text = render_chat(self._tokenizer, observation, where=where, system_prompt=self._system_prompt)
        return self._ids(text + self._prefix)

    def between(self, turn: Sequence[int], observation: str) -> list[int]:
        """Return the tokens to be put behind the policy's `turn`, up to where its next one begins."""
        token_ids = self._ids(self._behind(self._probe, "xqzsay", observation) + self._prefix)
        return token_ids[1:] if turn[-1] == self._turn_end else token_ids

    def text(self, token_ids: Sequence[int]) -> str:
        """Return tokens as text, without special ones."""
        decoded: Any = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return cast("str", decoded)

    def _check(self) -> int:
        """Return the token that ends a turn."""
        seen: set[str] = set()
        messages = self._probe
        for depth in range(DEPTHS):
            said, heard = f"xqzsay{depth}", f"xqzhear{depth}"
            seen.add(self._behind(messages, said, heard).replace(heard, "xqzhear"))
            messages = [*messages, {"role": "assistant", "content": said}, {"role": self._role, "content": heard}]
        if len(seen) > 1:
            what = f"the chat template writes the {self._role}'s turn differently as the conversation grows"
            raise ModelError(self._where, what, REMEDY)
        token_ids = self._ids(seen.pop())
        if not token_ids or token_ids[0] not in self._special_ids():
            shown = self._tokenizer.convert_ids_to_tokens(token_ids[:1])
            raise ModelError(self._where, f"the chat template ends a turn with {shown}, no special token", REMEDY)
        return token_ids[0]

    def _behind(self, messages: Conversation, said: str, heard: str) -> str:
        """Return what the template writes behind the policy's turn once an observation follows."""
        opened = self._render(messages) + said
        more: Conversation = [
            *messages,
            {"role": "assistant", "content": said},
            {"role": self._role, "content": heard},
        ]
        whole = self._render(more)
        if not whole.startswith(opened):
            what = "the chat template renders a turn otherwise once another follows"
            raise ModelError(self._where, what, REMEDY)
        return whole[len(opened) :]

    def _render(self, messages: Conversation) -> str:
        try:
            return render_chat(self._tokenizer, messages, where=self._where, system_prompt=self._system_prompt)
        except DataError as error:
            remedy = f"set agent.role to one that it takes, not {self._role!r}"
            raise DataError(error.where, error.what, remedy) from error

    def _special_ids(self) -> set[int]:
        return {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}

    def _ids(self, text: str) -> list[int]:
        return cast("list[int]", self._tokenizer.encode(text, add_special_tokens=False))
