"""Turns as tokens: what stands between the policy's turn and its next one, in the chat template's own words.

The policy's tokens are never tokenized again: a conversation grows by what it sampled and by the tokens of `between`.
Those hold the end of its turn (where it did not sample that itself), the observation's message and the opening of its
next turn.

Invariants:
- the tokens depend on the observation alone;
- appended turn by turn they are those of the whole conversation rendered at once, as far as the policy's text tokenizes
  to what it sampled.

That a template only ever appends, in the same way at any length, and ends a turn with a token of its own is checked
when a `TurnFormat` is made. Called by the agent stage.

Tests: tests/unit/data/test_turns.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowrl.data.conversations import messages_of, with_system
from flowrl.data.formats import NormalRow
from flowrl.data.rendering import Renderer
from flowrl.data.sources import RawRow
from flowrl.ending import DATE, sample_text
from flowrl.errors import DataError, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import date

    from transformers import PreTrainedTokenizerBase

    from flowrl.data.conversations import Conversation

DEPTHS = 3  # turns that the template is tried with
REMEDY = "give the model a chat template that ends each turn with a special token and only appends"


class TurnFormat:
    """A tokenizer's chat template as it is used turn by turn."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, role: str, prefix: str = "", system_prompt: str | None = None,
        day: date = DATE,
    ) -> None:  # fmt: skip
        """Try the template; `role` is that of an observation's message, `prefix` begins each of the policy's turns.

        Raises:
            ModelError: there is no template, or it does not merely append, or turns end without a special token.
            DataError: it refuses the role.
        """
        self._tokenizer = tokenizer
        self._renderer = Renderer(tokenizer, day=day)
        self._role = role
        self._prefix = prefix
        self._system_prompt = system_prompt
        self._where = f"tokenizer {tokenizer.name_or_path}"
        self._probe: Conversation = [{"role": "user", "content": "xqzask"}]
        self._check()

    def first(self, observation: str | Conversation, *, where: str) -> list[int]:
        """Return the prompt's tokens: the first observation, with the policy's turn opened.

        Raises:
            DataError: the conversation is malformed or the template refuses it.
        """
        messages: Conversation = [{"role": "user", "content": observation}] if isinstance(observation, str) else []
        messages = messages or messages_of(RawRow(where, {"observation": observation}), "observation")
        text = self._open(messages, where=where) + self._prefix
        return self._renderer.prompt_ids(text, is_rendered=True)

    def between(self, turn: Sequence[int], observation: str) -> list[int]:
        """Return the tokens to be put behind the policy's `turn`, up to where its next one begins."""
        behind = self._behind(self._probe, "xqzsay", observation) + self._prefix
        end = self._renderer.ending.begins(behind) or ""
        rest = self._renderer.ids_behind(behind[len(end) :])
        is_ended = turn[-1] == self._renderer.ids_behind(end)[-1]
        return rest if is_ended else [*self._renderer.ids_behind(end), *rest]

    def text(self, token_ids: Sequence[int]) -> str:
        """Return an episode's tokens as text, special ones too, without the one that ended it."""
        return sample_text(self._tokenizer, token_ids, self._renderer.ending.stops)

    def _check(self) -> None:
        seen: set[str] = set()
        messages = self._probe
        for depth in range(DEPTHS):
            said, heard = f"xqzsay{depth}", f"xqzhear{depth}"
            seen.add(self._behind(messages, said, heard).replace(heard, "xqzhear"))
            messages = [*messages, {"role": "assistant", "content": said}, {"role": self._role, "content": heard}]
        if len(seen) > 1:
            what = f"the chat template writes the {self._role}'s turn differently as the conversation grows"
            raise ModelError(self._where, what, REMEDY)
        behind = seen.pop()
        if self._renderer.ending.begins(behind) is None:
            raise ModelError(
                self._where, f"the chat template ends a turn with {behind[:20]!r}, no special token", REMEDY
            )

    def _behind(self, messages: Conversation, said: str, heard: str) -> str:
        """Return what the template writes behind the policy's turn once an observation follows."""
        opened = self._render(messages)
        turns = [{"role": "assistant", "content": said}, {"role": self._role, "content": heard}]
        whole = self._render([*messages, *turns])
        before, _, behind = whole[len(opened) :].partition(said)
        if not whole.startswith(opened) or before.strip():  # white space there is the policy's to write
            what = "the chat template renders a turn otherwise once another follows"
            raise ModelError(self._where, what, REMEDY)
        return behind

    def _render(self, messages: Conversation) -> str:
        try:
            return self._open(messages, where=self._where)
        except DataError as error:
            remedy = f"set agent.role to one that it takes, not {self._role!r}"
            raise DataError(error.where, error.what, remedy) from error

    def _open(self, messages: Conversation, *, where: str) -> str:
        messages = with_system(messages, self._system_prompt)
        return self._renderer.prompt_text(NormalRow(place=where, prompt=messages))
