"""Build the DeepSpeed engine, and read or change what it keeps: learning rates, skipped steps, gradients, loss
scale."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2e_ds.config.sections import OptimizerConfig, RunConfig
from l2e_ds.engine.configuration import zero_stage
from l2e_ds.errors import ConfigError
from l2e_ds.models.counts import layer_matrices
from l2e_ds.system.files import one_line


def parameter_groups(model: Any, weight_decay: float, has_muon: bool = False) -> list[dict[str, Any]]:
    """Return two groups, as GPT-NeoX makes them: matrices decay, biases and norms do not. has_muon: before them a third
    group, of the matrices that Muon updates."""
    muon = layer_matrices(model) if has_muon else []
    muon.sort(key=lambda parameter: parameter.shape, reverse=True)  # as DeepSpeed's Muon does
    taken = {id(parameter) for parameter in muon}
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 a rank holds a flat piece
        if id(parameter) not in taken:
            (decay if len(shape) >= 2 else rest).append(parameter)
    groups = [
        {"params": decay, "weight_decay": weight_decay, "name": "decay"},
        {"params": rest, "weight_decay": 0.0, "name": "no_decay"},
    ]
    return [{"params": muon, "weight_decay": weight_decay, "name": "muon"}, *groups] if has_muon else groups


def _make_optimizer(groups: list[dict[str, Any]], section: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of `optimizer.name`."""
    assert section.peak_learning_rate is not None  # filled in by engine.configuration.resolve
    adam: dict[str, Any] = {"lr": section.peak_learning_rate, "betas": tuple(section.betas), "eps": section.eps}
    match section.name:
        case "adamw-8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, **adam)
        case "muon":
            from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

            muon = {"lr": section.muon_learning_rate, "momentum": section.muon_momentum}
            first, *others = groups
            given = [{**first, **muon, "use_muon": True}, *({**group, **adam, "use_muon": False} for group in others)]
            return MuonWithAuxAdam(given, torch.optim.AdamW, {**adam, "fused": True})
    # One pass over memory, on CPUs and GPUs. Offloaded it is as fast as DeepSpeed's own (docs/speed.md), which each
    # machine would have to compile at its first run, for a minute and a half.
    return torch.optim.AdamW(groups, **adam, fused=True)


def build_engine(model: nn.Module, config: RunConfig, ds: dict) -> Any:
    """Return a DeepSpeedEngine with the optimizer of `optimizer.name`, or the JSON's. Raises ConfigError where that
    does not work."""
    import deepspeed

    section = config.optimizer
    optimizer: torch.optim.Optimizer | None = None
    groups = parameter_groups(model, section.weight_decay, section.name == "muon")
    if "optimizer" not in ds:  # else DeepSpeed builds the JSON's on our groups
        optimizer = _make_optimizer(groups, section)
        ds = ds | {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    # ZeRO-0 in float32: DeepSpeed wraps no optimizer of its own around ours
    is_plain = zero_stage(ds) == 0 and config.training.precision == "fp32"
    if is_plain:
        ds = ds | {"gradient_clipping": 0.0}
    # DeepSpeed compiles its Muon for the first shape, and then once more for any shape. Nothing says that both round
    # alike, without which a resumed run is not bit-identical; and on CPUs it takes a minute.
    uncompiled = torch.compiler.set_stance("force_eager") if section.name == "muon" else contextlib.nullcontext()
    try:
        with contextlib.redirect_stdout(io.StringIO()), uncompiled:  # DeepSpeed narrates
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, model_parameters=groups, config=ds, dist_init_required=False
            )
    except (ValueError, AssertionError) as error:  # by both it says what a JSON must not have
        if optimizer is not None:
            raise
        problem = f"DeepSpeed builds no engine with optimizer.type {ds['optimizer']['type']}: {one_line(error)}"
        raise ConfigError(problem, where=f"deepspeed.config: {Path(config.deepspeed.config).name}") from error
    if is_plain:
        _clip_and_measure(engine.optimizer, list(model.parameters()), section.gradient_clipping or math.inf)
    if hasattr(engine.optimizer, "fp32_groups"):
        _undo_first_step(engine.optimizer)
    if section.name == "muon":
        engine.optimizer.step = torch.compiler.set_stance("force_eager")(engine.optimizer.step)
    return engine


def _undo_first_step(wrapper: Any) -> None:
    """Undo the step that DeepSpeed's optimizer of ZeRO-0 in bf16 takes when it is made (docs/deepspeed.md)."""
    for masters, weights in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
        for master, weight in zip(masters, weights, strict=True):
            master.data.copy_(weight)
    wrapper.optimizer.state.clear()


def _clip_and_measure(optimizer: Any, parameters: list[nn.Parameter], limit: float) -> None:
    """Make an optimizer clip the gradients before its step, and leave the step out if their norm is not finite.

    The engine reads both from attributes that only DeepSpeed's own optimizers have (docs/deepspeed.md). All ranks have
    the same gradients then and decide alike.
    """

    def is_not_finite() -> bool:
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        optimizer._global_grad_norm, optimizer.overflow = norm, not math.isfinite(norm)
        return optimizer.overflow

    _skip_optimizer_steps_when(optimizer, is_not_finite)


def group_rates(engine: Any) -> list[float]:
    """Return the learning rate of each parameter group as DeepSpeed built it: Muon and muP have different ones."""
    return [group["lr"] for group in engine.optimizer.param_groups]


def set_learning_rate(engine: Any, rate: float, shares: Sequence[float]) -> None:
    """Set the learning rate of the next step; shares: what each parameter group takes of it, in the order of groups."""
    for group, share in zip(engine.optimizer.param_groups, shares, strict=True):
        group["lr"] = rate * share


@contextlib.contextmanager
def keeping_hyper_parameters(engine: Any) -> Iterator[None]:
    """Set again what loading a checkpoint overwrites in each parameter group: the user may have changed it."""
    names = ("weight_decay", "betas", "eps", "momentum")
    own = [{name: group[name] for name in names if name in group} for group in engine.optimizer.param_groups]
    yield
    for group, values in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(values)


def skip_steps_when(engine: Any, is_skipped: Callable[[], bool]) -> None:
    """Let the engine's Adam skip a step, if `is_skipped` says so: weights, moments and step counts stay as they are.

    It is called when the optimizer is about to step, on all ranks equally often, perhaps several times: once for each
    parameter group or part of one. `norm_within_step` is known then.
    """
    wrapper = engine.optimizer
    # ZeRO-3 has a second one for the part that `offload_optimizer.ratio` leaves on the GPU
    for optimizer in (getattr(wrapper, "optimizer", wrapper), getattr(wrapper, "backup_optimizer", None)):
        if optimizer is not None:
            _skip_optimizer_steps_when(optimizer, is_skipped)


def _skip_optimizer_steps_when(optimizer: torch.optim.Optimizer, is_skipped: Callable[[], bool]) -> None:
    kept: list[list[dict[str, Any]]] = []

    def before(*_: Any) -> None:
        if is_skipped():
            kept.append(optimizer.param_groups)
            optimizer.param_groups = []

    def after(*_: Any) -> None:
        if kept:
            optimizer.param_groups = kept.pop()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def norm_within_step(engine: Any) -> float:
    """Return the gradients' global 2-norm, before clipping and without loss scale, while the optimizer steps."""
    return float(engine.optimizer._global_grad_norm)


def wait_for_gradients(engine: Any) -> None:
    """With gradients offloaded by ZeRO-1 or 2, wait for their copies; `own_gradient` may be read then."""
    if getattr(engine.optimizer, "cpu_offload", False):
        from deepspeed.accelerator import get_accelerator

        get_accelerator().synchronize()


def own_gradient(engine: Any, parameter: Any) -> torch.Tensor | None:
    """Return what this rank holds of a parameter's gradient between the last backward and the optimizer's step, or None
    if that is nothing. It is reduced over the ranks, and times the loss scale.

    Under ZeRO-0 every rank holds all of it, otherwise each a part of its own, under ZeRO-3 with zeros as padding.
    """
    if engine.zero_optimization_stage() == 0:
        return parameter.grad
    if engine.zero_optimization_stage() == 3:
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(parameter)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    if gradient.numel() < parameter.numel():
        return gradient
    own = mapping.lp_fragment_address  # DeepSpeed's BF16_Optimizer keeps the whole gradient on each rank
    return gradient.narrow(0, own.start, own.numel)


def loss_scale(engine: Any) -> float:
    """Return the present loss scale; 1 without fp16."""
    return float(getattr(engine.optimizer, "cur_scale", 1.0)) if engine.fp16_enabled() else 1.0
