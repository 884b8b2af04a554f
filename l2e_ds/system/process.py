"""Begin and end the processes of this project."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from l2e_ds.console import flush_streams
from l2e_ds.errors import Interrupted
from l2e_ds.system.signals import ASK_TO_STOP

_LIBC = ctypes.CDLL(None)  # loaded before any fork


def prepare_libraries() -> None:
    """Choose DeepSpeed's accelerator (a GPU if torch sees one), let tokenizers use threads, and silence what libraries
    print, except warnings and errors. Imports torch, DeepSpeed and transformers."""
    import logging
    import warnings

    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from deepspeed.utils import logger  # only now: it reads the accelerator
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def adopt_orphans() -> None:
    """Have the kernel make processes that lose their parent, and were started from this one, children of this one."""
    _LIBC.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent dies; for the `preexec_fn` of a new process."""
    _LIBC.prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


def leave_process(code: int) -> NoReturn:
    """End this process; after success, or a stop that was asked for, without the destructors of C++ libraries.

    Such a destructor now and then ended a finished run on several ranks with "terminate called without an active
    exception" (a thread of a library outlived its owner) and exit code 250, though all was saved.
    """
    flush_streams()
    if code not in (0, Interrupted.exit_code):
        sys.exit(code)
    for child in multiprocessing.active_children():  # of an unfinished data preparation; Python would wait for them
        child.kill()
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()  # mpi4py would do so at an exit that is skipped below; else mpirun reports a failure
    flush_streams()
    os._exit(code)


@contextmanager
def without_stop_signals() -> Iterator[None]:
    """Hold the signals that stop a run back from this thread, and from processes and threads that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASK_TO_STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve_parent() -> None:
    """Leave the signals that stop a run to the parent of this spawned process, and end with it."""
    for number in ASK_TO_STOP:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASK_TO_STOP)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
