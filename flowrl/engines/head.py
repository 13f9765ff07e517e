"""Language heads: what a model makes of its body's states, and log-probs without logits that outlive them.

A head is the model's own forward around a body that hands states back (`LanguageHead`), so that whatever a family does
to its logits is done here too. Where that is nothing, log-probs are left to the output layer alone (`FloatLinear`).

Invariants:
- logits are float32 numbers, products of float32 numbers where the layer is a `FloatLinear`;
- of a lone log-prob one number a logit is kept for backward, in the weights' dtype, and no logit is made twice.

Called by models. Shapes: N response tokens, R rows of them, H hidden size, V vocabulary.

Tests: tests/unit/engines/test_logits.py, tests/unit/engines/test_models.py
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from flowrl.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_LOGITS = 1 << 26  # float32 logits held at once: 256 MiB, and about three times that with their gradient
CACHED_LOGITS = 1 << 24  # made at once of those that are not held, on CPUs: 64 MiB


def body_of(model: nn.Module, where: str = "") -> tuple[str, nn.Module]:
    """Return the part of a model that its head reads, with the name it has there."""
    from transformers import PreTrainedModel

    parts = dict(model.named_children())
    if (name := str(getattr(model, "base_model_prefix", ""))) in parts:
        return name, parts[name]
    bodies = [(name, part) for name, part in parts.items() if isinstance(part, PreTrainedModel)]
    if len(bodies) != 1:
        what = f"{type(model).__name__} has no one body under a head ({', '.join(parts)})"
        raise ModelError(where, what, "choose another architecture")
    return bodies[0]


class FloatLinear(nn.Linear):
    """A linear layer computed in float32 whatever its weights are stored in; as a language head, its log-probs too."""

    def forward(self, input: Tensor, targets_N: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        if targets_N is not None:
            keeps = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
            return cast("Tensor", _LogProbs.apply(input, self.weight, targets_N, temperature, keeps))
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


class _LogProbs(torch.autograd.Function):
    """The log-probs of tokens by a linear head, log softmax(x W' / t), without logits that outlive their rows.

    Logits are products of float32 numbers. Of each is kept what it does to its token's log-prob (p - onehot, times the
    sum that p was divided by) in the weights' dtype. Both products of backward are of that dtype, added up in float32.
    Below float32 a gradient is rounded once more so, as between any two layers, and nothing is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, states_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperature: float, keeps: bool
    ) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        num_read, vocabulary = len(states_NH), len(weight_VH)
        rows = max(1, (MAX_LOGITS if states_NH.is_cuda else CACHED_LOGITS) // vocabulary)
        found_N, total_N = torch.empty(2, num_read, dtype=torch.float32, device=states_NH.device)
        moves_NV = weight_VH.new_empty(num_read, vocabulary) if keeps else None
        wide_VH = weight_VH.float()
        for start in range(0, num_read, rows):
            here = slice(start, start + rows)
            logits_RV = nn.functional.linear(states_NH[here].float(), wide_VH)
            if temperature != 1.0:
                logits_RV.div_(temperature)
            logits_RV.sub_(logits_RV.amax(-1, keepdim=True))
            found_N[here] = logits_RV.gather(-1, targets_N[here, None])[:, 0]
            total_N[here] = logits_RV.exp_().sum(-1)
            if moves_NV is not None:
                moves_NV[here] = logits_RV
        found_N -= total_N.log()
        if moves_NV is not None:
            own_N = (total_N * found_N.expm1()).to(moves_NV.dtype)
            moves_NV[torch.arange(num_read, device=own_N.device), targets_N] = own_N
            ctx.save_for_backward(states_NH, weight_VH, moves_NV, total_N)
        ctx.temperature = temperature
        return found_N

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        states_NH, weight_VH, moves_NV, total_N = ctx.saved_tensors
        scale_N1 = (gradient_N / (-ctx.temperature * total_N))[:, None]
        of_states = of_weight = None
        if ctx.needs_input_grad[0]:
            of_states = (moves_NV @ weight_VH * scale_N1).to(states_NH.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = moves_NV.T @ (states_NH * scale_N1).to(states_NH.dtype)
        return of_states, of_weight, None, None, None


class _States(nn.Module):
    """Stands in the place of a body, or of a body within it, and hands back the states that a head is asked about."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self._body = (body,)  # not a part of this: the model has it

    def __getattr__(self, name: str) -> Any:
        value = getattr(super().__getattribute__("_body")[0], name)
        return self if hasattr(value, "base_model_prefix") else value

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        return _Output([inputs_embeds])


class _Output(tuple[Any, ...]):
    """A body's output that has states and nothing else."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _FloatOutput(nn.Module):
    """A head's linear layer, its logits in float32 before anything else is done to them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # not a part of this: the model has it
        self.given: Tensor | None = None  # in place of what it would make

    def forward(self, states: Tensor) -> Tensor:
        return self._layer[0](states).float() if self.given is None else self.given

    def __getattr__(self, name: str) -> Any:
        return getattr(super().__getattribute__("_layer")[0], name)


class LanguageHead:
    """What a model makes of its body's states: its own forward, with nothing in the body's place."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = copy.copy(model)  # shares every layer but these two
        layer = model.get_output_embeddings()
        name = next((name for name, module in model.named_children() if module is layer), None)
        body_name, body = body_of(model)
        self._model._modules = {**model._modules, body_name: _States(body)}
        self._model.training = True  # some cut a forward into pieces without gradient when they are not
        known = inspect.signature(model.forward).parameters
        self._options = {name: False for name in ("use_cache", "output_router_logits") if name in known}
        self.linear: FloatLinear | None = None  # the layer alone, where log-probs can be left to it
        if name is not None:
            output = self._model._modules[name] = _FloatOutput(cast("nn.Module", layer))
            if type(layer) is FloatLinear and layer.bias is None and model.dtype != torch.float16:
                self.linear = layer if self._hands_on(output, layer) else None

    @torch.no_grad()
    def _hands_on(self, output: _FloatOutput, layer: nn.Linear) -> bool:
        """Say whether the model's own forward gives its output layer's logits as they are."""
        of_layer = {"dtype": torch.float32, "device": layer.weight.device}
        output.given = torch.linspace(-60.0, 60.0, layer.out_features, **of_layer)[None, None]
        try:
            return torch.equal(self(layer.weight.new_zeros(1, layer.in_features)), output.given[0])
        except Exception:  # it looks at the layer, or asks for more than states
            return False
        finally:
            output.given = None

    def __call__(self, states_NH: Tensor) -> Tensor:
        """Return the float32 logits, [N, V]."""
        output = type(self._model).forward(self._model, inputs_embeds=states_NH[None], **self._options)
        return output.logits[0].float()
