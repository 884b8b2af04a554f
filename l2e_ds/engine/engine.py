"""The one place that calls deepspeed.initialize."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l2e_ds.config.sections import RunConfig
from l2e_ds.engine.configuration import zero_stage
from l2e_ds.errors import ConfigError
from l2e_ds.system.files import one_line


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups, as GPT-NeoX makes them: matrices decay, biases and norms do not."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 a rank holds a flat piece
        (decay if len(shape) >= 2 else rest).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay, "name": "decay"},
        {"params": rest, "weight_decay": 0.0, "name": "no_decay"},
    ]


def build_engine(model: nn.Module, config: RunConfig, ds: dict, device: torch.device) -> Any:
    """Return a DeepSpeedEngine with AdamW, or with the JSON's optimizer. Raises ConfigError where that does not
    work."""
    import deepspeed

    section = config.optimizer
    optimizer: torch.optim.Optimizer | None = None
    groups = parameter_groups(model, section.weight_decay)
    if "optimizer" not in ds:  # else DeepSpeed builds the JSON's on our groups
        # One pass over memory, on CPUs and GPUs. Offloaded it is as fast as DeepSpeed's own (docs/speed.md), which each
        # machine would have to compile at its first run, for a minute and a half.
        rate, betas = section.peak_learning_rate, (section.betas[0], section.betas[1])
        assert rate is not None  # filled in by engine.configuration.resolve
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=section.eps, fused=True)
        ds = ds | {"zero_force_ds_cpu_optimizer": False}
    # ZeRO-0 in float32: DeepSpeed wraps no optimizer of its own around AdamW
    is_plain = zero_stage(ds) == 0 and config.training.precision == "fp32"
    if is_plain:
        ds = ds | {"gradient_clipping": 0.0}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed narrates
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
    return engine


def _clip_and_measure(optimizer: Any, parameters: list[nn.Parameter], limit: float) -> None:
    """Make an optimizer clip the gradients before its step, and leave the step out if their norm is not finite.

    The engine reads both from attributes that only DeepSpeed's own optimizers have (docs/deepspeed.md). All ranks have
    the same gradients then and decide alike.
    """

    def before(*_: Any) -> None:
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        optimizer._global_grad_norm, optimizer.overflow = norm, not math.isfinite(norm)
        if optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None  # AdamW skips parameters without a gradient

    optimizer.register_step_pre_hook(before)


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
    names = ("weight_decay", "betas", "eps")
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
            _skip_steps_when(optimizer, is_skipped)


def _skip_steps_when(optimizer: torch.optim.Optimizer, is_skipped: Callable[[], bool]) -> None:
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
