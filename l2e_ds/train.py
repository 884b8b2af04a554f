"""`l2e-ds train RUN.yaml [section.key=value ...]`, also `python -m l2e_ds.train` for launchers.

Everything that a user can get wrong is checked by `preflight`, before any process group or model is made.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import json
import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from l2e_ds.config import BatchArithmetic, RunConfig, load_run_config
from l2e_ds.console import READER_IS_GONE, CommandParser, flush_streams, open_streams, reader_is_gone, say
from l2e_ds.errors import ConfigError, Interrupted, L2EError, SaveError
from l2e_ds.training import preemption
from l2e_ds.training.run_lock import RunLock

if TYPE_CHECKING:
    from l2e_ds.data import PreparedData
    from l2e_ds.distributed import Launch
    from l2e_ds.training.checkpoint import CheckpointManager


# errors that the user can mend, or that end a run for good: their exit codes
_OF_THE_SYSTEM = {
    errno.ENOSPC: SaveError.exit_code,
    errno.EDQUOT: SaveError.exit_code,
    errno.ENAMETOOLONG: ConfigError.exit_code,
}


@dataclass(frozen=True)
class Plan:
    """A checked run: configuration, DeepSpeed configuration, batches, network, hooked layers."""

    config: RunConfig
    ds: dict
    batch: BatchArithmetic
    network: Any
    layers: list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change one value of the run file")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    parser.add_argument("--ranks", type=int, help="with --dry-run: for so many ranks instead of this launch's")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it


def main(argv: Sequence[str] | None = None) -> int:
    open_streams()
    parser = CommandParser(prog="python -m l2e_ds.train", description=__doc__)
    add_arguments(parser)
    return run(parse(parser, argv))


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """As parse_args, but overrides may also follow options (`RUN.yaml --dry-run section.key=value`)."""
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or not hasattr(arguments, "overrides") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0; 2 for what the user can mend; 3 for a run that cannot go on; 75 for one that was asked to stop and
    can be gone on with. One line on stderr says why."""
    preemption.listen()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of lost connections are pages of stack
    from l2e_ds import distributed

    rank = 0
    try:
        quiet_libraries()
        launch = distributed.find_launch()
        rank = launch.rank
        if arguments.ranks is not None and not arguments.dry_run:
            raise ConfigError("--ranks goes with --dry-run; a run's ranks are the launcher's")
        if arguments.dry_run:
            ranks = launch.size if arguments.ranks is None else arguments.ranks
            plan = preflight(arguments.run_file, arguments.overrides, ranks)
            if launch.rank == 0:
                print(describe(plan), flush=True)
        else:
            plan = preflight(arguments.run_file, arguments.overrides, launch.size, this_machine=True)
            train(plan, launch)
    except Interrupted as stopped:
        preemption.honoured()
        _note_exit_code(stopped.exit_code)
        if rank == 0:
            say(f"l2e-ds: stopped: {stopped}; start again to go on")
        return stopped.exit_code
    except L2EError as error:
        if rank == 0 or not error.on_every_rank:
            where = f" rank {rank}:" if distributed.size() > 1 and not error.on_every_rank else ""
            say(f"l2e-ds: error:{where} {error}")
        _note_exit_code(error.exit_code)
        if distributed.size() > 1 and not error.on_every_rank:
            os._exit(error.exit_code)  # the others wait for this rank: the launcher must end them
        return error.exit_code
    except KeyboardInterrupt:
        say("l2e-ds: interrupted: steps since the last checkpoint are lost (SIGTERM or SIGUSR1 would have saved first)")
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            return READER_IS_GONE
        if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
            where, code = error.filename or "a file of the run", _OF_THE_SYSTEM[error.errno]
            _note_exit_code(code)
            say(f"l2e-ds: error: rank {rank}: {where}: {error.strerror}")
            if code == ConfigError.exit_code and distributed.size() == 1:
                return code
            os._exit(code)
        from l2e_ds.training.watchdog import is_lost_contact

        if is_lost_contact(error):  # another rank failed; a traceback of this one would hide that one's
            reason = str(error).splitlines()[0][:200]
            say(f"l2e-ds: error: rank {rank}: lost contact with another rank: {reason}")
        else:
            say(f"l2e-ds: error: rank {rank} failed\n{traceback.format_exc()}")
        os._exit(1)  # waiting for the other ranks at exit could hang; the launcher ends them
    return 0


def _note_exit_code(code: int) -> None:
    """Tell l2e_ds.supervise, which may only see the launcher's code: torchrun ends with 1, whatever its ranks said."""
    noted = Path(os.environ.get(preemption.EXIT_FILE, ""))
    if noted.is_file():  # not on other hosts
        with noted.open("a", encoding="utf-8") as file:
            file.write(f"{code}\n")


def quiet_libraries() -> None:
    """Keep the terminal for our own lines; warnings and errors still come through."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import logging
    import warnings

    from deepspeed.utils import logger
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def preflight(run_file: str | Path, overrides: Sequence[str], ranks: int, this_machine: bool = False) -> Plan:
    """Check a run completely, without a process group, a model, or anything written.

    this_machine: also that this machine's device can do it. Raises ConfigError or DataError.
    """
    from l2e_ds.data import check_sets
    from l2e_ds.training.deepspeed_config import check_device

    plan = resolve_run(run_file, overrides, ranks)
    if this_machine:
        check_device(plan.config)
        _check_machine(plan)
    try:
        check_sets(plan.config.data, plan.network.vocab_size)
    except L2EError as error:
        error.on_every_rank = True
        raise
    return plan


def resolve_run(run_file: str | Path, overrides: Sequence[str], ranks: int, has_bf16: bool | None = None) -> Plan:
    """What `preflight` does without a look at data or machine. Raises ConfigError.

    has_bf16: whether the device that the run is for computes in bf16 (for `training.precision: auto`); default: this
    machine's.
    """
    from l2e_ds.models import chosen_layers, network_config
    from l2e_ds.training.deepspeed_config import resolve

    if ranks < 1:
        raise ConfigError(f"--ranks: got {ranks}, allowed: an integer >= 1")
    config = load_run_config(run_file, overrides)
    network = network_config(config.model, config.data.sequence_length)
    config, ds, batch = resolve(config, ranks, run_file, has_bf16)
    layers = chosen_layers(config.inhibition.layers, network.num_hidden_layers)
    longest = getattr(network, "max_position_embeddings", None)  # None: alibi, any length
    if longest is not None and config.data.sequence_length > longest:
        raise ConfigError(
            f"data.sequence_length: got {config.data.sequence_length}, {config.model.pretrained} takes at most"
            f" {longest}"
        )
    return Plan(config, ds, batch, network, layers)


def _check_machine(plan: Plan) -> None:
    """That what the run needs beside its device is here. Raises ConfigError."""
    from l2e_ds.evaluation import check_installed
    from l2e_ds.installed import is_installed

    config = plan.config
    directory = Path(config.training.run_directory)
    for folder in (directory, directory / "checkpoints"):
        place = _nearest("training.run_directory", folder)
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise ConfigError(f"training.run_directory: cannot write below {place}")
    _nearest("data.cache", Path(config.data.cache) if config.data.cache else directory / "data")
    _check_extensions(plan.ds)
    resume = Path(config.training.resume)
    if config.training.resume not in ("auto", "never") and not resume.is_dir():
        raise ConfigError(f"training.resume: no such folder: {resume}; allowed: auto, never, a run or a checkpoint")
    if config.model.attention == "flash_attention_2" and not is_installed("flash_attn"):
        raise ConfigError("model.attention: got flash_attention_2, but the package flash-attn is not installed")
    if config.evaluation.every:
        check_installed("evaluation.every")
    for key, package in (("tensorboard", "tensorboard"), ("wandb_project", "wandb")):
        if getattr(config.logging, key) and not is_installed(package):
            raise ConfigError(f"logging.{key}: needs {package}: pip install 'l2e-ds[monitor]'")


def _nearest(key: str, folder: Path) -> Path:
    """The folder, or of those above it the first that is there. Raises ConfigError for names that no folder can have,
    and for links to nowhere."""
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


def _check_extensions(ds: dict) -> None:
    """That DeepSpeed can build its operation of CPU offload, or find it built. Raises ConfigError."""
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import get_default_build_root

    offload = ds.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device", "none") == "none" or installed_ops.get("cpu_adam"):
        return
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    place = _nearest("TORCH_EXTENSIONS_DIR", Path(root))
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(
            f"zero_optimization.offload_optimizer: DeepSpeed builds its operation below {root}, and cannot write to"
            f" {place}; set TORCH_EXTENSIONS_DIR"
        )


def describe(plan: Plan) -> str:
    """What `--dry-run` prints."""
    from l2e_ds.families import neurons_of
    from l2e_ds.models import parameter_counts

    config, network = plan.config, plan.network
    batch = _unfound_batch(plan) if config.training.micro_batch == "auto" else str(plan.batch)
    total, rest = parameter_counts(network)
    neurons = neurons_of(network)
    tokens = plan.batch.tokens_per_step * config.training.steps
    retrieval, mechanism = config.inhibition.parts
    method = config.inhibition.method
    total_weight = sum(weight for _, weight, _ in config.data.parts())
    mixture = ", ".join(f"{name} {weight / total_weight:.2%}" for name, weight, _ in config.data.parts() if name)
    what = "no inhibition; observed at evaluation" if method == "none" else f"{retrieval} + {mechanism}"
    return "\n".join(
        [
            "# resolved configuration",
            config.dump().rstrip(),
            "",
            "# DeepSpeed configuration",
            json.dumps(plan.ds),
            "",
            f"batch       {batch}",
            f"run         {config.training.steps:,} steps, {tokens:,} tokens",
            *([f"mixture     {mixture}"] if mixture else []),
            f"parameters  {total:,} ({rest:,} without embeddings)",
            f"precision   {config.training.precision}",
            f"method      {method} ({what})",
            f"layers      {', '.join(map(str, plan.layers))} of 0-{network.num_hidden_layers - 1}",
            f"neurons     {len(plan.layers)} x {neurons:,} = {len(plan.layers) * neurons:,}",
        ]
    )


def _unfound_batch(plan: Plan) -> str:
    """What a dry run can say of `training.micro_batch: auto`."""
    from l2e_ds.config import divisors
    from l2e_ds.training import micro_batch

    path = Path(plan.config.training.run_directory) / micro_batch.FILE
    about = micro_batch.circumstances(plan.config, plan.ds, plan.batch.ranks)
    number, problem = micro_batch.remembered(path, about, divisors(plan.batch.global_batch // plan.batch.ranks))
    found = "found at the start"
    if number is not None:
        found = f"{number}, if the devices are those of {path}"
    elif problem is not None:
        found += f", for {path} {problem}"
    batch = plan.batch
    return (
        f"{batch.global_batch} sequences; {batch.tokens_per_step:,} tokens a step; micro-batch auto: {found} (above it"
        " stands as 1)"
    )


def train(plan: Plan, launch: Launch) -> None:
    """Join the other ranks, train what is left of the run, leave."""
    from l2e_ds import distributed
    from l2e_ds.training.checkpoint import open_checkpoints
    from l2e_ds.training.trainer import is_finished
    from l2e_ds.training.watchdog import Watchdog

    config = plan.config
    directory = Path(config.training.run_directory)
    with Watchdog(config.training.timeout) as watchdog:
        device = distributed.join(launch, config.training.timeout)
        watchdog.meet()
        preemption.watch(directory, config.training.time_limit)
        with _locked(directory) as lock:
            watchdog.also = lock.renew
            checkpoints = open_checkpoints(config)  # first: a refused or finished run must stay as it is
            if not distributed.main_decides(is_finished(config, checkpoints)):
                _train_on(plan, launch, device, checkpoints)
            elif distributed.is_main():
                say(f"nothing to do: {checkpoints.resume_from} is there, training.steps is {config.training.steps}")
    distributed.leave()


def _train_on(plan: Plan, launch: Launch, device: Any, checkpoints: CheckpointManager) -> None:
    """Prepare the data, build everything, train."""
    from l2e_ds import distributed
    from l2e_ds.data import prepare_sets
    from l2e_ds.data.files import write_whole
    from l2e_ds.models import take_special_tokens
    from l2e_ds.training import micro_batch
    from l2e_ds.training.deepspeed_config import with_micro_batch
    from l2e_ds.training.task_evaluation import load_task_evaluation
    from l2e_ds.training.trainer import Trainer

    config = plan.config
    directory = Path(config.training.run_directory)

    def prepare() -> list[PreparedData]:
        cache = Path(config.data.cache) if config.data.cache else directory / "data"
        evaluated = config.training.evaluation_sequences
        return prepare_sets(config.data, cache, plan.network.vocab_size, evaluated)

    record = None
    if config.training.micro_batch == "auto":
        found = micro_batch.find(config, plan.ds, plan.network, device)
        config, ds, batch = with_micro_batch(config, plan.ds, found.micro_batch, launch.size)
        plan, record = replace(plan, config=config, ds=ds, batch=batch), found.record
    distributed.progress("data preparation")
    data = _main_first(prepare)
    for part in data:
        if part.tokenizer is not None:
            take_special_tokens(plan.network, part.tokenizer)
    distributed.progress("loading evaluation tasks")
    tasks = load_task_evaluation(config, data)
    distributed.progress("building the model")
    with Trainer(config, plan.ds, plan.batch, plan.network, data, device, tasks, checkpoints) as trainer:
        if distributed.is_main():
            # only now: a refused resume must leave the run as it was
            _freeze(plan, directory, data, is_new=trainer.state.step == 0)
            if record is not None:
                write_whole(directory / micro_batch.FILE, record)
        about = _circumstances(plan, launch, device, data)
        about |= {"guard": config.inhibition.guard} if trainer.is_guarded else {}
        about |= {"changes": trainer.changes} if trainer.changes else {}
        trainer.metrics.write("start", trainer.state.step, about)
        trainer.train()


@contextmanager
def _locked(directory: Path) -> Iterator[RunLock]:
    """No other run writes here meanwhile. Collective; raises ConfigError on every rank."""
    from l2e_ds import distributed

    lock = RunLock(directory)
    distributed.all_work(lambda: lock.acquire() if distributed.is_main() else None)
    try:
        yield lock
    finally:
        lock.release()


def _main_first(action: Any) -> Any:
    """Run on rank 0, then on the others, which find its result on disk; an error of any ends all."""
    from l2e_ds import distributed

    result = distributed.main_works(action, preemption.stop_if_asked)
    return distributed.all_work(lambda: result if distributed.is_main() else action())


def _freeze(plan: Plan, directory: Path, data: Sequence[PreparedData], is_new: bool) -> None:
    """Keep what was run beside what came of it."""
    from l2e_ds.data.files import write_whole

    write_whole(directory / "config.yaml", plan.config.dump())
    write_whole(directory / "deepspeed.json", json.dumps(plan.ds, indent=2) + "\n")
    write_whole(directory / "model" / "config.json", plan.network.to_json_string())
    tokenizer = next((part.tokenizer for part in data if part.tokenizer is not None), None)
    if tokenizer is not None and (is_new or not (directory / "tokenizer").exists()):
        temporary = directory / "tokenizer.tmp"
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(directory / "tokenizer", ignore_errors=True)
        temporary.rename(directory / "tokenizer")


def _circumstances(plan: Plan, launch: Launch, device: Any, data: Sequence[PreparedData]) -> dict[str, Any]:
    """What the line `kind: start` says. Collective."""
    import platform
    from datetime import datetime, timezone

    import deepspeed
    import torch
    import transformers

    import l2e_ds
    from l2e_ds import distributed
    from l2e_ds.code_version import commit_and_changes
    from l2e_ds.models import parameter_counts

    sets = {
        part.name: {"weight": part.weight, "train_tokens": part.train_tokens, "held_out_tokens": part.held_out_tokens}
        for part in data
        if part.name
    }
    commit, changes = commit_and_changes() if distributed.is_main() else (None, [])
    return {
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "git": {"commit": commit, "changed": bool(changes)},
        "host": platform.node(),
        "hosts": len(set(distributed.all_gather_objects(platform.node()))),
        "cores": os.cpu_count(),
        "gpus": torch.cuda.device_count(),
        "ranks": distributed.size(),
        "launcher": launch.launcher,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "parameters": parameter_counts(plan.network)[0],
        "train_tokens": sum(part.train_tokens or 0 for part in data),
        "held_out_tokens": sum(part.held_out_tokens for part in data),
        **({"sets": sets} if sets else {}),
        "versions": {
            "l2e_ds": l2e_ds.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
        },
    }


def leave_process(code: int) -> NoReturn:
    """End this process; after success, or a stop that was asked for, without the destructors of C++ libraries.

    Seen now and then after a finished run on several ranks: "terminate called without an active exception", a thread
    of a library that outlived its owner, and exit code 250 for a run that was complete and saved.
    """
    flush_streams()
    if code not in (0, Interrupted.exit_code):
        sys.exit(code)
    for child in multiprocessing.active_children():  # of an unfinished data preparation; it would be waited for
        child.kill()
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()  # mpi4py would do so where we no longer come by; mpirun calls it a failure if nobody does
    flush_streams()
    os._exit(code)


if __name__ == "__main__":
    leave_process(main())
