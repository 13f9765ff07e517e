"""Training with plain torch, and scoring with a reward model.

Invariants:
- where the model is in bfloat16 the optimizer works on float32 copies of its parameters and sums gradients in float32,
  or steps of 1e-6 would be lost in rounding;
- state is safetensors and JSON, never a pickle, and training continued from it is bit-equal to training that never
  stopped.

Every rank holds the whole model.

Named in node configs as `engine="flowrl.engines.torch:TorchEngine"`; reward-model nodes take
`SequenceScoringEngine`.

Tests: tests/unit/engines/test_trainer.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from flowrl.config import load_class
from flowrl.engines.aside import tensors_of
from flowrl.engines.base import open_engine
from flowrl.engines.savings import DEEPSPEED, FSDP, decay_groups
from flowrl.engines.trainer import Trainer
from flowrl.errors import StageError
from flowrl.graph.stage import Ranks
from flowrl.model_files import check_classifier, text_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from flowrl.engines.base import Scoring, TokenGroup, Training, TrainingConfig
    from flowrl.messages import FloatArray


class TorchEngine(Trainer):
    """AdamW over whole parameters on every rank; gradients are summed over ranks once, in `apply`."""

    def _start_training(self) -> None:
        self._names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        self._live = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._masters: list[Tensor] = [*self._live]
        if self.dtype != torch.float32:
            self._masters = [parameter.detach().float() for parameter in self._live]
            for live, master in zip(self._live, self._masters, strict=True):
                live.register_post_accumulate_grad_hook(_move_gradient_to(master))
        master_of = {id(live): master for live, master in zip(self._live, self._masters, strict=True)}
        groups = decay_groups(self.model, self.config.weight_decay)
        self._optimizer = torch.optim.AdamW(
            [{**group, "params": [master_of[id(live)] for live in group["params"]]} for group in groups],
            lr=self.config.lr,
            betas=self.config.betas,
            eps=self.config.adam_eps,
            fused=True,
        )

    def _held(self) -> Iterator[Tensor]:
        yield from super()._held()
        if self._is_training:
            yield from tensors_of(self._optimizer)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _clear_gradients(self) -> None:
        for tensor in (*self._live, *self._masters):
            tensor.grad = None

    def _step(self, lr: float) -> float:
        self._sum_over_ranks()
        norm = float(torch.nn.utils.clip_grad_norm_(self._masters, self.config.max_grad_norm or math.inf))
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._copy_masters()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _sum_over_ranks(self) -> None:
        if self.link.world_size == 1:
            return
        import torch.distributed as dist

        for master in self._masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            dist.all_reduce(master.grad)

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for live, master in zip(self._live, self._masters, strict=True):
            if live is not master:
                live.copy_(master)

    def _write_state(self, directory: Path) -> None:
        """Write the parameters in float32 and both moments as safetensors, the counters as JSON."""
        from safetensors.torch import save_file

        if self.link.rank != 0:
            return
        tensors: dict[str, Tensor] = {}
        for name, master in zip(self._names, self._masters, strict=True):
            tensors[f"parameter/{name}"] = master.detach()
            for key in ("exp_avg", "exp_avg_sq") if self._num_steps else ():
                tensors[f"{key}/{name}"] = self._optimizer.state[master][key]
        directory.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / "state.safetensors")
        (directory / "state.json").write_bytes(msgspec.json.encode({"num_steps": self._num_steps}))

    @torch.no_grad()
    def _read_state(self, directory: Path) -> None:
        from safetensors.torch import load_file

        try:
            counters = msgspec.json.decode((directory / "state.json").read_bytes(), type=dict[str, int])
            tensors = load_file(directory / "state.safetensors", device=str(self.device))
        except OSError as error:
            raise StageError(
                self.where, f"no state of this engine in {directory} ({error})", "check --resume"
            ) from error
        self._num_steps = counters["num_steps"]
        self._optimizer.state.clear()
        for name, master in zip(self._names, self._masters, strict=True):
            master.copy_(tensors[f"parameter/{name}"])
            if self._num_steps:
                self._optimizer.state[master] = {
                    "step": torch.tensor(float(self._num_steps), dtype=torch.float32, device=self.device),
                    "exp_avg": tensors[f"exp_avg/{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq/{name}"],
                }
        self._copy_masters()

    def _unload(self) -> None:
        super()._unload()
        for name in ("_optimizer", "_live", "_masters"):
            self.__dict__.pop(name, None)


def _move_gradient_to(master: Tensor) -> Callable[[Tensor], None]:
    """Return a hook that adds a parameter's fresh gradient to its float32 copy's and frees it."""

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        fresh = parameter.grad.float()
        master.grad = fresh if master.grad is None else master.grad.add_(fresh)
        parameter.grad = None

    return move


class SequenceScoringEngine:
    """A reward model: one number for each whole sequence, or one after every token.

    A sequence is read where transformers reads it, and so where the model was trained: at the last token that is not
    the padding its config names. What flowrl saves names none that a text holds, so there it is the last token; models
    of others often pad with the token that ends an answer, and judge at the one before it.
    """

    def __init__(self, config: TrainingConfig, *, where: str) -> None:
        self._where = where
        self._model = config.model
        told = msgspec.structs.replace(config, head="reward", frozen=True)
        self._engine: Trainer = open_engine(self._path(config), config=told, where=where, name=where)

    @staticmethod
    def _path(settings: Scoring | Training) -> str:
        """Return the engine that reads: sharded weights are DeepSpeed's, whole ones are read with less around them."""
        if settings.tensor_parallel > 1:
            return FSDP
        return DEEPSPEED if settings.zero_stage == 3 else f"{__name__}:TorchEngine"

    @classmethod
    def check_settings(cls, settings: Scoring | Training, where: str, *, has_gpu: bool) -> None:
        """Insist on what the engine that reads insists on."""
        load_class(cls._path(settings), where).check_settings(settings, where, has_gpu=has_gpu)

    def open(self, ranks: Ranks = Ranks()) -> None:  # noqa: B008  # it is never changed
        """Load the model on this rank and join the others.

        Raises:
            ModelError: the directory holds no sequence classifier, whose scores would all be 0.
        """
        check_classifier(Path(self._model), self._where)
        settings = json.loads((Path(self._model) / "config.json").read_bytes())
        self._padding: int | None = text_config(settings).get("pad_token_id")
        self._engine.open(ranks)

    def follow(self) -> None:
        """Serve as a rank other than 0 until rank 0 closes."""
        self._engine.follow()

    def score_groups(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """Return the value at the last token of each response that is not padding; of nothing else, at its first."""
        found = zip(groups, self.score(groups), strict=True)
        pairs = (zip(group.responses, rows, strict=True) for group, rows in found)
        return [[float(values[self._last(each.tolist())]) for each, values in pair] for pair in pairs]

    def score_sequences(self, group: TokenGroup) -> list[float]:
        """Return what `score_groups` does of one group."""
        return self.score_groups([group])[0]

    def _last(self, token_ids: Sequence[int]) -> int:
        return max((place for place, token in enumerate(token_ids) if token != self._padding), default=0)

    def score(self, groups: Sequence[TokenGroup]) -> list[list[FloatArray]]:
        """Return the value after every response token, [group][sample] -> float32 [tokens]."""
        return self._engine.score(groups)

    def sleep(self) -> None:
        """Put aside what it holds on its devices."""
        self._engine.sleep()

    def wake(self) -> None:
        """Be as before `sleep`."""
        self._engine.wake()

    def close(self) -> None:
        """Release the model."""
        self._engine.close()
