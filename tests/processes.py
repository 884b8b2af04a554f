"""Processes for tests: forked from a server that has imported torch, DeepSpeed and transformers once.

A process that imports them anew needs three to five seconds before it does anything, for every rank of every case.
What is forked is otherwise the real thing: a process with its own environment, signals and exit code that runs the real
command. The launchers (deepspeed, torchrun, mpirun, srun) start processes in their own way; their tests use them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from l2e_ds.distributed.launch import free_port

REPOSITORY = Path(__file__).resolve().parent.parent
IMPORTED_ONCE = [
    "torch",
    "torch.optim",
    "deepspeed",
    "datasets",
    "transformers",
    "transformers.models.gpt_neox.modeling_gpt_neox",
    "l2e_ds.cli",
    "l2e_ds.train",
    "l2e_ds.training.trainer",
    "l2e_ds.training.task_evaluation",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # with the compiler of torch, at the first engine otherwise
    "lm_eval.evaluator",
    "matplotlib.figure",
    "pandas",
    "scipy.stats",
]

# Before anything reads it: what is cached of hubs is neither the user's nor left behind.
HF_HOME = tempfile.TemporaryDirectory(prefix="l2e-ds-hf-home-")
os.environ["HF_HOME"] = HF_HOME.name
os.environ.pop("HF_HUB_CACHE", None)
os.environ.pop("HF_DATASETS_CACHE", None)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(IMPORTED_ONCE)


def environment(accelerator: str = "cpu", **more: str) -> dict[str, str]:
    """Return the environment of child processes: they can import this repository, use one thread each, and see no
    launcher's variables and only the device that is asked for."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
    return {
        **{name: value for name, value in os.environ.items() if name not in launcher},
        "PYTHONPATH": str(REPOSITORY),
        "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": accelerator,
        **({"CUDA_VISIBLE_DEVICES": ""} if accelerator == "cpu" else {}),
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        **more,
    }


class Forked:
    """Runs `python WORDS` in a process forked from the server, with the methods of subprocess.Popen that tests use.

    words: `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`. What it prints is appended to `log`.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._process = _start(words, environment, log)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative where a signal ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def begin(words: Sequence[object], environment: Mapping[str, str], log: Path) -> Forked | subprocess.Popen:
    """Start `python WORDS` and return the process, forked from the server unless a GPU is asked for: CUDA does not
    survive a fork. What it prints is appended to `log`."""
    said = [*map(str, words)]
    if environment["DS_ACCELERATOR"] == "cpu":
        return Forked(said, environment, log)
    with log.open("a") as file:
        return subprocess.Popen([sys.executable, "-u", *said], env=environment, stdout=file, stderr=subprocess.STDOUT)


def begin_ranks(
    count: int, words: Sequence[object], environment: Mapping[str, str], log: Path
) -> list[Forked | subprocess.Popen]:
    """Start `python WORDS` once for each rank, with the variables that a launcher sets, and return the processes in the
    order of ranks."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [begin(words, {**environment, **common, **variables}, log) for variables in own]


def finish(*words: object, ranks: int = 1, timeout: float = 600, **variables: str) -> tuple[list[int], str]:
    """Run `python WORDS` on so many ranks to its end. Return all exit codes, and what was printed.

    The codes are in the order of ranks. timeout: seconds for each rank. Raises subprocess.TimeoutExpired.
    """
    with tempfile.TemporaryDirectory(prefix="l2e-ds-said-") as folder:
        log = Path(folder) / "log"
        log.touch()
        alone = [begin(words, environment(**variables), log)] if ranks == 1 else None
        processes = alone or begin_ranks(ranks, words, environment(**variables), log)
        try:
            codes = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return codes, log.read_text()


@contextlib.contextmanager
def lock_held(directory: Path) -> Iterator[subprocess.Popen]:
    """Yield a process that holds the lock of a run directory until it is killed, at the latest at the end of the
    block."""
    hold = "import sys, time; from pathlib import Path; from l2e_ds.run_directory.lock import RunLock;"
    hold += " RunLock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(600)"
    words, variables = [sys.executable, "-c", hold, str(directory)], {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=variables) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def _start(words: Sequence[str], environment: Mapping[str, str], log: Path) -> ForkServerProcess:
    # one thread also where the server imports: OpenMP reads its variable once
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", PYTHONPATH=str(REPOSITORY))
    try:
        arguments = (list(words), dict(environment), str(log), os.getcwd())
        process = _context.Process(target=_run, args=arguments)
        try:
            process.start()
        except EOFError:  # seen once: the server was killed while it began; the next start makes another
            process = _context.Process(target=_run, args=arguments)
            process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return process


def hear_all_signals() -> None:
    """In a new process: as in a terminal. A shell in the background ignores SIGINT, and a run in the tests' own process
    leaves SIGUSR1 ignored in what that forks."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def _run(words: list[str], environment: dict[str, str], log: str, folder: str) -> None:
    hear_all_signals()
    gc.freeze()  # DeepSpeed collects garbage for each engine: it need not look through what the server has imported
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if words[0] == "-m":
        sys.modules.pop(words[1], None)  # else runpy warns that it is there already
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
