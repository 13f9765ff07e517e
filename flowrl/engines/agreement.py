"""Hold what is read off a model against the model's own forward, once, when it is opened.

A few made-up sequences are run by the model alone, in eval mode, and read as training will read them. That is alone and
packed, beside a longer one, in whatever mode training is in, twice. What does not agree is done more plainly where that
helps: the language head by the model's whole forward, the layout by rows run one by one. What differs then is refused
with the numbers, whatever the family calls its scaling, its dropout or its positions; so is a model that looks ahead,
whose log-probs of a token would be those of nobody who samples it. `check_fit` refuses tokens and
positions that the model has none of. Called by trainer and teacher, on every rank; collective where parameters are
sharded.

Tests: tests/unit/engines/test_agreement.py
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowrl.engines.attention import trial
from flowrl.engines.base import TokenGroup
from flowrl.engines.models import choose_layout, reads_of
from flowrl.engines.packing import LAYOUTS, pack, plan, unpack
from flowrl.errors import FlowrlError, ModelError, StageError
from flowrl.messages import Buffer
from flowrl.model_files import num_positions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from flowrl.engines.base import TrainingConfig
    from flowrl.engines.models import TokenReader
    from flowrl.engines.packing import Layout

    Values = dict[tuple[int, int], np.ndarray]

# Mean |difference| in nats at which two implementations of one model still agree, for tokens of up to USUAL_NATS.
# Those of equal weights differ by up to 2e-6 in float32 and about 0.04 in bfloat16; a stale or a wrong layer by 0.5.
SAME_WEIGHTS = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.15}
USUAL_NATS = 4.0  # made-up tokens are unlikelier, and what rounding does to them grows with their logits
SAME_CALL = 0.1  # of that, between two runs of one computation
SAME_KERNEL = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}  # in parts of the largest value
LENGTHS = ((4, (5, 3)), (7, (6,)), (12, (40, 24)))  # prompt and responses of each group, in tokens


def settle(reader: TokenReader, module: nn.Module, config: TrainingConfig, *, where: str) -> None:
    """Choose the head and the layouts in which `reader`, called through `module`, reads what the model itself says.

    Raises:
        ModelError: there are none, reading twice gives two answers, or what follows a token changes what is read at it.
    """
    groups = _made_up(reader)
    bound, name = SAME_WEIGHTS[reader.dtype], type(reader.model).__name__
    chosen, modes = reader.language_head, {part: part.training for part in module.modules()}

    def read(layout: Layout, groups: list[TokenGroup] = groups) -> Values:
        return _read(reader, module, groups, layout, config)

    def gap(one: Values, other: Values) -> float:
        return _gap(one, other, is_policy=reader.is_policy)

    def agrees(layout: Layout) -> bool:
        try:
            return (layout != "unmasked" or _has_gradients(reader)) and gap(read(layout), own) <= bound
        except (FlowrlError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # the model's attention is more than ours, its head asks for more than states
            return False

    try:
        module.eval()
        reader.language_head = None
        own = read("alone")
        if not all(np.isfinite(values).all() for values in own.values()):
            what = f"{name} gives numbers that are not finite for {len(groups)} short sequences"
            raise ModelError(where, what, f"its weights are damaged, or too large for {reader.dtype}")
        for part, mode in modes.items():
            part.training = mode
        reader.language_head = chosen
        if reader.is_policy and not agrees("alone"):
            reader.language_head = None
        found = read("alone")
        if not (apart := gap(read("alone"), found)) <= SAME_CALL * bound:
            what = f"{name} gives another answer each time (by {apart:.2g}): something in it is drawn at random"
            raise ModelError(where, what, "set its dropout, jitter and noise to 0 in config.json")
        if not (apart := gap(found, own)) <= bound:
            what = f"what is read off {name} differs from its own forward by {apart:.2g}, {bound:.2g} are allowed"
            raise ModelError(where, what, "it trains otherwise than it runs; choose another architecture")
        cut = read("alone", [_halved(group) for group in groups])
        before = {key: own[key][: len(values)] for key, values in cut.items()}
        if config.head != "reward" and not (apart := gap(cut, before)) <= bound:
            what = f"what follows a token changes what {name} says of it by {apart:.2g}, {bound:.2g} are allowed"
            raise ModelError(where, what, "it looks ahead (is_decoder in config.json?); choose a causal language model")
        longest = max(prompt + max(sizes) for prompt, sizes in LENGTHS)
        first = LAYOUTS.index(choose_layout(reader.model, longest, reader.attention))
        reader.layouts = tuple(each for each in LAYOUTS[first:] if each == "alone" or agrees(each))
    except (FlowrlError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever a model's own code may raise
        what = f"{name} cannot be run on {len(groups)} short sequences ({type(error).__name__}: {error})"
        raise ModelError(where, what, "choose another architecture") from error


def _halved(group: TokenGroup) -> TokenGroup:
    """Return a group with the first half of each response."""
    return TokenGroup(
        prompt_ids=group.prompt_ids,
        responses=[Buffer.ints(each.numpy()[: -(-len(each) // 2)]) for each in group.responses],
    )


def _has_gradients(reader: TokenReader) -> bool:
    """Return whether the kernel that a model would take has the gradients of a mask: a forward does not show them."""
    if reader.attention != "varlen":  # FlexAttention's is compiled for a mask, and held against it in tests/gpu
        return True
    settings = reader.model.config.get_text_config()
    num_heads = int(settings.num_attention_heads)
    num_key_heads = int(getattr(settings, "num_key_value_heads", None) or num_heads)
    width = int(getattr(settings, "head_dim", None) or settings.hidden_size // num_heads)
    return trial(num_heads, num_key_heads, width, dtype=reader.dtype, device=reader.device) <= SAME_KERNEL[reader.dtype]


def _made_up(reader: TokenReader) -> list[TokenGroup]:
    """Return groups of tokens that are no marks of images or sounds, no longer than may stand beside each other."""
    config, settings = reader.model.config, reader.model.config.get_text_config()
    marks = {value for name, value in vars(config).items() if name.endswith("token_id") and isinstance(value, int)}
    usable = np.array([token for token in range(min(int(settings.vocab_size), 1000)) if token not in marks])
    random = np.random.default_rng(0)
    most = min(num_positions(config.get_text_config().to_dict()) or reader.reach, reader.reach)

    def draw(num_tokens: int) -> Buffer:
        return Buffer.ints(random.choice(usable, min(num_tokens, max(1, most // 2))))

    return [TokenGroup(prompt_ids=draw(n), responses=[draw(size) for size in sizes]) for n, sizes in LENGTHS]


@torch.no_grad()
def _read(reader: TokenReader, module: Any, groups: list[TokenGroup], layout: Layout, config: TrainingConfig) -> Values:
    (batches,) = plan(groups, layout=layout, reads=reads_of(config), budget=1 << 20)
    found: Values = {}
    for rows in batches:
        batch = pack(groups, rows, layout=layout, reads=reads_of(config), device=reader.device)
        if reader.is_policy:
            values_N = module(batch, temperature=1.0)[0]
        else:  # a new head says 0 everywhere; another one reads the same states
            states_NH = module(batch, as_states=True)[0].float()
            weights_H = torch.linspace(-1.0, 1.0, states_NH.shape[1], dtype=torch.float32, device=states_NH.device)
            values_N = states_NH @ weights_H
        found |= unpack([(batch, values_N)])
    return found


def _gap(found: Values, expected: Values, *, is_policy: bool) -> float:
    """Return the mean difference of two readings: in nats at usual tokens, or of values in parts of their size."""
    ours, theirs = (np.concatenate([values[key] for key in sorted(expected)]) for values in (found, expected))
    size = np.abs(theirs).mean()
    return float(np.abs(ours - theirs).mean() / (max(1.0, size / USUAL_NATS) if is_policy else size))


def check_fit(groups: Sequence[TokenGroup], reader: TokenReader, where: str) -> None:
    """Insist that a model has an embedding for every token of the groups and positions for all of them.

    Raises:
        StageError: it has not, with the group and the numbers.
    """
    config, embeddings = reader.model.config.get_text_config(), None
    with suppress(NotImplementedError):  # a head of ours around a decoder in a wrapper
        embeddings = reader.model.get_input_embeddings()
    rows = int(getattr(embeddings, "num_embeddings", config.vocab_size))
    most = num_positions(config.to_dict())
    for index, group in enumerate(groups):
        ids = [group.prompt_ids.numpy(), *(response.numpy() for response in group.responses)]
        largest = max((int(part.max()) for part in ids if len(part)), default=0)
        length = len(ids[0]) + max((len(part) for part in ids[1:]), default=0)
        if largest >= rows:
            what = f"group {index} has token {largest}, the model embeddings for {rows} (0 to {rows - 1})"
            raise StageError(where, what, "take the tokenizer that the model was made with, or resize its embeddings")
        if 0 < most < length:
            what = f"group {index} has a sequence of {length} tokens, the model positions for {most}"
            raise StageError(where, what, "leave out longer ones, or lower max_tokens")
