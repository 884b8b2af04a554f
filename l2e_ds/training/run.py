"""Train a run, from the process group to the last step; its run file has been checked before."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from l2e_ds.checkpoint.manager import CheckpointManager, open_checkpoints
from l2e_ds.console import aligned, say
from l2e_ds.data import PreparedData, PreparedText, prepare_sets, prepare_texts, tokenizer_of
from l2e_ds.data.tokenizer import take_special_tokens
from l2e_ds.distributed import collectives, heartbeat, process_group
from l2e_ds.distributed.launch import Launch
from l2e_ds.distributed.watchdog import Watchdog
from l2e_ds.engine.configuration import memory_remedies, with_micro_batch
from l2e_ds.errors import ConfigError, DataError, OutOfMemory
from l2e_ds.models.counts import parameter_counts
from l2e_ds.run_directory.lock import RunLock
from l2e_ds.system.files import one_line, write_whole
from l2e_ds.system.memory import is_out_of_memory, keep_freed_memory
from l2e_ds.system.provenance import commit_and_changes, utc_now, versions
from l2e_ds.training import micro_batch, preemption
from l2e_ds.training.held_out import load_samples
from l2e_ds.training.preflight import ResolvedRun, summary_rows
from l2e_ds.training.task_evaluation import load_tasks_of, task_evaluation
from l2e_ds.training.trainer import RunData, Trainer, is_finished


def train(run: ResolvedRun, launch: Launch) -> None:
    """Join the other ranks, train what is left of the run, and leave. Collective. Raises an L2EError of any kind."""
    config = run.config
    directory = Path(config.training.run_directory)
    with Watchdog(config.training.timeout) as watchdog:
        device = process_group.join(launch, config.training.timeout)
        watchdog.meet()
        preemption.watch(directory, config.training.time_limit)
        lock = RunLock(directory)  # no other run may write there
        collectives.run_on_all(lambda: lock.acquire() if collectives.is_main() else None)
        watchdog.at_every_interval = partial(_renew_or_end, lock)
        try:
            checkpoints = open_checkpoints(config)  # first, as a refused or finished run must stay as it is
            if not collectives.broadcast_object(is_finished(config, checkpoints)):
                _train_on(run, launch, device, checkpoints)
            elif collectives.is_main():
                say(f"nothing to do: {checkpoints.resume_from} is there, training.steps is {config.training.steps}")
        finally:
            lock.release()
    process_group.leave()


def _renew_or_end(lock: RunLock) -> None:
    """Renew the lock, as a sign of life, but end this process if another run holds it by now: both would write."""
    if lock.is_taken():
        say(f"l2e-ds: error: another run has taken {lock.path}, as this one gave no sign of life: it was frozen")
        os._exit(ConfigError.exit_code)
    lock.renew()


def _prepare(run: ResolvedRun) -> tuple[list[PreparedData], list[PreparedText]]:
    """Prepare the sets and texts of a run, and say how much of each text is evaluated. Collective."""
    config = run.config

    def prepare() -> tuple[list[PreparedData], list[PreparedText]]:
        cache = config.data_cache
        evaluated = config.training.evaluation_sequences
        sets = prepare_sets(config.data, cache, run.hf_config.vocab_size, evaluated)
        tokenizer = config.data.tokenizer or f"{sets[0].directory}/tokenizer"  # the latter was trained on the data
        texts = config.evaluation.texts or []
        return sets, prepare_texts(texts, config.data, tokenizer, cache, run.hf_config.vocab_size)

    heartbeat.progress("data preparation")
    found = collectives.run_on_main(prepare, preemption.stop_if_asked)
    sets, texts = collectives.run_on_all(lambda: found or prepare())  # the other ranks find the files on disk
    _check_same_on_all(sets, texts)
    for text in texts if collectives.is_main() else ():
        rest = text.dataset.num_tokens - 1 - text.evaluated_tokens
        say(
            f"text {text.name}: {text.dataset.num_tokens:,} tokens of {text.num_bytes:,} bytes, of which"
            f" {text.evaluated_tokens:,} are evaluated; {rest:,} at the end are too few for one more sequence"
        )
    return sets, texts


def _with_found_micro_batch(run: ResolvedRun, launch: Launch, device: Any) -> tuple[ResolvedRun, str | None]:
    """Return the run with a number in place of `micro_batch: auto`, and what is to be remembered of it. Collective."""
    if run.config.training.micro_batch != "auto":
        return run, None
    number, record = micro_batch.find(run.config, run.ds, run.hf_config, device)
    config, ds, batch = with_micro_batch(run.config, run.ds, number, launch.size)
    return replace(run, config=config, ds=ds, batch=batch), record


def _train_on(run: ResolvedRun, launch: Launch, device: Any, checkpoints: CheckpointManager) -> None:
    """Find the micro-batch, prepare the data, build everything, and train. Collective.

    In the order of what can fail soon: a wrong name, a network that does not fit, the data, which may take hours.
    """
    heartbeat.progress("loading evaluation tasks")
    tasks = load_tasks_of(run.config)
    run, record = _with_found_micro_batch(run, launch, device)
    config, directory = run.config, Path(run.config.training.run_directory)
    if device.type == "cpu":
        keep_freed_memory()  # after the search for a micro-batch, which measures what each size takes
    sets, texts = _prepare(run)
    for part in sets:
        if part.tokenizer is not None:
            take_special_tokens(run.hf_config, part.tokenizer)
    samples = collectives.run_on_all(lambda: load_samples(config, run.hf_config, sets))
    data = RunData(sets, texts, samples, task_evaluation(config, tasks, sets))
    heartbeat.progress("building the model")
    trainer, begun = None, 0
    try:
        with Trainer(run, data, device, checkpoints) as trainer:
            begun = trainer.state.step
            if collectives.is_main():
                # Only now, as a refused resume must leave the run as it was.
                _write_run_files(run, directory, sets, trainer.is_new)
                if record is not None:
                    write_whole(directory / micro_batch.FILE, record)
            about = _start_values(run, launch, device, data)
            about |= {"guard": config.inhibition.guard} if trainer.is_guarded else {}
            about |= {"changes": trainer.changes} if trainer.changes else {}
            trainer.metrics.write("start", trainer.state.step, about)
            if collectives.is_main():
                _say_what_begins(run, about, trainer)
            trainer.train()
        if collectives.is_main():
            name = shlex.quote(str(directory))
            say(f"the run is complete; what it gave: l2e-ds summary {name}   (or: report, evaluate, analyze, export)")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise _too_little_memory(run, error, has_fitted=trainer is not None and trainer.state.step > begun) from error


def _check_same_on_all(sets: Sequence[PreparedData], texts: Sequence[PreparedText]) -> None:
    """Raise DataError on all ranks unless all found the same sequences. Collective.

    Rank 0 prepares them, which may take hours; if the text changes meanwhile, the others would prepare it anew.
    """
    datasets = [dataset for part in sets for dataset in (part.train, part.held_out)]
    datasets += [text.dataset for text in texts]
    own = [dataset.fingerprint() for dataset in datasets if dataset is not None]
    found = collectives.all_gather_objects(own)
    others = [rank for rank, one in enumerate(found) if one != found[0]]
    if others:
        error = DataError(
            f"rank {others[0]} reads other text than rank 0 ({len(others)} of {len(found)} ranks do): it changed while"
            " it was prepared, or hosts see different files; start again when it no longer changes",
            where="data",
        )
        error.on_every_rank = True
        raise error


def _say_what_begins(run: ResolvedRun, about: dict[str, Any], trainer: Trainer) -> None:
    """Print what a log is looked at for: the run, where it runs, and what is left of it. about: of its start line."""
    held_out = f", {about['held_out_tokens']:,} held out" if about["held_out_tokens"] else ", none held out"
    stored = [f"{about['train_tokens']:,} tokens"] if about["train_tokens"] else []
    streams = sum(part.stream is not None for part in trainer.data.sets)
    streamed = [f"{streams} stream{'s' if streams > 1 else ''}"] if streams else []
    data = f"{' and '.join([*stored, *streamed])}{held_out}"
    left = run.config.training.steps - trainer.state.step
    rows = [
        *summary_rows(run),
        ("data", f"{data}; sequences of {run.config.data.sequence_length:,}"),
        ("ranks", f"{about['ranks']} ({about['launcher']}), hosts {about['hosts']}, device {about['device']}"),
        ("directory", run.config.training.run_directory),
        ("left", f"{left:,} steps, {left * run.batch.tokens_per_step:,} tokens"),
    ]
    trainer.metrics.say(aligned(rows))


def _too_little_memory(run: ResolvedRun, error: Exception, has_fitted: bool) -> OutOfMemory:
    """Return an error that says what would need less memory. After steps that have fitted a restart may help: exit code
    1."""
    reason = one_line(error)[:200]
    advice = f"a smaller one (auto finds the largest that fits) or {memory_remedies(run.config, run.ds)}"
    if has_fitted:
        problem = f"{run.batch.micro_batch} has fitted until now, but the memory is used up ({reason}); start again to"
        shown = OutOfMemory(f"{problem} resume, or try {advice}", where="training.micro_batch")
        shown.exit_code = 1
        return shown
    problem = f"got {run.batch.micro_batch}, for which the memory is too small ({reason})"
    return OutOfMemory(f"{problem}; try {advice}", where="training.micro_batch")


def _write_run_files(run: ResolvedRun, directory: Path, data: Sequence[PreparedData], is_new: bool) -> None:
    """Write configuration, network and tokenizer into the run directory, and over a tokenizer if is_new. Raises
    OSError."""
    write_whole(directory / "config.yaml", run.config.dump())
    write_whole(directory / "deepspeed.json", json.dumps(run.ds, indent=2) + "\n")
    write_whole(directory / "model" / "config.json", run.hf_config.to_json_string())
    tokenizer = tokenizer_of(data)
    if tokenizer is not None and (is_new or not (directory / "tokenizer").exists()):
        temporary = directory / "tokenizer.tmp"
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(directory / "tokenizer", ignore_errors=True)
        temporary.rename(directory / "tokenizer")


def _start_values(run: ResolvedRun, launch: Launch, device: Any, data: RunData) -> dict[str, Any]:
    """Return the values of the line `kind: start` (docs/metrics.md), without `guard` and `changes`. Collective."""
    sets = {
        part.name: {"weight": part.weight, "train_tokens": part.train_tokens, "held_out_tokens": part.held_out_tokens}
        for part in data.sets
        if part.name
    }
    sizes = {
        text.name: {
            "tokens": text.dataset.num_tokens,
            "evaluated_tokens": text.evaluated_tokens,
            "bytes": text.num_bytes,
        }
        for text in data.texts
    }
    commit, changes = commit_and_changes() if collectives.is_main() else (None, [])
    return {
        "time": utc_now(),
        "git": {"commit": commit, "changed": bool(changes)},
        "host": platform.node(),
        "hosts": len(set(collectives.all_gather_objects(platform.node()))),
        "cores": os.cpu_count(),
        "gpus": torch.cuda.device_count(),
        "ranks": collectives.size(),
        "launcher": launch.launcher,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "parameters": parameter_counts(run.hf_config)[0],
        "train_tokens": sum(part.train_tokens or 0 for part in data.sets),
        "held_out_tokens": sum(part.held_out_tokens for part in data.sets),
        **({"sets": sets} if sets else {}),
        "versions": versions("l2e_ds", "python", "torch", "deepspeed", "transformers"),
        **({"texts": sizes} if sizes else {}),
    }
