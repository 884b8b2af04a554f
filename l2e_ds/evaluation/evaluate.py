"""`l2e-ds evaluate MODEL --tasks TASK ... [--num-fewshot N ...]`: results on tasks of lm-evaluation-harness.

Prints a table and appends the results, with standard errors and the step, to evaluations.jsonl in the run directory or
in the folder that transformers loads; for a hub model, to --output. Under a launcher, any number of ranks share the
requests, and the results are the same (docs/evaluation.md).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from l2e_ds.checkpoint.manager import read_state
from l2e_ds.checkpoint.weights import DTYPES, PROVENANCE
from l2e_ds.console import at_least, markdown, say, warn
from l2e_ds.data.tokenizer import name_end_of_text
from l2e_ds.distributed import collectives, process_group
from l2e_ds.distributed.launch import Launch, run_on_launched_ranks
from l2e_ds.errors import ConfigError, DataError, renaming
from l2e_ds.evaluation.model_source import (
    MODEL,
    ModelSource,
    all_checkpoints,
    find_model,
    load_causal_model,
    load_tokenizer_of,
    network_config,
)
from l2e_ds.export.card import longer_than_trained
from l2e_ds.run_directory import results
from l2e_ds.run_directory.json_lines import append_line
from l2e_ds.system.installed import check_extra
from l2e_ds.system.process import prepare_libraries

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from l2e_ds.evaluation.harness import Tasks

TIMEOUT_MINUTES = 60.0
SECONDS_BETWEEN_LINES = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL)
    add("--tasks", nargs="+", required=True, metavar="TASK", help="tasks and groups by the harness's names, or `paper`")
    shots = "examples in each prompt, each N in turn (default: the task's own number)"
    add("--num-fewshot", type=int, nargs="+", metavar="N", help=shots)
    add("--include-path", nargs="+", default=[], metavar="DIR", help="folders of task files of your own (YAML)")
    add("--limit", type=int, metavar="N", help="only the first N documents of each task")
    size = "requests a rank answers at once (default: %(default)s)"
    add("--batch-size", type=int, default=16, metavar="B", help=size)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="K", help="step of a run's checkpoint (default: the newest)")
    which.add_argument("--all-checkpoints", action="store_true", help="evaluate all checkpoints of a run")
    add("--precision", choices=tuple(DTYPES), default="fp32", help="precision of the model (default: %(default)s)")
    add("--tokenizer", metavar="NAME|FILE", help="tokenizer (default: the model's own)")
    add("--output", type=Path, metavar="FILE.jsonl", help="append the results to this file instead")


def run(arguments: argparse.Namespace) -> int:
    """Return the exit code. Raises ConfigError, CheckpointError, DataError."""
    with renaming({"tasks": "--tasks", "include_path": "--include-path", "num_fewshot": "--num-fewshot"}):
        return run_on_launched_ranks(lambda launch: _run(arguments, launch))


def _run(arguments: argparse.Namespace, launch: Launch) -> None:
    check_extra("evaluate", "eval", ["lm_eval"])
    prepare_libraries()
    device = process_group.join(launch, TIMEOUT_MINUTES)
    try:
        sources = collectives.run_on_all(lambda: _sources(arguments))
        tasks = collectives.run_on_main(lambda: _load_tasks(arguments))
        for source in sources:
            _evaluate(arguments, source, tasks, device)
    finally:
        process_group.leave()


def _sources(arguments: argparse.Namespace) -> list[ModelSource]:
    """Check the options and return the models. Raises ConfigError, CheckpointError."""
    at_least("--batch-size", arguments.batch_size, 1)
    at_least("--limit", arguments.limit, 1)
    for shots in arguments.num_fewshot or []:
        at_least("--num-fewshot", shots, 0)
    arguments.num_fewshot = list(dict.fromkeys(arguments.num_fewshot or [None]))
    if arguments.all_checkpoints:
        sources = all_checkpoints(arguments.model)
    else:
        sources = [find_model(arguments.model, arguments.step)]
    for source in sources:
        network_config(source)
        _provenance(source)
    _check_output(_output(arguments, sources[0]))
    return sources


def _check_output(path: Path) -> None:
    """Raise ConfigError if results cannot be appended to a file."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--output: cannot write {path}; give a file in a folder that is there")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ConfigError(f"--output: {path} cannot be written by this user; give another file")
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        if file.read(1) not in (b"", b"{") or not path.is_file():
            raise ConfigError(f"--output: {path} exists and is no file of evaluations; give another, or a new one")


def _output(arguments: argparse.Namespace, source: ModelSource) -> Path:
    """Return the file to which results are appended. Raises ConfigError."""
    if arguments.output is not None:
        return arguments.output
    if source.checkpoint is not None:
        return source.checkpoint.parent.parent / results.FILE
    if not Path(str(source.name)).is_dir():
        raise ConfigError(f"--output: {source.given} has no folder here to keep its results in; give a file")
    return Path(str(source.name)) / results.FILE


def _load_tasks(arguments: argparse.Namespace) -> Tasks:
    from l2e_ds.evaluation.harness import load_tasks  # imports lm-eval, an optional dependency

    return load_tasks(arguments.tasks, arguments.include_path, arguments.num_fewshot)


def _evaluate(arguments: argparse.Namespace, source: ModelSource, tasks: Tasks | None, device: torch.device) -> None:
    """Evaluate one model with each number of examples; rank 0 prints and writes the results. Collective."""
    from l2e_ds.evaluation import harness  # imports lm-eval, an optional dependency

    tokenizer = collectives.run_on_all(lambda: _tokenizer(arguments, source))
    network, tokens = collectives.run_on_all(lambda: load_causal_model(source, arguments.precision))
    model: Any = network.to(device)
    provenance = _provenance(source)
    step, tokens = (provenance["step"], provenance["tokens"]) if provenance else (source.step, tokens)
    reporter = _Reporter(source.label)
    if collectives.is_main():
        with contextlib.suppress(KeyError, TypeError):  # there may be no configuration, or one without these keys
            made_by = provenance if source.checkpoint is None else read_state(source.checkpoint)
            longer = longer_than_trained(model.config, (made_by or {})["config"])
            if longer is not None:
                warn(f"{source.label}: {longer}")
    evaluations = [
        results.about(step, tokens, arguments.precision, arguments.tasks, shots, arguments.include_path)
        | harness.evaluate(model, tokenizer, tasks, shots, arguments.batch_size, arguments.limit, report=reporter)
        for shots in arguments.num_fewshot
    ]
    if not collectives.is_main():
        return
    heads = ["task", "shots", "metric", "value", "stderr", "documents"]
    rows = results.table([result for evaluation in evaluations for result in results.results_of(evaluation)])
    print(f"{source.label}:\n\n{markdown(heads, rows)}")
    path = _output(arguments, source)
    try:
        for evaluation in evaluations:
            append_line(path, evaluation)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {path}: {error.strerror}; the results are printed above") from None
    print(f"results: {path}", flush=True)


def _tokenizer(arguments: argparse.Namespace, source: ModelSource) -> PreTrainedTokenizerFast:
    """Return the tokenizer to use. Raises ConfigError if there is none, or one without an end of text."""
    tokenizer = load_tokenizer_of(source, arguments.tokenizer)
    try:
        name_end_of_text(tokenizer)
    except DataError as error:
        which = f"--tokenizer: {arguments.tokenizer}" if arguments.tokenizer else f"{source.given}: its tokenizer"
        raise ConfigError(f"{which} {error.problem} (--tokenizer)") from None
    return tokenizer


def _provenance(source: ModelSource) -> dict[str, Any] | None:
    """Return what an exported folder says of its run (step, tokens, config), or None. Raises ConfigError."""
    path = Path(str(source.name)) / PROVENANCE
    if source.checkpoint is not None or not path.is_file():
        return None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {**found, "step": int(found["step"]), "tokens": int(found["tokens"])}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise ConfigError(f"{path}: does not say step and tokens of the model; fix or remove it") from None


class _Reporter:
    """Prints a line of progress now and then."""

    def __init__(self, label: str) -> None:
        self.label, self.last_line = label, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            say(f"{self.label}: {done:,} of {total:,} requests")
            self.last_line = time.monotonic()
