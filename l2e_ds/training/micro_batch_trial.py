"""Try micro-batches of growing size in a child process per rank, and measure their memory and time."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from l2e_ds.config.sections import RunConfig
from l2e_ds.distributed import collectives, process_group
from l2e_ds.distributed.launch import Launch, free_port
from l2e_ds.errors import WorkerError
from l2e_ds.system.determinism import deterministic_algorithms
from l2e_ds.system.files import error_line
from l2e_ds.system.memory import is_out_of_memory, process_memory
from l2e_ds.system.process import prepare_libraries, serve_parent, without_stop_signals
from l2e_ds.training import preemption

_OUT_OF_MEMORY = "out of memory"
_MEETING = 0.5  # seconds between two collectives of the ranks while their children work


@dataclass(frozen=True)
class Measured:
    """Holds what was measured of two micro-batches of one size, in bytes and seconds.

    base: held before forward of the second one. working: the peak of its forward and backward. stepping: the peak of
    the optimizer step. seconds: of forward and backward, of the faster of the two.
    """

    base: float
    working: float
    stepping: float
    seconds: float

    @property
    def peak(self) -> float:
        """The largest memory, in bytes."""
        return max(self.working, self.stepping)


def _held(device: torch.device) -> float:
    """Return the bytes held now: on a GPU all that is in use there, also by CUDA contexts, NCCL and other processes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return process_memory("VmRSS")


def _forget_peak(device: torch.device) -> None:
    """Begin to measure a new peak."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> float:
    """Return the peak of what `_held` counts since `_forget_peak`, in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return _held(device) - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)
    return process_memory("VmHWM")


@contextmanager
def child_process(config: RunConfig, ds: dict, hf_config: Any) -> Iterator[Callable[[int], Measured | None]]:
    """Start a child in this rank's place in a process group of the children, and yield `_ask` for it; end it at once in
    the end, which frees its memory on the device. Collective."""
    port = collectives.broadcast_object(free_port() if collectives.is_main() else None)
    variables = {"RANK": collectives.rank(), "WORLD_SIZE": collectives.size(), "MASTER_PORT": port}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, variables, config, ds, hf_config), daemon=True)
    with without_stop_signals():
        process.start()
    theirs.close()
    try:
        yield lambda size: _ask(process, ours, size, 60 * config.training.timeout)
    finally:
        process.kill()
        process.join()
        ours.close()


def _ask(process: BaseProcess, connection: Connection, size: int, patience: float) -> Measured | None:
    """Return what all children measure of a size, the worst of all ranks, or None if any ran out of memory. Collective.

    patience: in seconds. The ranks meet again and again meanwhile, as one child may have failed and the others wait for
    it for ever. Raises WorkerError if a child failed or did not answer, and Interrupted.
    """
    with suppress(OSError):  # the child has ended, which `_answer` finds
        connection.send(size)
    answer: Measured | str | None = None
    waited, meetings_after_failure = 0.0, 0
    while True:
        preemption.stop_if_asked()
        if answer is None:
            answer = _answer(process, connection)
            waited += _MEETING  # not by a clock, which runs on while this process is suspended
            if answer is None and waited > patience:
                answer = f"no answer in {patience / 60:g} minutes (training.timeout)"
        else:
            time.sleep(_MEETING)
        answers = collectives.all_gather_objects(answer)
        if _OUT_OF_MEMORY in answers:
            return None
        failed = [(rank, said) for rank, said in enumerate(answers) if isinstance(said, str)]
        # A child that was killed for its memory may be noticed a moment after those that lost contact with it.
        meetings_after_failure += bool(failed)
        if meetings_after_failure > 3:
            rank, said = failed[0]
            error = WorkerError(
                f"training.micro_batch: auto: measuring {size} failed on rank {rank}: {said}; start again to measure"
                " anew, or give a number"
            )
            error.on_every_rank = True
            raise error
        if all(isinstance(said, Measured) for said in answers):
            columns = zip(*(vars(said).values() for said in answers), strict=True)
            return Measured(*map(max, columns))


def _answer(process: BaseProcess, connection: Connection) -> Measured | str | None:
    """Return what the child answers until the next meeting, what became of it, or None if it is still at work."""
    try:
        return connection.recv() if connection.poll(_MEETING) else None
    except (EOFError, OSError):
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        return _OUT_OF_MEMORY if killed else f"its process ended with exit code {process.exitcode}"


def _serve(connection: Connection, variables: dict[str, Any], config: RunConfig, ds: dict, hf_config: Any) -> None:
    """Measure each size that the parent sends, and send back the result, until the parent ends this process."""
    serve_parent()
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's store is for the rendezvous of its own ranks
    os.environ.update({name: str(value) for name, value in variables.items()})
    # Libraries show bars, whose lock is a semaphore between processes. Python would say at the end that it leaked,
    # because this process is killed.
    tqdm.set_lock(threading.RLock())
    try:
        prepare_libraries()
        rank, ranks, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        device = process_group.join(Launch("parent", rank, ranks, local_rank), config.training.timeout)
        take = _build(config, ds, hf_config, device)
        with deterministic_algorithms(config.training.deterministic):
            while True:
                connection.send(take(connection.recv()))
    except EOFError:
        return
    except Exception as error:
        connection.send(_OUT_OF_MEMORY if is_out_of_memory(error) else error_line(error))
        threading.Event().wait()  # so that the others report this error, and not that they lost contact


def _build(config: RunConfig, ds: dict, hf_config: Any, device: torch.device) -> Callable[[int], Measured]:
    """Build the run's network, inhibitor and engine, take a step, and return a function that measures a size.

    It trains two micro-batches of the size, as the trainer does, and measures the second. If one micro-batch is a whole
    global batch, each is a step; otherwise both together are one.
    """
    # imported here, after the libraries were made quiet
    from l2e_ds.training.building import TrainingStack, forward_and_backward

    ranks = collectives.size()
    share = config.training.global_batch // ranks
    accumulation = min(2, share)
    # so that the gradient of the inhibition loss is added, as in later steps
    config = config.replace("inhibition", start=0, warmup=0, decay=0, end=None)
    ds = ds | {"train_batch_size": accumulation * ranks, "train_micro_batch_size_per_gpu": 1}
    ds |= {"gradient_accumulation_steps": accumulation}
    stack = TrainingStack(config, ds, hf_config, device)
    engine, inhibitor = stack.engine, stack.inhibitor
    random = torch.Generator().manual_seed(collectives.rank())

    def take(size: int) -> Measured:
        seconds = math.inf
        for ends_step in (size == share, True):
            engine.set_gradient_accumulation_boundary(ends_step)
            rows = torch.randint(hf_config.vocab_size, (size, config.data.sequence_length + 1), generator=random)
            rows = rows.to(device)
            _forget_peak(device)
            base, begin = _held(device), time.perf_counter()
            forward_and_backward(engine, stack.head, inhibitor, rows)
            working = _peak(device)
            seconds = min(seconds, time.perf_counter() - begin)
            _forget_peak(device)
            engine.step()
            if ends_step and inhibitor is not None:
                inhibitor.step(engine.was_step_applied())
        return Measured(base, working, _peak(device), seconds)

    for _ in range(30):  # fp16 skips steps until its loss scale is low enough
        take(1)
        if engine.was_step_applied():
            break
    return take
