"""Load a checkpoint of any number of ranks and ZeRO stage into an engine of any other: elastic resume
(docs/checkpoints.md).

The shards are mapped, not read; each rank copies just the elements that it holds into its float32 master weights and
moments, and DeepSpeed makes the low-precision weights of them. DeepSpeed's own universal checkpoints do not lead
between stages 1 or 2 and 3, and mix up parameter groups under 3 (docs/deepspeed.md, row 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2e_ds.checkpoint.shards import MOMENTS, MOMENTUM, Piece, Shards, own_range
from l2e_ds.distributed import collectives, heartbeat
from l2e_ds.engine.engine import parameter_groups
from l2e_ds.errors import CheckpointError

LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def layout(engine: Any) -> dict[str, Any]:
    """Return what decides how DeepSpeed lays out its shards; it loads only those of the same layout itself."""
    wrapper = engine.optimizer
    return {
        "ranks": collectives.size(),
        "zero_stage": engine.zero_optimization_stage(),
        "optimizer": f"{type(wrapper).__name__} of {type(_inner_optimizer(wrapper)).__name__}",
    }


def loss_scaler_state(engine: Any) -> dict[str, Any]:
    """Return the loss scale of fp16 and its counters, as plain numbers; empty in other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None) if engine.fp16_enabled() else None
    return {name: getattr(scaler, name) for name in LOSS_SCALER if hasattr(scaler, name)}


class ElasticLoad:
    """Loads master and low-precision weights, moments, Adam's step count and fp16's loss scale into an engine, in two
    steps, after each of which the ranks must agree: in the first a rank may fail alone."""

    def __init__(self, checkpoint: Path, engine: Any, state: dict[str, Any]) -> None:
        """state: the content of the checkpoint's state.json."""
        self.checkpoint, self.engine, self.zero_stage = checkpoint, engine, state["identity"]["zero_stage"]
        self.applied_steps, self.loss_scaler = state["train"]["applied"], state["loss_scaler"]
        self.parameters: dict[str, Any] = dict(engine.module.named_parameters())
        has_muon = any(group.get("use_muon") for group in _inner_optimizer(engine.optimizer).param_groups)
        groups = parameter_groups(engine.module, 0.0, has_muon)
        names = {parameter: name for name, parameter in self.parameters.items()}
        self.keys = {
            names[parameter]: ("fp32", *(_moments(group["name"] == "muon") if self.applied_steps else ()))
            for group in groups
            for parameter in group["params"]
        }
        """What is loaded of each parameter, in the optimizer's order."""

    def copy_own_part(self) -> None:
        """Copy from the shards what this rank holds. Raises CheckpointError where the two do not go together."""
        _refuse_unsupported(self.checkpoint, self.engine, self.zero_stage)
        self.shards = Shards(self.checkpoint, list(self.keys))
        sizes, found = {name: _numel(parameter) for name, parameter in self.parameters.items()}, self.shards.sizes()
        if sizes != found:
            name = min(name for name in sizes.keys() | found.keys() if sizes.get(name) != found.get(name))
            raise CheckpointError(
                f"{self.checkpoint}: has {found.get(name, 0)} elements of {name}, the model {sizes.get(name, 0)}"
            )
        flats = _master_weights(self.engine)
        if self.applied_steps:
            _make_moments(self.checkpoint, self.engine, flats, self.applied_steps)
        for name, keys in self.keys.items():
            if not self.shards.has(name, keys):
                raise CheckpointError(
                    f"{self.checkpoint}: lacks {' or '.join(keys[1:])} of {name} after {self.applied_steps} steps"
                )
        optimizer = _inner_optimizer(self.engine.optimizer)
        for name, piece in _own_pieces(self.engine, self.parameters):
            heartbeat.beat()
            flat = flats[piece.flat]
            for key in self.keys[name]:
                held = (flat if key == "fp32" else optimizer.state[flat][key]).data.view(-1)
                part = self.shards.read(name, key, piece.start, piece.count)
                held.narrow(0, piece.offset, piece.count).copy_(part)
        for attribute, value in self.loss_scaler.items():
            setattr(self.engine.optimizer.loss_scaler, attribute, value)

    def spread_and_check(self) -> None:
        """Compute the low-precision weights from the master weights, and compare all of them with the shards, on rank
        0. Collective. Raises CheckpointError where they differ."""
        import deepspeed

        _make_low_precision_weights(self.engine)
        wrong = []
        for name, parameter in self.parameters.items():
            heartbeat.beat()
            held = {key: self._gather(parameter, key) for key in self.keys[name]}
            with deepspeed.zero.GatheredParameters([parameter]):
                held["weights"] = parameter.detach().clone()
            for key, tensor in held.items() if collectives.is_main() else ():
                expected = self.shards.read(name, "fp32" if key == "weights" else key, 0, _numel(parameter))
                if not torch.equal(tensor.detach().flatten().cpu(), expected.to(tensor.dtype)):
                    wrong.append(f"{key} of {name}")
        if wrong:
            raise CheckpointError(
                f"{self.checkpoint}: after loading, the engine's {wrong[0]} differs ({len(wrong)} such)"
            )

    def _gather(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.engine.zero_optimization_stage() == 0:
            return parameter if key == "fp32" else _inner_optimizer(self.engine.optimizer).state[parameter][key]
        if key == "fp32":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, key)


def _refuse_unsupported(checkpoint: Path, engine: Any, zero_stage: int) -> None:
    stages = (zero_stage, engine.zero_optimization_stage())
    if 0 in stages and (engine.bfloat16_enabled() or engine.fp16_enabled()):
        raise CheckpointError(
            f"{checkpoint}: was written with ZeRO stage {stages[0]}, this run has {stages[1]}; allowed in bf16: from 0"
            " to 0, and between 1, 2 and 3"
        )
    if type(_inner_optimizer(engine.optimizer)).__name__ == "AdamW8bit":
        raise CheckpointError(
            f"{checkpoint}: was written with optimizer.name: adamw-8bit, whose states resume only on the same number of"
            " ranks and ZeRO stage"
        )
    if getattr(engine.optimizer, "round_robin_gradients", False):
        raise CheckpointError(
            f"{checkpoint}: resumes on another number of ranks or ZeRO stage only without round_robin_gradients"
        )


def _moments(is_muon: bool) -> tuple[str, ...]:
    return (MOMENTUM,) if is_muon else MOMENTS


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _inner_optimizer(wrapper: Any) -> Any:
    """Return the optimizer that DeepSpeed's wraps; without ZeRO in float32 there is no wrapper."""
    return getattr(wrapper, "optimizer", wrapper)


def _master_weights(engine: Any) -> list[Tensor]:
    """Return the tensors that this rank's optimizer works on."""
    wrapper = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(wrapper, name):  # names in stage 3, in 1 and 2, in 1 with bf16
            return list(getattr(wrapper, name))
    return [parameter for group in wrapper.param_groups for parameter in group["params"]]


def _own_pieces(engine: Any, parameters: dict[str, Any]) -> Iterator[tuple[str, Piece]]:
    """Yield name and piece of the parameters that this rank holds; `flat` is the place in `_master_weights`."""
    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    whole = {parameter: place for place, parameter in enumerate(_master_weights(engine))} if stage == 0 else {}
    for name, parameter in parameters.items():
        if stage == 0:
            yield name, Piece(0, parameter.numel(), whole[parameter], 0)
        elif stage == 3:
            flat, offset, part = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start, count = own_range(_numel(parameter), part, collectives.rank())
            if count:
                yield name, Piece(start, count, flat, offset)
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            own, held = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield name, Piece(own.start, own.numel, mapping.param_group_index, held.start)


def _make_moments(checkpoint: Path, engine: Any, flats: list[Tensor], steps: int) -> None:
    """Have the optimizer make its moments, by a step with gradients and a rate of zero, and set its count of steps.
    Raises CheckpointError if it is neither Adam nor Muon."""
    wrapper, optimizer = engine.optimizer, _inner_optimizer(engine.optimizer)
    stage_3 = engine.zero_optimization_stage() == 3
    lent = [flat for flat in flats if flat.grad is None]  # with offload there are gradients already
    rates = [group["lr"] for group in optimizer.param_groups]
    for flat in lent:
        flat.grad = torch.zeros_like(flat)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    if stage_3:
        wrapper._set_fp32_optimizer_param_groups()
    muon = {flat for group in optimizer.param_groups if group.get("use_muon") for flat in group["params"]}
    for flat in muon:  # DeepSpeed makes it before the step
        optimizer.state[flat][MOMENTUM] = torch.zeros_like(flat)
    optimizer.step()
    if stage_3:
        wrapper._clear_fp32_optimizer_param_groups()
    for flat in lent:
        flat.grad = None
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        if "step" in group:
            group["step"] = steps
    for flat in flats:
        state = optimizer.state[flat]
        if set(state) - {"step"} != set(_moments(flat in muon)):
            raise CheckpointError(
                f"{checkpoint}: resumes on another number of ranks or ZeRO stage only with optimizers that keep"
                f" {' and '.join(MOMENTS)} (Adam, AdamW), or Muon; got {type(optimizer).__name__}"
            )
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(steps)
        elif "step" in state:
            state["step"] = steps


def _make_low_precision_weights(engine: Any) -> None:
    """Compute the low-precision weights from the master weights, and what DeepSpeed's own functions find them by."""
    wrapper, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        wrapper.checkpoint_event_prologue()
        for group in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        wrapper.checkpoint_event_epilogue()
    elif stage > 0:
        wrapper.update_lp_params()
        if any(wrapper.optimizer.state.values()):
            wrapper._lazy_init_hp_params_optimizer_state()
