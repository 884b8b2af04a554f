"""Find a run's checkpoint and read its weights, whatever ZeRO stage wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from l2e_ds.checkpoint.manager import read_state
from l2e_ds.checkpoint.shards import Shards, read_shard
from l2e_ds.errors import CheckpointError
from l2e_ds.run_directory.manifest import complete_checkpoints, verify
from l2e_ds.run_directory.names import is_checkpoint, step_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROVENANCE = "l2e_run.yaml"  # a file of the exported folder: step, tokens, configuration
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_checkpoint(path: Path, step: int | None) -> Path:
    """Return the checkpoint that a run directory (its newest, or that of `step`) or a folder means. Raises
    CheckpointError."""
    instead = ""
    if (path / "checkpoints").is_dir():
        complete = {step_of(checkpoint): checkpoint for checkpoint in complete_checkpoints(path)}
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
    """Return the full weights by name in `precision`, on the CPU; in the run's own, those that the engine computed
    with. Raises CheckpointError where there are none."""
    identity = read_state(checkpoint)["identity"]
    if identity["zero_stage"] <= 2 and precision == identity["precision"]:
        weights = read_shard(checkpoint / "mp_rank_00_model_states.pt")["module"]
    elif identity["zero_stage"] == 0:
        raise CheckpointError(
            f"--precision: {checkpoint} holds {identity['precision']} weights only (ZeRO stage 0 keeps one copy);"
            f" allowed: {identity['precision']}"
        )
    else:
        shards = Shards(checkpoint, [])
        weights = {
            name: shards.read(name, "fp32", 0, shape.numel()).view(shape) for name, shape in shards.shapes.items()
        }
    return {name: tensor.to(DTYPES[precision]) for name, tensor in weights.items()}


def load_network(checkpoint: Path, precision: str | None = None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the network of a verified checkpoint, on the CPU, and the checkpoint's state (`state.json`). precision:
    default: the run's, with which logits equal the engine's. Raises CheckpointError."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    state = read_state(checkpoint)
    precision = precision or state["identity"]["precision"]
    run_directory = checkpoint.parent.parent
    if not (run_directory / "model" / "config.json").is_file():
        raise CheckpointError(f"{run_directory / 'model'}: the network's config.json is missing")
    network = AutoConfig.from_pretrained(run_directory / "model")
    network.use_cache = True
    with no_init_weights():  # all are loaded below
        model = AutoModelForCausalLM.from_config(network, dtype=DTYPES[precision])
    weights = checkpoint_weights(checkpoint, precision)
    for name, parameter in model.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            raise CheckpointError(f"{checkpoint}: {name} is missing, or not as {run_directory / 'model'} says")
    model.load_state_dict(weights, strict=False, assign=True)  # but for buffers, made above
    model.tie_weights()  # assigning has untied the embedding from the output matrix, if they were one
    return model, state
