"""Routing replay: in training, tokens go to the experts that the generator sent them to (R3, 2510.11370).

Two implementations of one mixture of experts, or two dtypes, break near ties of a router differently. A token that goes
to another expert has another log-prob altogether: the ratio of the two policies is then noise. With the choice taken
from the generator the learner's gates are still its own, from its own logits, so the router is trained.

A family is not known by name: every router ends in a `topk` over its experts. It is answered here while a layer runs,
also when the layer is computed again in backward.

Invariants:
- a layer calls it once or never;
- where a token brings no route (the last one, texts, the canary), the model's own choice holds;
- a router that cannot be replayed so is refused when the engine opens.

Called by trainer and models. Shapes: A layers, T positions (rows times their length), K experts of a token.

Tests: tests/unit/engines/test_routes.py
"""

from __future__ import annotations

from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch.overrides import TorchFunctionMode

from flowrl.engines.base import TokenGroup
from flowrl.engines.packing import pack, plan
from flowrl.engines.savings import layers_of
from flowrl.errors import ConfigError, StageError
from flowrl.messages import Buffer, Routes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from flowrl.engines.objective import Sums

EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
TOPK = (torch.topk, torch.Tensor.topk)


def experts_of(config: PreTrainedConfig, where: str) -> tuple[int, int]:
    """Return how many experts a layer has, and to how many of them a token goes.

    Raises:
        ConfigError: the model has no experts to choose from.
    """
    settings = config.get_text_config()

    def first(names: Sequence[str]) -> int:
        found = next((value for name in names if (value := getattr(settings, name, None))), 0)
        return int(max(found) if isinstance(found, list | tuple) else found)

    num_experts, top_k = first(EXPERTS), first(CHOSEN)
    if not 0 < top_k < num_experts:
        what = f"{(config.architectures or [config.model_type])[0]} has no experts to choose from"
        raise ConfigError(f"{where}.routing", what, "set it to own")
    return num_experts, top_k


class _Answers(TorchFunctionMode):
    """Hands what each `topk` was asked and what it found to `answer`, which says what it gives."""

    def __init__(self, answer: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        found = func(*args, **options)
        return self._answer(args[0] if args else options["input"], found) if func in TOPK else found


class _Trial:
    """Finds out whether a router masks experts, and whether it takes its gates from what is masked."""

    def __init__(self) -> None:
        self.is_masked = False

    def look(self, values: Tensor) -> Tensor:
        """Return values that show wherever they are used."""
        self.is_masked |= bool(((values == 0) | (values <= torch.finfo(values.dtype).min)).any())
        return torch.full_like(values, float("nan"))


class RouteReplay:
    """Answers the routers of a model with the routes of the batch that is run."""

    def __init__(self, model: PreTrainedModel, where: str) -> None:
        self.where = where
        self.num_experts, self.top_k = experts_of(model.config, where)
        layers = layers_of(model)
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
        if len(layers) != self.num_layers:
            self._refuse(model, f"{len(layers)} of {self.num_layers} layers can be told apart")
        self.taken: dict[int, Tensor] = {}  # by layer: the experts of the last pass, [T, K]
        self.calls = [0] * self.num_layers  # of each layer's router
        # tokens in layers, since `figures` was asked
        self.num_told: Tensor = torch.zeros((), dtype=torch.float32, device=model.device)
        self.num_changed = self.num_told.clone()  # of these, which would have gone elsewhere by themselves
        self.use(None)
        self._trial: _Trial | None = None
        for index, layer in enumerate(layers):
            layer.forward = wraps(layer.forward)(partial(self._run, index, layer.forward))

    def use(self, routes_TAK: Tensor | None, copies_T: Tensor | None = None) -> None:
        """Take the routes of the pass that comes, which its backward may ask for again; -1: the model's own choice.

        `copies_T` is how many tokens each position counts for in the figures.
        """
        self._routes_TAK, self._copies_T = routes_TAK, copies_T
        self._counted: set[int] = set()

    def figures(self) -> Sums:
        """Return how many of the choices told since the last call were others than the model's own."""
        found = {"routes_changed": (float(self.num_changed), float(self.num_told))} if self.num_told else {}
        self.num_told, self.num_changed = self.num_told * 0, self.num_changed * 0
        return found

    def _run(self, layer: int, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with _Answers(partial(self._answer, layer)):
            return forward(*args, **options)

    def _answer(self, layer: int, scores: Tensor, found: Any) -> Any:
        """Return what a `topk` gives: the router's with the batch's experts, any other as it is."""
        if scores.shape[-1] != self.num_experts or found.indices.shape[-1] != self.top_k:
            return found
        self.calls[layer] += 1
        chosen = found.indices
        if self._routes_TAK is not None:
            told_TK = self._routes_TAK[:, layer].to(chosen.dtype)
            own_TK = chosen.reshape(-1, self.top_k)
            if len(told_TK) != len(own_TK):
                raise StageError(self.where, f"{len(told_TK)} positions have routes, a router got {len(own_TK)}")
            is_told_T = told_TK[:, 0] >= 0
            if self._copies_T is not None and layer not in self._counted:
                self._counted.add(layer)
                self.num_told = self.num_told + (self._copies_T * is_told_T).sum()
                is_other_T = (told_TK.sort(-1)[0] != own_TK.sort(-1)[0]).any(-1) & is_told_T
                self.num_changed = self.num_changed + (self._copies_T * is_other_T).sum()
            chosen = torch.where(is_told_T[:, None], told_TK, own_TK).view_as(chosen)
            values = scores.gather(-1, chosen)
            if self._trial is not None:
                values = self._trial.look(values)
            found = torch.return_types.topk((values, chosen))
        self.taken[layer] = chosen.detach().reshape(-1, self.top_k)
        return found

    @torch.no_grad()
    def settle(self, model: PreTrainedModel, module: nn.Module, device: torch.device) -> None:
        """Insist that this answers a model's routers, once in a layer, and that its gates are then still its own.

        `module` is what runs the model on packed batches; collective where parameters are sharded.

        Raises:
            ConfigError: it does not, so that the family cannot be replayed.
        """
        group = TokenGroup(prompt_ids=Buffer.ints([3, 4]), responses=[Buffer.ints([5, 6, 7, 8, 9])])
        self.calls = [0] * self.num_layers
        self._read(module, group, device)
        if not any(self.calls) or max(self.calls) > 1:
            self._refuse(model, f"its layers choose {min(self.calls)} to {max(self.calls)} times")
        none = torch.zeros(6, self.top_k, dtype=torch.int64)
        others = [self.taken.get(layer, none).cpu() + 1 for layer in range(self.num_layers)]
        routes = Routes.of(torch.stack(others, 1).numpy() % self.num_experts)
        self._trial = _Trial()
        found = self._read(module, msgspec.structs.replace(group, routes=[routes]), device)
        if self._trial.is_masked and not found.isfinite().all():
            self._refuse(model, "outside of the groups of experts that it would choose its gates are 0")
        self._trial = None
        self.figures()

    def _read(self, module: nn.Module, group: TokenGroup, device: torch.device) -> Tensor:
        ((rows,),) = plan([group], layout="alone", reads="before", budget=8)
        return module(pack([group], rows, layout="alone", reads="before", device=device))[0]

    def _refuse(self, model: nn.Module, why: str) -> None:
        what = f"{type(model).__name__} cannot be told which experts to take: {why}"
        raise ConfigError(f"{self.where}.routing", what, "set it to own")

    def check(self, groups: Sequence[TokenGroup]) -> None:
        """Insist that groups bring routes of this model's layers and experts for every sample.

        Raises:
            StageError: one does not.
        """
        for index, group in enumerate(groups):
            if len(group.routes) != len(group.responses):
                what = f"group {index} brings routes for {len(group.routes)} of {len(group.responses)} samples"
                raise StageError(self.where, what, "set routing=own: the engine that sampled gives none")
            for place, routes in enumerate(group.routes):
                fed = len(group.prompt_ids) + len(group.responses[place]) - 1
                found, most = routes.numpy(), self.num_experts - 1
                if found.shape != (fed, self.num_layers, self.top_k) or found.max(initial=0) > most:
                    what = (
                        f"sample {place} of group {index} has routes {found.shape} up to expert {found.max(initial=0)}"
                    )
                    expected = f"this model's are {(fed, self.num_layers, self.top_k)} up to {most}"
                    raise StageError(self.where, f"{what}, {expected}", "sample with the model that is trained")
