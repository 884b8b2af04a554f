"""Make a DeepSpeed JSON, which is taken as it is, and a run file one consistent pair.

Where both speak of the same value, one may leave it out (or write "auto") and the other's value holds; two different
values are an error. What DeepSpeed would ignore or do wrong without a word is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from l2e_ds.config.batch import BatchArithmetic, batch_arithmetic
from l2e_ds.config.reading import find_file, read_deepspeed_json
from l2e_ds.config.sections import OptimizerConfig, RunConfig
from l2e_ds.console import did_you_mean
from l2e_ds.distributed import collectives
from l2e_ds.errors import ConfigError
from l2e_ds.models.pythia import published_learning_rate

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def _types(**names: str) -> dict[str, type]:
    """Return the type of each key. names: the keys of each type, by the type's name."""
    return {key: kind for kind in _KINDS for key in names.get(kind.__name__, "").split()}


# What DeepSpeed 0.19.8 reads at the top level, by the type of the value; it ignores anything else (docs/deepspeed.md,
# row 9). A unit test compares this list with the keys that the installed version asks for.
TOP_LEVEL_KEYS = _types(
    bool="dataloader_drop_last disable_allgather disable_python_gc dump_state graph_harvesting"
    " managed_gradient_accumulation memory_breakdown prescale_gradients sparse_gradients"
    " use_data_before_expert_parallelism wall_clock_breakdown zero_allow_untested_optimizer"
    " zero_force_ds_cpu_optimizer",
    int="gradient_accumulation_steps steps_per_print train_batch_size train_micro_batch_size_per_gpu vocabulary_size",
    float="gradient_clipping gradient_predivide_factor",
    str="communication_data_type gradient_allreduce_op log_level seq_parallel_communication_data_type",
    dict="activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger compile"
    " compression_training csv_monitor curriculum_learning data_efficiency data_types datastates_ckpt eigenvalue"
    " elasticity expert_parallel flops_profiler fp16 hybrid_engine nebula optimizer pipeline progressive_layer_drop"
    " quantize_training scheduler sparse_attention tensor_parallel tensorboard timers torch_autocast wandb"
    " weight_quantization zero_optimization",
)
# What it reads of the blocks that it does not check itself.
BLOCK_KEYS = {
    "checkpoint": _types(
        bool="checkpoint_serialization load_universal use_node_local_storage",
        str="tag_validation",
        dict="parallel_write writer",
    ),
    "data_types": _types(str="buffer_dtype grad_accum_dtype param_dtype", list="keep_in_fp32_modules"),
    "flops_profiler": _types(
        bool="detailed enabled",
        int="module_depth profile_step top_modules",
        float="recompute_fwd_factor",
        str="output_file",
    ),
    "optimizer": _types(bool="legacy_fusion", str="type", dict="params"),
    "timers": _types(dict="throughput"),
}
ADAM_PARAMETERS = _types(
    bool="torch_adam adam_w_mode bias_correction amsgrad", float="lr eps weight_decay", list="betas"
)

_FLOAT32 = "master weights and the optimizer's moments are kept in float32"
# Values that DeepSpeed would take: JSON path -> (the only one allowed; why). None: none at all.
FIXED_VALUES: dict[tuple[str, ...], tuple[Any, str]] = {
    ("gradient_allreduce_op",): ("mean", "with anything else gradients grow with the number of ranks"),
    ("checkpoint", "load_universal"): (
        False,
        "no checkpoint could be resumed; see docs/checkpoints.md for other ranks",
    ),
    ("checkpoint", "use_node_local_storage"): (False, "ranks of several hosts would write the same files"),
    ("checkpoint", "writer"): (None, "checkpoints are published by this project (docs/checkpoints.md)"),
    ("datastates_ckpt",): (None, "checkpoints are published by this project (docs/checkpoints.md)"),
    ("zero_optimization", "load_from_fp32_weights"): (True, "a resumed run would lose the master weights' precision"),
    ("zero_optimization", "elastic_checkpoint"): (False, "see docs/checkpoints.md for other numbers of ranks"),
    ("zero_optimization", "compute_grad_norm"): (True, "the metric gradient_norm and clipping need it"),
    ("zero_optimization", "legacy_stage1"): (False, "this version of DeepSpeed has it no more"),
    ("zero_optimization", "zenflow"): (None, "its steps use gradients of other steps"),
    ("zero_optimization", "offload_optimizer", "ratio"): (
        1.0,
        "a second optimizer would keep the first learning rate, and no checkpoint would hold its moments",
    ),
    ("zero_optimization", "offload_optimizer", "super_offload"): (False, "no checkpoint would hold Adam's moments"),
    ("zero_optimization", "cpu_offload"): (False, 'write "offload_optimizer": {"device": "cpu"}'),
    ("zero_optimization", "cpu_offload_param"): (False, 'write "offload_param": {"device": "cpu"}'),
    ("bf16", "check_grad_overflow"): (True, "steps with non-finite gradients would not be skipped"),
    ("bf16", "bf16_master_weights_and_grads"): (False, _FLOAT32),
    ("bf16", "bf16_optimizer_states"): (False, _FLOAT32),
    ("fp16", "fp16_master_weights_and_grads"): (False, _FLOAT32),
    ("data_types", "buffer_dtype"): ("fp32", "rotary frequencies and moments are kept in float32"),
    ("autotuning", "enabled"): (False, "it ends a run after a few steps"),
    ("hybrid_engine", "enabled"): (False, "it is for reinforcement learning"),
    ("data_efficiency", "enabled"): (False, "it changes what a network is fed"),
    ("expert_parallel", "enabled"): (False, "no model here has experts"),
    ("compile", "deepcompile"): (False, "use model.compile"),
    ("csv_monitor", "enabled"): (False, "set logging.csv"),
    ("tensorboard", "enabled"): (False, "set logging.tensorboard"),
    ("wandb", "enabled"): (False, "set logging.wandb_project"),
    ("comet", "enabled"): (False, "it would get two or three metrics, by samples; set logging.csv or its siblings"),
}

# JSON path -> (section, key) of the run file
SHARED_VALUES: dict[tuple[str, ...], tuple[str, str]] = {
    ("train_batch_size",): ("training", "global_batch"),
    ("train_micro_batch_size_per_gpu",): ("training", "micro_batch"),
    ("gradient_clipping",): ("optimizer", "gradient_clipping"),
    ("optimizer", "params", "lr"): ("optimizer", "peak_learning_rate"),
    ("optimizer", "params", "betas"): ("optimizer", "betas"),
    ("optimizer", "params", "eps"): ("optimizer", "eps"),
    ("optimizer", "params", "weight_decay"): ("optimizer", "weight_decay"),
}

# Sections that would change the training loop behind this project's back.
REFUSED = {
    "scheduler": "the schedule is set by optimizer.schedule, warmup, schedule_steps and final_ratio"
    " (DeepSpeed's WarmupCosineLR gives two steps at zero and never reaches its peak)",
    "bfloat16": 'write "bf16"',
    "activation_checkpointing": "set model.activation_checkpointing; this block would have no effect",
    "tensor_parallel": "tensor parallelism is not supported",
    "pipeline": "pipeline parallelism is not supported",
    "weight_quantization": "it is for inference",
    "torch_autocast": "set training.precision",
    "managed_gradient_accumulation": "accumulation follows from training.global_batch and training.micro_batch",
}


def resolve(
    config: RunConfig, ranks: int, run_file: str | Path | None = None, has_bf16: bool | None = None
) -> tuple[RunConfig, dict, BatchArithmetic]:
    """Return the run and the DeepSpeed configuration, each completed by the other, and the batch arithmetic. has_bf16:
    whether the run's device computes in bf16 (default: this machine's). Raises ConfigError."""
    path = find_file(config.deepspeed.config, run_file)
    if path is None:
        raise ConfigError(f"deepspeed.config: no such file: {config.deepspeed.config}")
    ds = read_deepspeed_json(path)
    where = f"deepspeed.config: {path.name}"
    _check_keys(ds, where)
    _check_json_optimizer(config, ds, where)
    config = _take_shared_values(config, ds, where)
    if config.optimizer.peak_learning_rate is None:
        config = config.replace("optimizer", peak_learning_rate=published_learning_rate(config.model))
    config = _take_precision(config, ds, where, has_bf16)
    config, batch = _take_batch(config, ds, where, ranks)
    _check_combinations(config, ds, where)
    _check_optimizer_with_stage(config, ds, where)
    _check_fixed(ds, where)
    ds = _without_auto(ds)
    _complete(ds, config, batch)
    _check_by_deepspeed(ds, batch, where)
    return config, ds, batch


def with_micro_batch(
    config: RunConfig, ds: dict, micro_batch: int, ranks: int
) -> tuple[RunConfig, dict, BatchArithmetic]:
    """Return what `resolve`, which returned config and ds, would have returned with this number in place of `auto`.
    Raises ConfigError where it does not divide the sequences of a rank."""
    config = config.replace("training", micro_batch=micro_batch)
    batch = batch_arithmetic(config, ranks)
    ds = ds | {"train_micro_batch_size_per_gpu": batch.micro_batch, "gradient_accumulation_steps": batch.accumulation}
    return config, ds, batch


def _check_keys(ds: dict, where: str) -> None:
    """Refuse what DeepSpeed would ignore, or take for something else."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for key in ds:
        if key in REFUSED:
            raise ConfigError(f"{where}: {key}: remove it; {REFUSED[key]}")
    _check_block(ds, TOP_LEVEL_KEYS, where)
    for name, keys in BLOCK_KEYS.items():
        _check_block(ds.get(name, {}), keys, f"{where}: {name}")
    models = {"bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config, "zero_optimization": DeepSpeedZeroConfig}
    models |= {"comms_logger": CommsLoggerConfig, "compile": CompileConfig}
    for name, model in models.items():
        _check_by_model(ds.get(name, {}), model, f"{where}: {name}")
    if "optimizer" in ds:
        if ds["optimizer"].get("type") is None:
            raise ConfigError(f"{where}: optimizer.type: is required, e.g. AdamW")
        if is_adam(ds):
            _check_block(ds["optimizer"].get("params", {}), ADAM_PARAMETERS, f"{where}: optimizer.params")


def _check_block(given: dict, types: dict[str, type], where: str) -> None:
    for key, value in given.items():
        if key not in types:
            hint = did_you_mean(key, types, f"allowed: {', '.join(sorted(types))}")
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
        _check_type(value, types[key], f"{where}: {key}")


def _check_by_model(given: dict, model: Any, where: str) -> None:
    """Check the types of a block that DeepSpeed has a pydantic model of, which takes "1", true and 1 for one
    another."""
    for name, field in model.model_fields.items():
        union = get_args(field.annotation) if get_origin(field.annotation) is Union else (field.annotation,)
        kinds = [kind for kind in union if kind is not type(None)]
        for key in {name, field.alias} & given.keys():
            if given[key] is None or len(kinds) > 1 or not isinstance(kinds[0], type):
                continue
            kind = next((base for base in (BaseModel, bool, int, float) if issubclass(kinds[0], base)), None)
            if kind is BaseModel:
                _check_type(given[key], dict, f"{where}: {key}")
                _check_by_model(given[key], kinds[0], f"{where}: {key}")
            elif kind is not None:
                _check_type(given[key], kind, f"{where}: {key}")


def _check_type(value: Any, kind: type, where: str) -> None:
    if kind is not dict and value in (None, "auto"):
        return
    if kind in (int, float):  # 5e8 is a whole number
        fits = type(value) in (int, float) and (kind is float or float(value).is_integer())
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise ConfigError(f"{where}: got {json.dumps(value)}, must be {_KINDS[kind]}")


def _check_fixed(ds: dict, where: str) -> None:
    """Refuse what would break a promise of this project without a word."""
    fixed = FIXED_VALUES
    # with `reduce_scatter` DeepSpeed fails; without, stage 3 scales by the number of ranks
    if zero_stage(ds) >= 2:
        why = "DeepSpeed's stages 2 and 3 do not support it"
        fixed = fixed | {("gradient_predivide_factor",): (1.0, why), ("prescale_gradients",): (False, why)}
    for path, (allowed, why) in fixed.items():
        value = _lookup(ds, path)
        if value is not None and (value.lower() if isinstance(value, str) else value) != allowed:
            remedy = "remove it" if allowed is None else f"allowed: {json.dumps(allowed)}"
            raise ConfigError(f"{where}: {'.'.join(path)}: got {json.dumps(value)}, {remedy}; {why}")


def zero_stage(ds: dict) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration, resolved or not; 0 where it names none."""
    return int(_lookup(ds, ("zero_optimization", "stage")) or 0)


def optimizer_type(ds: dict) -> str:
    """Return the type of the optimizer of the JSON, or AdamW, where it names none and `optimizer.name` decides."""
    return str(_lookup(ds, ("optimizer", "type")) or "AdamW")


def is_adam(ds: dict) -> bool:
    """Return whether the JSON names no optimizer but Adam and AdamW, whose states this project knows."""
    return optimizer_type(ds).lower() in ("adam", "adamw")


def update_rule(config: RunConfig, ds: dict) -> str:
    """Return what decides the update beside the keys of `optimizer`: its name or, with an optimizer of the resolved
    JSON, the type and the parameters that only the JSON sets. Adam with decoupled weight decay is adamw."""
    if "optimizer" not in ds:
        return config.optimizer.name
    parameters = ds["optimizer"].get("params", {})
    if is_adam(ds):
        name, defaults = "adamw", {"bias_correction": True, "amsgrad": False}
        if optimizer_type(ds).lower() == "adam":
            defaults["adam_w_mode"] = True
        own = {key: parameters[key] for key, value in defaults.items() if parameters.get(key, value) != value}
    else:
        shared = {path[2] for path in SHARED_VALUES if path[:2] == ("optimizer", "params")}
        name, own = optimizer_type(ds), {key: value for key, value in parameters.items() if key not in shared}
    return f"{name} {json.dumps(own, sort_keys=True)}" if own else name


def memory_remedies(config: RunConfig, ds: dict) -> str:
    """Return what would leave a device more memory and is not done yet, for the user to choose from."""
    stage, remedies = zero_stage(ds), ["more ranks"]
    name = config.optimizer.name
    highest = (1 if config.training.precision == "bf16" else 0) if name == "muon" else 3
    if stage < highest:
        remedies.append("a higher ZeRO stage")
    parts = ("offload_optimizer", "offload_param") if stage == 3 else ("offload_optimizer",)
    if name == "adamw" and not all(is_offloaded(ds, part) for part in parts):
        remedies.append("offload")
    if not config.model.activation_checkpointing:
        remedies.append("model.activation_checkpointing=true")
    return " or ".join(filter(None, [", ".join(remedies[:-1]), remedies[-1]]))


def is_offloaded(ds: dict, part: str) -> bool:
    """Return whether a DeepSpeed configuration offloads `offload_optimizer` or `offload_param` to the host."""
    return _lookup(ds, ("zero_optimization", part, "device")) not in (None, "none")


def _lookup(ds: dict, path: tuple[str, ...]) -> Any:
    """Return the value at a path, or None where it is missing or "auto"."""
    value: Any = ds
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return None if value == "auto" else value


def _take_shared_values(config: RunConfig, ds: dict, where: str) -> RunConfig:
    for path, (section, key) in SHARED_VALUES.items():
        given = _lookup(ds, path)
        if given is None:
            continue
        part = getattr(config, section)
        own = getattr(part, key)
        if key in part.model_fields_set and own not in (None, "auto") and own != given:
            raise ConfigError(
                f"{section}.{key}: got {own}, but {where} says {'.'.join(path)}: {given};"
                ' make them equal, or write "auto" there'
            )
        kept = {name: getattr(part, name) for name in part.model_fields_set}
        try:  # its type and range, as in a run file
            part = type(part).model_validate(kept | {key: given})
        except ValidationError as error:
            message = f"got {given!r}; {error.errors()[0]['msg']}"
            raise ConfigError(f"{where}: {'.'.join(path)}: {message}") from None
        config = config.model_copy(update={section: part})
    return config


def _take_precision(config: RunConfig, ds: dict, where: str, has_bf16: bool | None) -> RunConfig:
    enabled = {name: _lookup(ds, (name, "enabled")) for name in ("bf16", "fp16")}
    if all(enabled.values()):
        raise ConfigError(f"{where}: bf16 and fp16 are both enabled")
    given = next((name for name, on in enabled.items() if on), None)
    if list(enabled.values()) == [False, False]:
        given = "fp32"
    own: str = config.training.precision
    excluded = own in enabled and enabled[own] is False
    if own != "auto" and ((given is not None and own != given) or excluded):
        raise ConfigError(
            f"training.precision: got {own}, but {where} says"
            f' {given or f"{own}.enabled: false"}; make them equal, or write "auto" there'
        )
    if own == "auto":
        own = given or ("bf16" if (_gpu_has_bf16() if has_bf16 is None else has_bf16) else "fp32")
    return config.replace("training", precision=own)


def _gpu_has_bf16() -> bool | None:
    """Return whether this machine's GPU computes in bf16 itself (DeepSpeed counts emulation), or None without one."""
    import torch
    from deepspeed.accelerator import get_accelerator

    on_gpu = get_accelerator().device_name() == "cuda"
    return torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else None


def check_device(config: RunConfig) -> None:
    """Raise ConfigError if this machine's device does not support the resolved precision."""
    from deepspeed.accelerator import get_accelerator

    has_fp16 = bool(get_accelerator().is_fp16_supported())
    supported = {"fp32": True, "bf16": _gpu_has_bf16() is not False, "fp16": has_fp16}
    if not supported[config.training.precision]:
        device = "CPU" if get_accelerator().device_name() == "cpu" else "device"
        raise ConfigError(
            f"training.precision: got {config.training.precision}, which this {device} does not support;"
            f" allowed: {', '.join(name for name, able in supported.items() if able)}"
        )


def _take_batch(config: RunConfig, ds: dict, where: str, ranks: int) -> tuple[RunConfig, BatchArithmetic]:
    accumulation = _lookup(ds, ("gradient_accumulation_steps",))
    if accumulation is not None and config.training.micro_batch == "auto":
        raise ConfigError(
            f"training.micro_batch: got auto, but {where} says gradient_accumulation_steps: {accumulation}; give a"
            ' number here, or write "auto" there'
        )
    if accumulation is not None and "global_batch" not in config.training.model_fields_set:
        config = config.replace("training", global_batch=int(config.training.micro_batch) * ranks * accumulation)
    batch = batch_arithmetic(config, ranks)
    if accumulation is not None and accumulation != batch.accumulation:
        raise ConfigError(
            f"training.global_batch: {batch.global_batch} needs {batch.accumulation} accumulation steps"
            f" ({batch}), but {where} says gradient_accumulation_steps: {accumulation}"
        )
    return config, batch


def _check_combinations(config: RunConfig, ds: dict, where: str) -> None:
    stage = zero_stage(ds)
    if config.training.precision == "fp16" and stage == 0:
        raise ConfigError(
            f"training.precision: got fp16, but {where} has ZeRO stage 0, where DeepSpeed divides by a loss scale"
            " that it never multiplied by; use bf16, fp32, or a stage from 1 to 3"
        )
    if config.model.compile and stage == 3:
        raise ConfigError(
            f"model.compile: got true, but {where} has ZeRO stage 3, whose hooks gather weights between compiled"
            " operations; use false, or a stage from 0 to 2"
        )
    for part in ("offload_optimizer", "offload_param"):
        if _lookup(ds, ("zero_optimization", part, "device")) == "nvme":
            raise ConfigError(
                f"{where}: zero_optimization.{part}.device: got 'nvme', allowed: cpu, none (checkpoints of states on"
                " NVMe are not covered by the guarantees of docs/checkpoints.md)"
            )
    if config.logging.layer_gradients and _lookup(ds, ("zero_optimization", "round_robin_gradients")):
        raise ConfigError(
            f"logging.layer_gradients: got true, but {where} has zero_optimization.round_robin_gradients, under which"
            " DeepSpeed does not say where a parameter's gradient is; use false, or remove it there"
        )
    accumulation_type = _lookup(ds, ("data_types", "grad_accum_dtype"))
    if config.training.precision == "bf16" and stage == 0 and accumulation_type not in (None, "bf16"):
        raise ConfigError(
            f"{where}: data_types.grad_accum_dtype: got {accumulation_type}; DeepSpeed's stage 0 accumulates"
            " bf16 gradients in bf16 only; remove it or use a stage from 1 to 3"
        )


def _check_json_optimizer(config: RunConfig, ds: dict, where: str) -> None:
    """Refuse an optimizer of the JSON that `optimizer.name` stands for, that stands beside another there, or that would
    not get what the run file sets."""
    name = config.optimizer.name
    if optimizer_type(ds).lower() == "muon":
        raise ConfigError(f"{where}: optimizer: got type Muon, remove it and set optimizer.name: muon in the run file")
    if name != "adamw" and "optimizer" in ds:
        raise ConfigError(f"optimizer.name: got {name}, but {where} has an optimizer of its own; remove it there")
    parameters = _lookup(ds, ("optimizer", "params")) or {}
    for key in () if is_adam(ds) else ("betas", "eps", "weight_decay"):
        value, is_given = getattr(config.optimizer, key), parameters.get(key, "auto") != "auto"
        if value != OptimizerConfig.model_fields[key].default and not is_given:
            raise ConfigError(
                f"optimizer.{key}: got {value}, which optimizer.type {optimizer_type(ds)} of {where} does not get;"
                " write it into optimizer.params there"
            )


def _check_optimizer_with_stage(config: RunConfig, ds: dict, where: str) -> None:
    """Refuse an optimizer in a set-up in which DeepSpeed would silently do something else."""
    name, spikes = config.optimizer.name, config.training.spike_deviations
    if spikes is not None and (name != "adamw" or not is_adam(ds)):
        given = f"optimizer.name is {name}" if is_adam(ds) else f"{where} has optimizer.type {optimizer_type(ds)}"
        allowed = "optimizer.name: adamw" if is_adam(ds) else "Adam or AdamW there"
        raise ConfigError(
            f"training.spike_deviations: got {spikes:g}, but {given}, whose state may move before its step is skipped;"
            f" allowed: null, or {allowed}"
        )
    stage, precision = zero_stage(ds), config.training.precision
    offloads = stage > 0 and any(is_offloaded(ds, part) for part in ("offload_optimizer", "offload_param"))
    is_bf16_optimizer = precision == "bf16" and _lookup(ds, ("data_types", "grad_accum_dtype")) == "fp32"
    if name == "muon" and stage > 0 and (stage > 1 or offloads or not is_bf16_optimizer):
        raise ConfigError(
            f"optimizer.name: got muon in {precision} with ZeRO stage {stage}"
            f"{' and offloading' if offloads else ''} ({where}), where DeepSpeed clips Muon's updates instead of"
            " the gradients; allowed: stage 0, or bf16 with stage 1, data_types.grad_accum_dtype fp32 and no offloading"
        )
    if name == "adamw-8bit" and offloads:
        raise ConfigError(f"optimizer.name: got adamw-8bit, but {where} offloads; remove the offloading, or use adamw")


def _without_auto(value: Any) -> Any:
    """Drop what is left to us or to DeepSpeed's defaults."""
    if isinstance(value, dict):
        return {key: _without_auto(part) for key, part in value.items() if part != "auto"}
    return value


def _complete(ds: dict, config: RunConfig, batch: BatchArithmetic) -> None:
    """Write the run's values where the JSON has none."""
    ds["train_batch_size"] = batch.global_batch
    ds["train_micro_batch_size_per_gpu"] = batch.micro_batch
    ds["gradient_accumulation_steps"] = batch.accumulation
    ds["gradient_clipping"] = config.optimizer.gradient_clipping
    if "optimizer" in ds:
        parameters = ds["optimizer"].setdefault("params", {})
        parameters["lr"] = config.optimizer.peak_learning_rate
        if is_adam(ds):
            parameters |= config.optimizer.model_dump(include={"betas", "eps", "weight_decay"})
    for name in ("bf16", "fp16"):
        if config.training.precision == name or name in ds:
            ds.setdefault(name, {})["enabled"] = config.training.precision == name
    ds.setdefault("checkpoint", {}).setdefault("tag_validation", "Fail")
    # DeepSpeed's own measure of throughput waits for the device twice a micro-batch, and is shown nowhere here
    ds.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)


def _check_by_deepspeed(ds: dict, batch: BatchArithmetic, where: str) -> None:
    """Let DeepSpeed read it now, rather than after the model is built."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    # before the process group is made, DeepSpeed counts one rank
    alone = ds | {"train_batch_size": batch.micro_batch * batch.accumulation * collectives.size()}
    try:
        DeepSpeedConfig(json.loads(json.dumps(alone)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        section = error.title.removeprefix("DeepSpeed").removesuffix("Config")
        raise ConfigError(f"{where}: {section}: {key}: got {first['input']!r}; {first['msg']}") from None
    except (DeepSpeedConfigError, ValueError, AssertionError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: {str(error) or type(error).__name__}".splitlines()[0]) from None
