"""`l2e-ds train RUN.yaml [section.key=value ...]`, also `python -m l2e_ds.train` for launchers.

Everything that a user can get wrong is checked by `preflight`, before any process group or model is made.
"""

from __future__ import annotations

import argparse
import errno
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2e_ds.console import READER_IS_GONE, CommandParser, open_streams, parse, reader_is_gone, say
from l2e_ds.errors import ConfigError, Interrupted, L2EError, SaveError
from l2e_ds.run_directory import names
from l2e_ds.run_directory.lock import RunLock
from l2e_ds.system.process import leave_process, quiet_libraries
from l2e_ds.training import preemption
from l2e_ds.training.preflight import Plan, describe, preflight
from l2e_ds.training.records import freeze, record_circumstances

if TYPE_CHECKING:
    from l2e_ds.checkpoint.manager import CheckpointManager
    from l2e_ds.data import PreparedData
    from l2e_ds.distributed.launch import Launch


# errors that the user can mend, or that end a run for good: their exit codes
_OF_THE_SYSTEM = {
    errno.ENOSPC: SaveError.exit_code,
    errno.EDQUOT: SaveError.exit_code,
    errno.ENAMETOOLONG: ConfigError.exit_code,
}


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


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0; 2 for what the user can mend; 3 for a run that cannot go on; 75 for one that was asked to stop and
    can be gone on with. One line on stderr says why."""
    preemption.listen()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of lost connections are pages of stack
    from l2e_ds.distributed import collectives
    from l2e_ds.distributed.launch import find_launch

    rank = 0
    try:
        quiet_libraries()
        launch = find_launch()
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
            where = f" rank {rank}:" if collectives.size() > 1 and not error.on_every_rank else ""
            say(f"l2e-ds: error:{where} {error}")
        _note_exit_code(error.exit_code)
        if collectives.size() > 1 and not error.on_every_rank:
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
            if code == ConfigError.exit_code and collectives.size() == 1:
                return code
            os._exit(code)
        from l2e_ds.distributed.watchdog import is_lost_contact

        if is_lost_contact(error):  # another rank failed; a traceback of this one would hide that one's
            reason = str(error).splitlines()[0][:200]
            say(f"l2e-ds: error: rank {rank}: lost contact with another rank: {reason}")
        else:
            say(f"l2e-ds: error: rank {rank} failed\n{traceback.format_exc()}")
        os._exit(1)  # waiting for the other ranks at exit could hang; the launcher ends them
    return 0


def _note_exit_code(code: int) -> None:
    """Tell l2e_ds.supervise, which may only see the launcher's code: torchrun ends with 1, whatever its ranks said."""
    noted = Path(os.environ.get(names.EXIT_FILE, ""))
    if noted.is_file():  # not on other hosts
        with noted.open("a", encoding="utf-8") as file:
            file.write(f"{code}\n")


def train(plan: Plan, launch: Launch) -> None:
    """Join the other ranks, train what is left of the run, leave."""
    from l2e_ds.checkpoint.manager import open_checkpoints
    from l2e_ds.distributed import collectives, process_group
    from l2e_ds.distributed.watchdog import Watchdog
    from l2e_ds.training.trainer import is_finished

    config = plan.config
    directory = Path(config.training.run_directory)
    with Watchdog(config.training.timeout) as watchdog:
        device = process_group.join(launch, config.training.timeout)
        watchdog.meet()
        preemption.watch(directory, config.training.time_limit)
        with _locked(directory) as lock:
            watchdog.also = lock.renew
            checkpoints = open_checkpoints(config)  # first: a refused or finished run must stay as it is
            if not collectives.main_decides(is_finished(config, checkpoints)):
                _train_on(plan, launch, device, checkpoints)
            elif collectives.is_main():
                say(f"nothing to do: {checkpoints.resume_from} is there, training.steps is {config.training.steps}")
    process_group.leave()


def _train_on(plan: Plan, launch: Launch, device: Any, checkpoints: CheckpointManager) -> None:
    """Prepare the data, build everything, train."""
    from l2e_ds.data import prepare_sets
    from l2e_ds.data.tokenizer import take_special_tokens
    from l2e_ds.distributed import collectives, heartbeat
    from l2e_ds.engine.configuration import with_micro_batch
    from l2e_ds.system.files import write_whole
    from l2e_ds.system.memory import keep_freed_memory
    from l2e_ds.training import micro_batch
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
    if device.type == "cpu":
        keep_freed_memory()  # after the search of a micro-batch, which measures what each size takes
    heartbeat.progress("data preparation")
    data = _main_first(prepare)
    for part in data:
        if part.tokenizer is not None:
            take_special_tokens(plan.network, part.tokenizer)
    heartbeat.progress("loading evaluation tasks")
    tasks = load_task_evaluation(config, data)
    heartbeat.progress("building the model")
    with Trainer(config, plan.ds, plan.batch, plan.network, data, device, tasks, checkpoints) as trainer:
        if collectives.is_main():
            # only now: a refused resume must leave the run as it was
            freeze(plan, directory, data, is_new=trainer.state.step == 0)
            if record is not None:
                write_whole(directory / micro_batch.FILE, record)
        about = record_circumstances(plan, launch, device, data)
        about |= {"guard": config.inhibition.guard} if trainer.is_guarded else {}
        about |= {"changes": trainer.changes} if trainer.changes else {}
        trainer.metrics.write("start", trainer.state.step, about)
        trainer.train()


@contextmanager
def _locked(directory: Path) -> Iterator[RunLock]:
    """No other run writes here meanwhile. Collective; raises ConfigError on every rank."""
    from l2e_ds.distributed import collectives

    lock = RunLock(directory)
    collectives.all_work(lambda: lock.acquire() if collectives.is_main() else None)
    try:
        yield lock
    finally:
        lock.release()


def _main_first(action: Any) -> Any:
    """Run on rank 0, then on the others, which find its result on disk; an error of any ends all."""
    from l2e_ds.distributed import collectives

    result = collectives.main_works(action, preemption.stop_if_asked)
    return collectives.all_work(lambda: result if collectives.is_main() else action())


if __name__ == "__main__":
    leave_process(main())
