"""Check a run file, its data and this machine, before any process group or model is made."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2e_ds.checkpoint.disk import checkpoint_bytes, disk_space, moment_bytes
from l2e_ds.config.batch import BatchArithmetic, divisors
from l2e_ds.config.reading import load_run_config
from l2e_ds.config.sections import RunConfig
from l2e_ds.console import aligned
from l2e_ds.data import check_sets, check_texts
from l2e_ds.data.tokenizer import load_tokenizer
from l2e_ds.engine.configuration import check_device, is_adam, resolve, zero_stage
from l2e_ds.engine.schedule import schedule_of
from l2e_ds.errors import ConfigError, L2EError
from l2e_ds.evaluation.generate import encode_samples
from l2e_ds.models.counts import layer_matrix_parameters, parameter_counts
from l2e_ds.models.families import neurons_of
from l2e_ds.models.pythia import network_config
from l2e_ds.models.sites import chosen_layers
from l2e_ds.run_directory.names import published_checkpoints
from l2e_ds.system.installed import check_extra, is_installed
from l2e_ds.training import micro_batch


@dataclass(frozen=True)
class ResolvedRun:
    """Holds a checked run: the resolved DeepSpeed configuration, the batch (with micro-batch 1 if that is `auto`), the
    Hugging Face configuration of the network and the numbers of the layers in `inhibition.layers`."""

    config: RunConfig
    ds: dict
    batch: BatchArithmetic
    hf_config: Any
    layers: list[int]

    @property
    def inhibited_layers(self) -> list[int]:
        """The numbers of the layers that are inhibited: none with `inhibition.method: none`."""
        return self.layers if self.config.inhibition.method != "none" else []


def preflight(run_file: str | Path, overrides: Sequence[str], ranks: int, this_machine: bool = False) -> ResolvedRun:
    """Check a run, and with `this_machine` whether this machine can do it, without writing anything or making a process
    group or a model. The arguments are those of `load_run_config`. Raises ConfigError and DataError."""
    run = resolve_run(run_file, overrides, ranks)
    if this_machine:
        check_device(run.config)
        _check_machine(run)
    try:
        check_sets(run.config.data, run.hf_config.vocab_size)
        check_texts(run.config.evaluation.texts or [], run.config.data)
        if run.config.evaluation.samples and run.config.data.tokenizer is not None:
            encode_samples(run.config.evaluation, load_tokenizer(run.config.data.tokenizer), run.hf_config)
    except L2EError as error:
        error.on_every_rank = True
        raise
    return run


def resolve_run(
    run_file: str | Path, overrides: Sequence[str], ranks: int, has_bf16: bool | None = None
) -> ResolvedRun:
    """Return what `preflight` does, without a look at the data or the machine. has_bf16: whether the run's device
    computes in bf16 (default: whether this machine's does). Raises ConfigError."""
    if ranks < 1:
        raise ConfigError(f"--ranks: got {ranks}, allowed: an integer >= 1")
    return resolve_config(load_run_config(run_file, overrides), ranks, run_file, has_bf16)


def resolve_config(
    config: RunConfig, ranks: int, run_file: str | Path | None = None, has_bf16: bool | None = None
) -> ResolvedRun:
    """Return what `resolve_run` does of a run file that has been read. Raises ConfigError."""
    hf_config = network_config(config.model, config.data.sequence_length)
    config, ds, batch = resolve(config, ranks, run_file, has_bf16)
    layers = chosen_layers(config.inhibition.layers, hf_config.num_hidden_layers)
    _check_guard(config)
    longest = getattr(hf_config, "max_position_embeddings", None)  # None: any length (ALiBi)
    if longest is not None and config.data.sequence_length > longest:
        raise ConfigError(
            f"data.sequence_length: got {config.data.sequence_length}, {config.model.origin} takes at most {longest}"
        )
    if longest is not None and config.evaluation.samples and config.evaluation.sample_tokens >= longest:
        raise ConfigError(
            f"evaluation.sample_tokens: got {config.evaluation.sample_tokens}, allowed: below {longest}, which"
            f" {config.model.origin} takes with the prompt"
        )
    return ResolvedRun(config, ds, batch, hf_config, layers)


def _check_guard(config: RunConfig) -> None:
    """Check that a guard that stops the run has what it judges by. Raises ConfigError.

    It is not among the checks of the sections, so that a run from before this check can still be read.
    """
    section = config.inhibition
    if section.guard != "stop" or section.method == "none" or 0 in (section.strength, section.coefficient):
        return
    if not config.training.evaluate_every:
        raise ConfigError(
            "training.evaluate_every: got 0 with inhibition.guard: stop, which judges by held-out evaluations;"
            " allowed: an integer > 0"
        )
    if not any(part.held_out for _, _, part in config.data.all_sets()):
        raise ConfigError("data.held_out: got 0 with inhibition.guard: stop, allowed: a number > 0")


def _check_machine(run: ResolvedRun) -> None:
    """Check that this machine has what the run needs other than its device. Raises ConfigError."""
    config = run.config
    directory = Path(config.training.run_directory)
    for folder in (directory, directory / "checkpoints"):
        place = _nearest("training.run_directory", folder)
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise ConfigError(f"training.run_directory: cannot write below {place}")
    _nearest("data.cache", config.data_cache)
    resume = Path(config.training.resume)
    is_elsewhere = config.training.resume not in ("auto", "never") and not published_checkpoints(directory)
    if is_elsewhere and not resume.is_dir():
        raise ConfigError(f"training.resume: no such folder: {resume}; allowed: auto, never, a run or a checkpoint")
    if config.model.attention == "flash_attention_2" and not is_installed("flash_attn"):
        raise ConfigError("model.attention: got flash_attention_2, but the package flash-attn is not installed")
    if config.optimizer.name == "adamw-8bit" and not is_installed("bitsandbytes"):
        raise ConfigError("optimizer.name: got adamw-8bit, which needs bitsandbytes: pip install bitsandbytes")
    if config.evaluation.every:
        check_extra("evaluation.every", "eval", ["lm_eval"])
    for key, package in (("tensorboard", "tensorboard"), ("wandb_project", "wandb")):
        if getattr(config.logging, key):
            check_extra(f"logging.{key}", "monitor", [package])


def _nearest(key: str, folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists. Raises ConfigError for what cannot be a folder."""
    for place in (folder, *folder.absolute().parents):
        try:
            place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ConfigError(f"{key}: {place}: {error.strerror}") from None
        break
    if not place.exists():
        raise ConfigError(f"{key}: {place} is a link to {os.readlink(place)}, which is not there")
    most = os.pathconf(place, "PC_NAME_MAX")
    if any(len(os.fsencode(part)) > most for part in folder.parts):
        raise ConfigError(f"{key}: {folder}: {os.strerror(errno.ENAMETOOLONG)}")
    return place


def describe(run: ResolvedRun) -> str:
    """Return what `--dry-run` prints."""
    run_file, ds = run.config.dump(), json.dumps(run.ds)
    return f"# resolved configuration\n{run_file}\n# DeepSpeed configuration\n{ds}\n\n{aligned(summary_rows(run))}"


def summary_rows(run: ResolvedRun) -> list[tuple[str, str]]:
    """Return the rows of the summary that is printed before a run: label and value."""
    config, hf_config, section = run.config, run.hf_config, run.config.inhibition
    batch = _unfound_batch(run) if config.training.micro_batch == "auto" else str(run.batch)
    total, rest = parameter_counts(hf_config)
    neurons = neurons_of(hf_config)
    tokens = run.batch.tokens_per_step * config.training.steps
    sets = config.data.all_sets()
    total_weight = sum(weight for _, weight, _ in sets)
    mixture = ", ".join(f"{name} {weight / total_weight:.2%}" for name, weight, _ in sets if name)
    what = "none (no inhibition; observed at evaluation)"
    if section.method != "none":
        what = f"{section.method} ({' + '.join(section.retrieval_and_mechanism)}) from step"
        what += f" {section.steps_of('start', config.training.steps):,}"
        for name, value in (("strength", section.strength), ("coefficient", section.coefficient)):
            what += f", {section.loss} loss at {name} {value:g}" if value is not None else ""
    return [
        ("model", f"{config.model.origin}: {hf_config.num_hidden_layers} layers x {hf_config.hidden_size}"),
        ("parameters", f"{total:,} ({rest:,} without embeddings)"),
        *([("mixture", mixture)] if mixture else []),
        ("batch", batch),
        ("run", f"{config.training.steps:,} steps, {tokens:,} tokens"),
        *_optimizer(config),
        ("rate", str(schedule_of(config))),
        ("precision", f"{config.training.precision}, ZeRO {zero_stage(run.ds)}"),
        ("method", what),
        ("layers", f"{', '.join(map(str, run.layers))} of 0-{hf_config.num_hidden_layers - 1}"),
        ("neurons", f"{len(run.layers)} x {neurons:,} = {len(run.layers) * neurons:,}"),
        *checkpoints_of(run),
    ]


def _optimizer(config: RunConfig) -> list[tuple[str, str]]:
    """Return the summary row of the optimizer, or none for AdamW."""
    section = config.optimizer
    peak = f" (peak {section.muon_learning_rate:g} for the matrices of the layers)"
    return [] if section.name == "adamw" else [("optimizer", section.name + (peak if section.name == "muon" else ""))]


def checkpoint_size(run: ResolvedRun) -> int:
    """Return the bytes of one checkpoint, if `is_adam`."""
    inhibited = len(run.inhibited_layers)
    element = 4 if run.config.training.precision == "fp32" else 2
    parameters, neurons = parameter_counts(run.hf_config)[0], neurons_of(run.hf_config)
    return checkpoint_bytes(parameters, moments_of(run), zero_stage(run.ds), element, inhibited, neurons)


def moments_of(run: ResolvedRun) -> int:
    """Return the bytes of the optimizer's moments, if `is_adam`."""
    name = run.config.optimizer.name
    matrices = layer_matrix_parameters(run.hf_config) if name == "muon" else 0
    return moment_bytes(name, parameter_counts(run.hf_config)[0], matrices)


def checkpoints_of(run: ResolvedRun) -> list[tuple[str, str]]:
    """Return the summary rows on the disk space of checkpoints; none if the size of the optimizer's state is not
    known."""
    if not is_adam(run.ds):
        return []
    line, warning = disk_space(run.config, checkpoint_size(run))
    return [("checkpoints", line), *([("warning", warning)] if warning else [])]


def _unfound_batch(run: ResolvedRun) -> str:
    """Return what a dry run can say of the batch with `training.micro_batch: auto`."""
    path, batch = Path(run.config.training.run_directory) / micro_batch.FILE, run.batch
    about = micro_batch.circumstances(run.config, run.ds, batch.ranks)
    number, problem = micro_batch.remembered(path, about, divisors(batch.global_batch // batch.ranks))
    found = f"{number}, if the devices are those of {path}"
    if number is None:
        found = f"found at the start, because {path} {problem}" if problem else "found at the start"
    return (
        f"{batch.global_batch} sequences; {batch.tokens_per_step:,} tokens a step; micro-batch auto: {found} (1 in what"
        " is printed above)"
    )
