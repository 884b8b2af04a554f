"""`l2e-ds export`: a checkpoint becomes a folder that transformers loads.

Reads finished checkpoints only; needs no process group. DeepSpeed's shards are pickles: export only checkpoints
from a source you trust.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from l2e_ds.errors import CheckpointError
from l2e_ds.training.checkpoint import NAME, CheckpointManager, check_manifest, read_state

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_checkpoint(path: Path, step: int | None) -> Path:
    """The checkpoint meant by a run directory (its newest, or the one of `step`) or a checkpoint's folder.

    Raises CheckpointError.
    """
    if (path / "checkpoints").is_dir():
        complete = CheckpointManager(path).complete()
        if step is not None:
            complete = [c for c in complete if c.name == f"step{step:08d}"]
        if not complete:
            present = ", ".join(str(int(c.name[4:])) for c in CheckpointManager(path).complete()) or "none"
            wanted = f"step {step}" if step is not None else "complete checkpoint"
            raise CheckpointError(f"{path}: has no {wanted}; complete steps: {present}")
        return complete[-1]
    if not path.is_dir() or not NAME.fullmatch(path.name):
        raise CheckpointError(f"{path}: is neither a run directory nor one of its checkpoints")
    if step is not None:
        raise CheckpointError(f"--step: goes with a run directory, {path} is a checkpoint")
    problem = check_manifest(path)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    return path


def checkpoint_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Full float32 weights by name, put together from the shards by DeepSpeed; on the CPU."""
    if read_state(checkpoint)["identity"]["zero_stage"] == 0:
        # written by this project and listed in its manifest; DeepSpeed stores more than tensors in it
        state = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return {name: tensor.float() for name, tensor in state["module"].items()}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):  # it narrates
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)


def export(source: Path, output: Path, step: int | None = None, precision: str | None = None) -> dict[str, Any]:
    """Write the model and tokenizer of a run or checkpoint to `output`.

    precision: of the written weights; default: the run's, with which logits equal the engine's. Returns step,
    precision, parameters, and whether there was a tokenizer. Raises CheckpointError.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoint = find_checkpoint(source, step)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"--output: {output} exists and is not an empty folder")
    state = read_state(checkpoint)
    precision = precision or state["identity"]["precision"]
    run_directory = checkpoint.parent.parent
    if not (run_directory / "model" / "config.json").is_file():
        raise CheckpointError(f"{run_directory / 'model'}: the network's config.json is missing")
    network = AutoConfig.from_pretrained(run_directory / "model")
    network.use_cache = True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(network, dtype=DTYPES[precision])
    weights = {name: tensor.to(DTYPES[precision]) for name, tensor in checkpoint_weights(checkpoint).items()}
    expected = {name for name, _ in model.named_parameters()}
    if expected - weights.keys():
        raise CheckpointError(f"{checkpoint}: lacks the weights {', '.join(sorted(expected - weights.keys())[:3])}")
    model.load_state_dict(weights, strict=False, assign=True)  # buffers are not in the checkpoint

    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    has_tokenizer = (run_directory / "tokenizer").is_dir()
    if has_tokenizer:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(run_directory / "tokenizer").save_pretrained(temporary)
    provenance = {"step": state["train"]["step"], "tokens": state["train"]["tokens"], "config": state["config"]}
    (temporary / "l2e_run.yaml").write_text(yaml.safe_dump(provenance, sort_keys=False), encoding="utf-8")
    if output.exists():
        output.rmdir()
    temporary.rename(output)
    return {
        "step": state["train"]["step"],
        "precision": precision,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokenizer": has_tokenizer,
    }
