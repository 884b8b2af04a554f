"""Write down a run's configuration and the circumstances of its start, before it begins."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from l2e_ds.data import PreparedData, PreparedText
from l2e_ds.distributed import collectives
from l2e_ds.distributed.launch import Launch
from l2e_ds.models.counts import parameter_counts
from l2e_ds.system.files import write_whole
from l2e_ds.system.provenance import commit_and_changes, versions
from l2e_ds.training.preflight import Plan


def freeze(plan: Plan, directory: Path, data: Sequence[PreparedData], is_new: bool) -> None:
    """Write configuration, DeepSpeed configuration, network and tokenizer of a run into its directory.

    is_new: whether the run begins at step 0, which replaces a tokenizer that is there already. Raises OSError.
    """
    write_whole(directory / "config.yaml", plan.config.dump())
    write_whole(directory / "deepspeed.json", json.dumps(plan.ds, indent=2) + "\n")
    write_whole(directory / "model" / "config.json", plan.network.to_json_string())
    tokenizer = next((part.tokenizer for part in data if part.tokenizer is not None), None)
    if tokenizer is not None and (is_new or not (directory / "tokenizer").exists()):
        temporary = directory / "tokenizer.tmp"
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(directory / "tokenizer", ignore_errors=True)
        temporary.rename(directory / "tokenizer")


def record_circumstances(
    plan: Plan, launch: Launch, device: Any, data: Sequence[PreparedData], texts: Sequence[PreparedText]
) -> dict[str, Any]:
    """Return the values of the line `kind: start` (docs/metrics.md), without `guard` and `changes`. Collective."""
    sets = {
        part.name: {"weight": part.weight, "train_tokens": part.train_tokens, "held_out_tokens": part.held_out_tokens}
        for part in data
        if part.name
    }
    sizes = {
        text.name: {
            "tokens": text.dataset.num_tokens,
            "evaluated_tokens": text.evaluated_tokens,
            "bytes": text.num_bytes,
        }
        for text in texts
    }
    commit, changes = commit_and_changes() if collectives.is_main() else (None, [])
    return {
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "git": {"commit": commit, "changed": bool(changes)},
        "host": platform.node(),
        "hosts": len(set(collectives.all_gather_objects(platform.node()))),
        "cores": os.cpu_count(),
        "gpus": torch.cuda.device_count(),
        "ranks": collectives.size(),
        "launcher": launch.launcher,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "parameters": parameter_counts(plan.network)[0],
        "train_tokens": sum(part.train_tokens or 0 for part in data),
        "held_out_tokens": sum(part.held_out_tokens for part in data),
        **({"sets": sets} if sets else {}),
        "versions": versions("l2e_ds", "python", "torch", "deepspeed", "transformers"),
        **({"texts": sizes} if sizes else {}),
    }
