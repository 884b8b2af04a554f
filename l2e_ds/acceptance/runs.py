"""Parts of an acceptance that start real runs, each a process of its own: speed, resume, equalities, micro-batch."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import yaml

from l2e_ds.acceptance.outcome import Outcome, Results, Scale
from l2e_ds.acceptance.waits import run_module
from l2e_ds.checkpoint.weights import checkpoint_weights, find_checkpoint
from l2e_ds.run_directory.json_lines import json_lines

GOALS = {"410m": 0.45, "1.4b": 0.5}  # goals for MFU on one H100 or H200; not yet measured


def _run_file(scale: Scale, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a run of a Pythia shape on this machine's standard library, with L2E from the first step on."""
    on_gpu = scale.on_gpu
    content: dict[str, dict[str, Any]] = {
        "model": {"name": f"pythia-{name}"},
        "data": {"source": "stdlib", "train_tokenizer": 4096 if on_gpu else 300, "held_out": 0.05},
        "optimizer": {"peak_learning_rate": 1e-3, "schedule_steps": 100},
        "training": {"steps": 4, "global_batch": 16 if on_gpu else 4, "micro_batch": 2, "precision": "fp32"},
        "inhibition": {"guard": "off"},
        "deepspeed": {"config": "ds_configs/zero1.json"},
        "checkpoint": {"every": 0},
        "logging": {"every": 2, "progress": False},
    }
    content["data"] |= {"sequence_length": 2048 if on_gpu else 64, "max_tokens": 4_000_000 if on_gpu else 60_000}
    content["training"] |= {"evaluate_every": 0, "evaluation_sequences": 4}
    if not on_gpu:
        content["model"] |= {"vocab_size": 300, "num_layers": 4, "hidden_size": 32, "num_heads": 2}
    for key, section in sections.items():
        content[key] |= section
    return content


def _written(folder: Path, name: str, content: dict[str, Any]) -> Path:
    """Write a run file and return its path."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def train(folder: Path, name: str, content: dict[str, Any], *overrides: str) -> list[dict[str, Any]]:
    """Train in a process of its own, in `folder / name`, and return the lines of its metrics. Raises L2EError."""
    run_file, directory = _written(folder, name, content), folder / name
    places = [f"training.run_directory={directory}", f"data.cache={folder / 'data'}"]
    run_module("l2e_ds.train", str(run_file), *places, *overrides)
    return [line.value for line in json_lines(directory / "metrics.jsonl")]


def _last(lines: list[dict[str, Any]], kind: str = "train") -> dict[str, Any]:
    return [line for line in lines if line["kind"] == kind][-1]


def settings(scale: Scale, folder: Path) -> Outcome:
    """Train the same global batches in several ways, in float32, and compare loss and gradient norm of the last step.

    Under the published loss, whose numbers do not depend on the micro-batch. Float32 sums in another order differ by
    some 1e-7 of their value, which four steps amplify, and the few activations near the threshold by more; a wrong
    scale or a lost gradient changes both by percents. TF32 is off, as PyTorch has it by default.
    """
    ways = {
        "ZeRO-1": "deepspeed.config=ds_configs/zero1.json",
        "ZeRO-3": "deepspeed.config=ds_configs/zero3.json",
        "not-accumulated": "training.micro_batch=4",
    }
    if scale.on_gpu:
        ways |= {
            "ZeRO-2": "deepspeed.config=ds_configs/zero2.json",
            "recomputed": "model.activation_checkpointing=true",
            "plain-operations": "inhibition.fused=false",
            "compiled": "model.compile=true",
        }
    published = {"loss": "published", "coefficient": 1e-3}
    content = _run_file(scale, "14m", training={"global_batch": 4}, inhibition=published)
    content["data"]["sequence_length"] = 512 if scale.on_gpu else 64
    reference: dict[str, Any] = {}
    largest = 0.0
    for name, override in ways.items():
        found = _last(train(folder, name, content, override))
        reference = reference or found
        for key in ("lm_loss", "gradient_norm"):
            largest = max(largest, abs(found[key] / reference[key] - 1))
    return Outcome(largest < 1e-4, {"ways": float(len(ways)), "largest relative difference": largest})


def resume(scale: Scale, folder: Path) -> Outcome:
    """Train four steps at once, and two and two after a restart; the weights must be the same bit for bit."""
    precision = "bf16" if scale.on_gpu else "fp32"
    training = {"deterministic": True, "precision": precision}
    content = _run_file(scale, "70m" if scale.on_gpu else "14m", training=training)
    train(folder, "at-once", content)
    train(folder, "in-two", content, "training.steps=2")
    train(folder, "in-two", content)
    one, two = (checkpoint_weights(find_checkpoint(folder / run, 4), precision) for run in ("at-once", "in-two"))
    same = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    return Outcome(same, {"tensors": float(len(one))}, "" if same else "weights differ")


def steps(scale: Scale, folder: Path) -> Outcome:
    """Time whole steps, compiled as the recipes are, with and without inhibition: tokens a second, MFU, memory. Fails
    where an H100 or H200 stays below GOALS."""
    results: Results = {}
    passed: bool | None = None
    name = torch.cuda.get_device_name(scale.device) if scale.on_gpu else ""
    for model in scale.models:
        for label, section in (("", {}), (" without L2E", {"method": "none"})):
            training = {"steps": 12 if scale.on_gpu else 2, "precision": "bf16" if scale.on_gpu else "fp32"}
            if scale.on_gpu:
                training |= {"micro_batch": 16 if model != "1.4b" else 8}
            content = _run_file(scale, model, training=training, inhibition=section)
            content["model"]["compile"] = scale.on_gpu
            content["logging"]["every"] = 6 if scale.on_gpu else 1
            found = _last(train(folder, f"{model}{label}".replace(" ", "-"), content))
            results[f"{model}{label} tokens/s"] = found["tokens_per_second"]
            if found.get("mfu") is not None:
                results[f"{model}{label} MFU"] = found["mfu"]
                if re.search(r"\bH[12]00\b", name):
                    passed = passed is not False and found["mfu"] >= GOALS.get(model, 0.0)
            results[f"{model}{label} GiB"] = found["peak_memory_gib"]
    return Outcome(passed, results)


def waits(scale: Scale, folder: Path) -> Outcome:
    """Count what a step of two micro-batches launches; it may read DeepSpeed's three values and not wait otherwise."""
    training = {"global_batch": 4, "precision": "bf16" if scale.on_gpu else "fp32"}
    content = _run_file(scale, "70m" if scale.on_gpu else "14m", training=training)
    printed = run_module("l2e_ds.acceptance.waits", str(_written(folder, "waits", content)))
    found = json.loads(printed.splitlines()[-1])
    return Outcome(found["synchronisations"] == 0 and found["reads"] <= 3, {**found})


def automatic(scale: Scale, folder: Path) -> Outcome:
    """Let a run find its micro-batch, and evaluate with it: the largest that trains must also evaluate."""
    model = "410m" if scale.on_gpu else "14m"
    training = {"micro_batch": "auto", "steps": 2, "evaluate_every": 2}
    training |= {"precision": "bf16", "global_batch": 128} if scale.on_gpu else {}
    lines = train(folder, "auto", _run_file(scale, model, training=training))
    loss = _last(lines, "evaluation")["held_out_loss"]
    chosen = yaml.safe_load((folder / "auto" / "config.yaml").read_text())["training"]["micro_batch"]
    return Outcome(math.isfinite(loss), {f"{model} micro-batch": float(chosen)})


PARTS = {"settings": settings, "resume": resume, "steps": steps, "waits": waits, "auto": automatic}
"""The function of each part of `l2e-ds accept` that needs the scale and a folder to train in."""
