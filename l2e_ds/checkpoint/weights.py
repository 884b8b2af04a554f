"""Finds a run's checkpoint and reads its weights, whatever ZeRO stage wrote them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from l2e_ds.checkpoint.manager import CheckpointManager, read_state
from l2e_ds.errors import CheckpointError
from l2e_ds.models.network import without_default_init
from l2e_ds.run_directory.manifest import verify
from l2e_ds.run_directory.names import is_checkpoint, step_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROVENANCE = "l2e_run.yaml"  # in the exported folder: step, tokens, configuration
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_checkpoint(path: Path, step: int | None) -> Path:
    """Return the checkpoint meant by a run directory (its newest, or the one of `step`) or a checkpoint's folder.

    Raises CheckpointError.
    """
    instead = ""
    if (path / "checkpoints").is_dir():
        complete = {step_of(checkpoint): checkpoint for checkpoint in CheckpointManager(path).complete()}
        wanted = max(complete, default=-1) if step is None else step
        if wanted not in complete:
            present = ", ".join(map(str, complete)) or "none"
            raise CheckpointError(
                f"{path}: has no {'complete checkpoint' if step is None else f'step {step}'}; complete steps: {present}"
            )
        path = complete.pop(wanted)
        instead = f"; other steps, to be given as --step: {', '.join(map(str, complete))}" if complete else ""
    elif not path.is_dir() or not is_checkpoint(path):
        raise CheckpointError(f"{path}: is neither a run directory nor one of its checkpoints")
    elif step is not None:
        raise CheckpointError(f"--step: goes with a run directory, {path} is a checkpoint")
    problem = verify(path)  # before anything of it is unpickled
    if problem:
        raise CheckpointError(f"{path}: {problem}{instead}")
    return path


def checkpoint_weights(checkpoint: Path, precision: str) -> dict[str, torch.Tensor]:
    """Full weights by name in `precision`, on the CPU, put together from the shards.

    In the run's own precision these are the very weights that the engine computed with; in float32 its master weights.
    """
    identity = read_state(checkpoint)["identity"]
    if identity["zero_stage"] <= 2 and precision == identity["precision"]:
        weights = _read(checkpoint / "mp_rank_00_model_states.pt")["module"]
    elif identity["zero_stage"] == 0:
        raise CheckpointError(
            f"--precision: {checkpoint} holds {identity['precision']} weights only (ZeRO stage 0 keeps one copy);"
            f" allowed: {identity['precision']}"
        )
    elif identity["zero_stage"] == 1 and _is_of_bf16_optimizer(checkpoint):
        weights = _master_weights_of_bf16_optimizer(checkpoint)
    else:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it narrates
            weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return {name: tensor.to(DTYPES[precision]) for name, tensor in weights.items()}


def _read(shard: Path) -> dict[str, Any]:
    """Return a shard of ours, listed in its manifest; DeepSpeed stores more than tensors in it."""
    return torch.load(shard, map_location="cpu", weights_only=False, mmap=True)


def _is_of_bf16_optimizer(checkpoint: Path) -> bool:
    shard = checkpoint / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    return shard.exists() and "zero_stage" not in _read(shard)["optimizer_state_dict"]


def _master_weights_of_bf16_optimizer(checkpoint: Path) -> dict[str, torch.Tensor]:
    """ZeRO-1 with bf16 and float32 accumulation, which DeepSpeed's own zero_to_fp32 does not read: each rank holds a
    flat float32 part of each parameter group, and says which slice of it belongs to which parameter."""
    shapes = {
        name: shape
        for group in _read(checkpoint / "mp_rank_00_model_states.pt")["param_shapes"]
        for name, shape in group.items()
    }
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name in shapes}
    shards = checkpoint.glob("bf16_zero_pp_rank_*_optim_states.pt")
    for shard in sorted(shards, key=lambda path: int(path.name.split("_")[4])):  # by rank
        state = _read(shard)["optimizer_state_dict"]
        groups = zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True)
        for flat, slices in groups:
            for name, piece in slices.items():
                pieces[name].append(flat.narrow(0, piece.start, piece.numel))
    return {name: torch.cat(pieces[name]).view(shape) for name, shape in shapes.items()}


def load_network(checkpoint: Path, precision: str | None = None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the network of a verified checkpoint, on the CPU, and the checkpoint's state (`state.json`).

    precision: of the weights; default: the run's, with which logits equal the engine's. Raises CheckpointError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    state = read_state(checkpoint)
    precision = precision or state["identity"]["precision"]
    run_directory = checkpoint.parent.parent
    if not (run_directory / "model" / "config.json").is_file():
        raise CheckpointError(f"{run_directory / 'model'}: the network's config.json is missing")
    network = AutoConfig.from_pretrained(run_directory / "model")
    network.use_cache = True
    with without_default_init():
        model = AutoModelForCausalLM.from_config(network, dtype=DTYPES[precision])
    weights = checkpoint_weights(checkpoint, precision)
    expected = {name for name, _ in model.named_parameters()}
    if expected - weights.keys():
        raise CheckpointError(f"{checkpoint}: lacks the weights {', '.join(sorted(expected - weights.keys())[:3])}")
    wrong = [name for name, p in model.named_parameters() if p.shape != weights[name].shape]
    if wrong:
        raise CheckpointError(f"{checkpoint}: {wrong[0]} is of another shape than {run_directory / 'model'} says")
    model.load_state_dict(weights, strict=False, assign=True)  # but for buffers, made above
    model.tie_weights()  # assigning has parted an embedding from the output matrix that it is
    return model, state
