"""`l2e-ds train RUN.yaml [section.key=value ...]`, also `python -m l2e_ds.train` for launchers: pretrain as it says.

    l2e-ds train run.yaml --dry-run                                 what would be run
    l2e-ds train pythia-70m data.path=PREFIX training.steps=1000    a recipe, with two keys changed

The same command on the same run directory resumes from its newest good checkpoint.

`preflight` checks the run file, the data and this machine before any process group or model is made. Evaluation tasks
are loaded, and so checked, before the data is prepared; a prompt for a tokenizer that is still to be trained, after.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
import traceback
from collections.abc import Sequence
from pathlib import Path

from l2e_ds.console import (
    READER_IS_GONE,
    CommandParser,
    add_run_file_arguments,
    open_streams,
    parse,
    reader_is_gone,
    say,
    words_of_command,
)
from l2e_ds.distributed.launch import Launch, find_launch, is_reported_here
from l2e_ds.errors import ConfigError, Interrupted, L2EError, SaveError
from l2e_ds.run_directory import names
from l2e_ds.system.process import leave_process, prepare_libraries
from l2e_ds.training import preemption

# Exit codes for errors of the system that the user can fix, or that end a run for good.
_SYSTEM_ERRORS = {
    errno.ENOSPC: SaveError.exit_code,
    errno.EDQUOT: SaveError.exit_code,
    **dict.fromkeys((errno.ENAMETOOLONG, errno.EACCES, errno.EROFS), ConfigError.exit_code),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and stop")
    parser.add_argument("--ranks", type=int, help="with --dry-run: for so many ranks instead of this launch's")


def main(argv: Sequence[str] | None = None) -> int:
    """Train as a launcher's command line says, and return the exit code."""
    open_streams()
    parser = CommandParser(prog="python -m l2e_ds.train", description=__doc__)
    add_arguments(parser)
    return run(parse(parser, words_of_command(argv)))


def run(arguments: argparse.Namespace) -> int:
    """Train, or print what would be trained, and return the exit code (docs/run-directory.md)."""
    preemption.listen()  # before the slow imports below: a signal during them is noted, too
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of lost connections are pages of stack
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same
        # an evaluation's tensors are not those of a step: without it a GPU's memory is cut into pieces between them
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

    launch = None
    try:
        prepare_libraries()
        # only now: Ctrl-C during this slow import is one line, too
        from l2e_ds.training.preflight import describe, preflight

        launch = find_launch()
        if arguments.ranks is not None and not arguments.dry_run:
            raise ConfigError("--ranks goes with --dry-run; a run's ranks are the launcher's")
        ranks = launch.size if arguments.ranks is None else arguments.ranks
        resolved = preflight(arguments.run_file, arguments.overrides, ranks, this_machine=not arguments.dry_run)
        if not arguments.dry_run:
            from l2e_ds.training.run import train  # only now: a mistake in the run file need not wait for DeepSpeed

            train(resolved, launch)
        elif launch.rank == 0:
            print(describe(resolved), flush=True)
    except KeyboardInterrupt:
        say("l2e-ds: interrupted: steps since the last checkpoint are lost (SIGTERM or SIGUSR1 would have saved first)")
        return 130
    except Exception as error:
        return _report(error, launch)
    return 0


def _report(error: Exception, launch: Launch | None) -> int:
    """Print an error where this rank is to print it, note its exit code for the supervisor, and return the code.

    To be called while the error is handled. Where the other ranks may wait for this one, end this process: the launcher
    then ends them. launch: None if the error came before it was found out.
    """
    from l2e_ds.distributed import collectives  # with torch

    rank = 0 if launch is None else launch.rank
    if isinstance(error, Interrupted):
        preemption.honoured()
        _note_exit_code(error.exit_code)
        if rank == 0:
            say(f"l2e-ds: stopped: {error}; start again to resume")
        return error.exit_code
    if isinstance(error, L2EError):
        if launch is None or is_reported_here(error, launch, have_met=collectives.size() == launch.size):
            is_known_here_only = rank > 0 if error.on_every_rank else collectives.size() > 1
            where = f" rank {rank} on {socket.gethostname()}:" if is_known_here_only else ""
            say(f"l2e-ds: error:{where} {error}")
        _note_exit_code(error.exit_code)
        if collectives.size() > 1 and not error.on_every_rank:
            os._exit(error.exit_code)
        return error.exit_code
    if isinstance(error, BrokenPipeError) and reader_is_gone():
        return READER_IS_GONE
    if isinstance(error, OSError) and error.errno in _SYSTEM_ERRORS:
        where, code = error.filename or "a file of the run", _SYSTEM_ERRORS[error.errno]
        _note_exit_code(code)
        say(f"l2e-ds: error: rank {rank}: {where}: {error.strerror}")
        if code == ConfigError.exit_code and collectives.size() == 1:
            return code
        os._exit(code)
    from l2e_ds.distributed.watchdog import is_lost_contact  # with torch, which a mistake need not wait for

    if is_lost_contact(error):  # another rank failed; a traceback of this one would hide that one's
        say(f"l2e-ds: error: rank {rank}: lost contact with another rank: {reason_of(error)}")
    else:
        say(f"l2e-ds: error: rank {rank} failed\n{traceback.format_exc()}")
    os._exit(1)  # waiting for the other ranks at exit could hang


def reason_of(error: BaseException) -> str:
    """Return a backend's message as one line: its first, and what NCCL says of the cause at its end."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    cause = rest[rest.index("Last error:") + 1 :][:1] if "Last error:" in rest else []
    return "; ".join(line[:200] for line in [first, *cause])


def _note_exit_code(code: int) -> None:
    """Tell l2e_ds.supervise this rank's exit code; of the launcher it may see only 1, whatever its ranks ended with."""
    noted = Path(os.environ.get(names.EXIT_FILE, ""))
    if noted.is_file():  # not on other hosts
        with noted.open("a", encoding="utf-8") as file:
            file.write(f"{code}\n")


if __name__ == "__main__":
    leave_process(main())
