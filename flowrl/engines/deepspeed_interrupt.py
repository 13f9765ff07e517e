"""How a DeepSpeed pass is given up half way, and what it leaves behind is cleared.

DeepSpeed 0.19 has no call for this: a pass that raises leaves gathered parameters, half-filled reduction buckets,
hook counters and a truncated trace of modules. With these the next pass would fail or, worse, add half a gradient.

Invariants:
- after `leave_pass` the next forward starts as if the failed one had not been;
- after `clear_gradients` the next backward starts an accumulation window of its own. Both are local: they call no
  collective, and every rank calls them after the same collective.

Collectives are also what ranks vote before, and what one rank alone can do without. Called by the DeepSpeed engine.

Tests: tests/contracts/test_training_engines.py
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Methods of DeepSpeed's communication backend that wait for other ranks and can occur within a pass.
COLLECTIVES = (
    "all_gather",
    "all_gather_base",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
)


def replace_collectives(
    instead: Callable[[str, Callable[..., object]], Callable[..., object]],
) -> Callable[[], None]:
    """Put what `instead` makes of every collective of DeepSpeed's in its place; returns what takes it off again."""
    from deepspeed.comm import comm

    backend = comm.cdb
    before = {name: vars(backend).get(name) for name in COLLECTIVES}  # of another engine alone in this process
    for name in COLLECTIVES:
        setattr(backend, name, instead(name, getattr(backend, name)))

    def release() -> None:
        for name, own in before.items():
            if own is not None:
                setattr(backend, name, own)
            elif name in vars(backend):
                delattr(backend, name)  # the class's own shows again

    return release


class _Done:
    """Stands in for the handle of a collective that has nothing to wait for."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def answered_alone(name: str, collective: Callable[..., object]) -> Callable[..., object]:
    """Return what a collective comes to among one rank: its input, with no message to itself through the host."""

    @functools.wraps(collective)
    def alone(*arguments: Any, **further: Any) -> object:
        if names := _COPIES.get(name):
            given = {**dict(zip(names, arguments, strict=False)), **further}
            _copy(*(given[each] for each in names))
        return _Done() if further.get("async_op") else None

    return alone


# Of these the second argument is copied into the first; the others leave the one rank's tensor as it is.
_COPIES = {
    "all_gather": ("tensor_list", "tensor"),
    "all_gather_base": ("output_tensor", "input_tensor"),
    "all_gather_into_tensor": ("output_tensor", "input_tensor"),
    "all_gather_coalesced": ("output_tensors", "input_tensors"),
    "all_to_all_single": ("output", "input"),
    "all_to_all": ("output_tensor_list", "input_tensor_list"),
    "reduce_scatter": ("output", "input_list"),
    "reduce_scatter_tensor": ("output_tensor", "input_tensor"),
}


def _copy(target: Any, source: Any) -> None:
    targets = target if isinstance(target, list | tuple) else [target]
    sources = source if isinstance(source, list | tuple) else [source]
    for to, of in zip(targets, sources, strict=True):
        if to.data_ptr() != of.data_ptr():
            to.view(-1).copy_(of.reshape(-1))


def leave_pass(engine: Any) -> None:
    """Bring an engine whose forward or backward was interrupted back between two passes."""
    state = getattr(engine.optimizer, "_backward_hook_state", None)
    if state is not None:  # ZeRO stage 0 keeps nothing between passes but the parameters' own gradients
        state.backward_active_depth = 0
        state.remaining_grad_acc_hooks = 0
    # Where nothing is trained, what gathers parameters stands in the optimizer's place itself.
    gathers = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    if hasattr(gathers, "get_param_coordinator"):
        _release_parameters(engine, gathers)


def _release_parameters(engine: Any, offload: Any) -> None:
    """Let go of the parameters that ZeRO-3 had gathered, and of its notes on where the pass stood."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    modules = list(engine.module.modules())
    for module in modules:
        module.applied_pre_backward_ref_cnt = 0
        module.ds_grads_remaining = 0
        module._parameters._in_forward = False
    stack = parameter_offload.FWD_MODULE_STACK
    while stack and any(stack[-1] is module for module in modules):
        stack.pop()
    if not any(entry is engine.module for entry in stack):
        stack.append(engine.module)
    offload.release_backward_leftovers()
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()  # waits for what is in flight; a trace cut short must not be taken for whole
    in_flight = engine.module.ds_inflight_param_registry
    for parameter in engine.module.parameters():
        if parameter.ds_status == ZeroParamStatus.INFLIGHT and parameter not in in_flight:
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE  # its gathering was about to be asked for
    engine.empty_partition_cache()


def clear_gradients(engine: Any) -> None:
    """Forget every gradient since the last step, summed up or on its way."""
    optimizer = engine.optimizer
    for parameter in engine.module.parameters():
        parameter.grad = None
    if hasattr(optimizer, "_backward_hook_state"):
        optimizer._backward_hook_state.reset_for_new_step()
    if hasattr(optimizer, "clear_hp_grads"):  # stage 1 in bfloat16 sums in float32 buffers of its own
        optimizer.zero_grad()
    if not hasattr(optimizer, "ipg_buckets"):  # stage 0 too
        return
    reduced = optimizer.params_already_reduced
    for key in reduced if isinstance(reduced, dict) else range(len(reduced)):
        reduced[key] = False
    if hasattr(optimizer, "parameter_offload"):
        _clear_stage_3(optimizer)
    else:
        _clear_stages_1_and_2(optimizer)


def _clear_stages_1_and_2(optimizer: Any) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

    optimizer._wait_for_offload_copies()
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    optimizer.extra_large_param_to_reduce.clear()
    optimizer._release_ipg_buffers()
    optimizer.averaged_gradients.clear()
    optimizer.all_grad_tensors.clear()
    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    if optimizer.cpu_offload:
        optimizer._offload_accumulated_param_ids = set()
        optimizer.reset_cpu_buffers()
    optimizer.zero_grad()


def _clear_stage_3(optimizer: Any) -> None:
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear_params()
    optimizer.averaged_gradients.clear()
    optimizer.grad_partitions_flat_buffer.zero_()  # where a parameter gets no gradient next time, none must be left
    optimizer._offload_boundary_param_ids = set()
    if optimizer.offload_optimizer:
        optimizer.reset_cpu_buffers()
    optimizer.zero_grad()
