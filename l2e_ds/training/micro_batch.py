"""`training.micro_batch: auto`: the largest micro-batch that fits, measured once and remembered (docs/micro-batch.md).

Every rank starts a child process that builds the run's network, inhibitor and engine and takes micro-batches of random
tokens through them; the ranks together decide which size to try next. A child that runs out of memory, hangs in a
collective or is killed is ended without harm to its parent, and the run itself begins as if nothing had been measured.

Sizes are bytes of a rank; B sequences a micro-batch, T tokens a sequence.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch

from l2e_ds import distributed
from l2e_ds.config import RunConfig, abbreviate, divisors
from l2e_ds.console import say
from l2e_ds.data.files import one_line
from l2e_ds.data.workers import serve_parent, without_stop_signals
from l2e_ds.errors import ConfigError, WorkerError
from l2e_ds.training import preemption
from l2e_ds.training.deepspeed_config import less_memory
from l2e_ds.training.metrics import process_memory

FILE = "micro_batch.json"
USABLE = 0.9  # of the device's memory; the rest: evaluations, checkpoints, fragmentation, what others do meanwhile
GAIN = 1.05  # by which a larger micro-batch must be faster on CPUs, where measuring takes long and memory is plenty

_OUT_OF_MEMORY = "out of memory"
_MEETING = 0.5  # seconds between two meetings of the ranks while their children work
GIB = 2**30


@dataclass(frozen=True)
class Measured:
    """Of one micro-batch, bytes: held before the forward of the second one; peak of its forward and backward; peak of
    the optimizer step. seconds: of forward and backward, the faster one's."""

    base: float
    working: float
    stepping: float
    seconds: float

    @property
    def peak(self) -> float:
        return max(self.working, self.stepping)


@dataclass(frozen=True)
class Found:
    """record: what to write to FILE of the run directory; None where it was remembered."""

    micro_batch: int
    record: str | None


def find(
    config: RunConfig,
    ds: dict,
    network: Any,
    device: torch.device,
    limit: float | None = None,
    by_speed: bool | None = None,
) -> Found:
    """The micro-batch of a run that was resolved with `auto`: remembered, or measured. Collective.

    network: the Hugging Face configuration. limit: bytes that a rank may use; default: USABLE of the device's memory,
    on CPUs of what is free, divided by the ranks of this host. by_speed: whether a larger one must also be faster;
    default: on CPUs.
    Raises ConfigError where not even 1 fits, WorkerError where measuring fails, Interrupted.
    """
    path = Path(config.training.run_directory) / FILE
    candidates = divisors(config.training.global_batch // distributed.size())
    if candidates == [1]:
        return Found(1, None)  # a rank has one sequence
    about = circumstances(config, ds, distributed.size()) | {"devices": _devices(device)}
    number, problem = distributed.main_decides(
        remembered(path, about, candidates) if distributed.is_main() else (None, None)
    )
    if number is not None:
        _say(f"micro-batch {number} (remembered in {path})")
        return Found(number, None)
    if problem is not None:
        _say(f"{path}: {problem}; measuring the micro-batch again")
    if limit is None:
        limit = min(distributed.all_gather_objects(_usable(device)))
    by_speed = device.type == "cpu" if by_speed is None else by_speed
    known = _measure(config, ds, network, candidates, limit, by_speed)
    number = choose(known, limit, by_speed)
    if number is None:
        raise ConfigError(none_fits(known, limit, less_memory(config, ds)))
    larger = max(size for size in known if known[size].peak <= limit)
    why = f"; {larger} is no faster" if larger != number else ""
    memory = f"{known[number].peak / GIB:.2f} of {limit / GIB:.2f} GiB"
    _say(f"micro-batch {number} (of {abbreviate(candidates)}; {memory}{why}; remembered in {path})")
    record = {
        "micro_batch": number,
        "usable_bytes": int(limit),
        "measured": {
            size: {"peak_bytes": int(one.peak), "seconds": round(one.seconds, 6)} for size, one in sorted(known.items())
        },
        "circumstances": about,
    }
    return Found(number, json.dumps(record, indent=2) + "\n")


# --- remembering ---------------------------------------------------------------------------------------------------


def circumstances(config: RunConfig, ds: dict, ranks: int) -> dict[str, Any]:
    """What decides how much memory a micro-batch takes, beside the devices; as JSON would give it back."""
    varying = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    inhibition = config.inhibition.model_dump(
        mode="json", include={"method", "retrieval", "mechanism", "loss", "layers", "reduce", "fused"}
    )
    about = {
        "ranks": ranks,
        "global_batch": config.training.global_batch,
        "sequence_length": config.data.sequence_length,
        "precision": config.training.precision,
        "model": config.model.model_dump(mode="json"),
        "inhibition": inhibition,
        "deepspeed": {key: value for key, value in ds.items() if key not in varying},
    }
    return json.loads(json.dumps(about))


def remembered(path: Path, about: dict[str, Any], candidates: list[int]) -> tuple[int | None, str | None]:
    """The number that `path` holds for these circumstances, or why there is none; (None, None) without a file.

    Where `about` names no devices (a dry run), those of the file are taken as they are.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        number, then = record["micro_batch"], dict(record["circumstances"])
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, KeyError, TypeError):
        return None, "is damaged"
    if "devices" not in about:
        then.pop("devices", None)
    changed = [key for key in {**then, **about} if then.get(key) != about.get(key)]
    if changed:
        return None, f"was found under other circumstances ({', '.join(changed)})"
    if type(number) is not int or number not in candidates:
        return None, "is damaged"
    return number, None


def _devices(device: torch.device) -> list[str]:
    """Of all ranks, each kind once: name, memory, and for CPUs the ranks that share it. Collective."""
    host = socket.gethostname()
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        own = f"{torch.cuda.get_device_name(device)}, {memory / GIB:.0f} GiB"
    else:
        own = f"cpu, {psutil.virtual_memory().total / GIB:.0f} GiB"
    found = distributed.all_gather_objects((host, own))
    if device.type == "cuda":
        return sorted({name for _, name in found})
    hosts = [name for name, _ in found]
    return sorted({f"{name}, {hosts.count(where)} ranks" for where, name in found})


def _say(line: str) -> None:
    if distributed.is_main():
        say(f"l2e-ds: {line}")


# --- which sizes to try ---------------------------------------------------------------------------------------------


def next_size(candidates: list[int], known: dict[int, Measured], limit: float, by_speed: bool) -> int | None:
    """The size to measure next, or None where what is known decides. candidates: ascending, from 1.

    Only a size that should fit (`estimate`) is tried; on GPUs, where to run out of memory harms nobody, the second one
    in any case. By speed sizes at most double, as long as that makes them faster.
    """
    if not known:
        return candidates[0] if candidates else None
    fitting = [size for size, one in known.items() if one.peak <= limit]
    if not fitting:
        return None
    largest = max(fitting)
    too_large = min((size for size in known if size not in fitting), default=math.inf)
    above = [size for size in candidates if largest < size < too_large]
    wanted = [size for size in above if estimate(known, size) <= limit]
    if by_speed:
        if choose(known, limit, by_speed) != largest:
            return None
        wanted = [size for size in wanted if size <= max(2 * largest, above[0])]
    elif len(known) == 1:
        wanted = wanted or above[:1]
    return max(wanted, default=None)


def estimate(known: dict[int, Measured], size: int) -> float:
    """Peak of a size. Memory grows linearly: on the line through the two largest sizes known; of one alone, as if all
    that forward and backward added to what was held before them grew with the size, which it does at most."""
    last = max(known)
    one = known[last]
    slope = (one.working - one.base) / last
    if len(known) > 1:
        before = sorted(known)[-2]
        slope = max(0.0, (one.working - known[before].working) / (last - before))
    return max(one.stepping, one.working + slope * (size - last))


def choose(known: dict[int, Measured], limit: float, by_speed: bool) -> int | None:
    """The largest measured size that fits, None where none does; by speed the last that was faster, by GAIN, than the
    one before it."""
    fitting = sorted(size for size, one in known.items() if one.peak <= limit)
    if not fitting or not by_speed:
        return fitting[-1] if fitting else None
    best = fitting[0]
    for size in fitting[1:]:
        if size / known[size].seconds < GAIN * best / known[best].seconds:
            break
        best = size
    return best


def none_fits(known: dict[int, Measured], limit: float, remedies: str) -> str:
    """What to tell the user where `choose` finds none."""
    needed = f"{known[1].peak / GIB:.2f} GiB" if 1 in known else "more than there is"
    return (
        f"training.micro_batch: got auto, but not even 1 fits: it needs {needed}, usable are {limit / GIB:.2f} GiB a"
        f" rank; try {remedies}"
    )


# --- memory of a rank -----------------------------------------------------------------------------------------------


def _usable(device: torch.device) -> float:
    """Bytes that this rank may use. Collective."""
    hosts = distributed.all_gather_objects(socket.gethostname())
    if device.type == "cuda":
        return USABLE * torch.cuda.get_device_properties(device).total_memory
    free = min(psutil.virtual_memory().available, cgroup_room())
    free = min(distributed.all_gather_objects(free))  # read by all before any begins to use it
    return USABLE * free / hosts.count(socket.gethostname())


def cgroup_room(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that a container or a job may still use (cgroup v2); infinite where nothing limits it."""
    room = math.inf
    with suppress(OSError, ValueError):
        line = next((line for line in own.read_text().splitlines() if line.startswith("0::")), "0::/")
        folder = root / line.removeprefix("0::").strip("/")
        while folder == root or root in folder.parents:
            with suppress(OSError, ValueError):  # a folder without a limit has no such files, or "max" in them
                most, now = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
                cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                room = min(room, most - now + int(cached.get("inactive_file", 0)))
            folder = folder.parent
    return room


def _held(device: torch.device) -> float:
    """On a GPU all that is in use there: also CUDA contexts, NCCL's buffers, and other processes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return process_memory("VmRSS")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> float:
    """Of what `_held` counts, since `_forget_peak`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return _held(device) - torch.cuda.memory_reserved(device) + torch.cuda.max_memory_reserved(device)
    return process_memory("VmHWM")


# --- the ranks' side ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Child:
    process: BaseProcess
    connection: Connection


def _measure(
    config: RunConfig, ds: dict, network: Any, candidates: list[int], limit: float, by_speed: bool
) -> dict[int, Measured]:
    """Of every size that had to be tried and did not run out of memory, the worst over the ranks. Collective."""
    known: dict[int, Measured] = {}
    child = None
    try:
        while (size := next_size(candidates, known, limit, by_speed)) is not None:
            distributed.progress(f"measuring micro-batch {size}")
            child = child or _start(config, ds, network)
            found = _ask(child, size, 60 * config.training.timeout)
            if found is not None:
                known[size] = found
                continue
            candidates = [smaller for smaller in candidates if smaller < size]
            _end(child)
            child = None
    finally:
        if child is not None:
            _end(child)
    return known


def _start(config: RunConfig, ds: dict, network: Any) -> _Child:
    """A spawned process that has this rank's place in a group of its own. Collective."""
    port = distributed.main_decides(distributed.free_port() if distributed.is_main() else None)
    variables = {"RANK": distributed.rank(), "WORLD_SIZE": distributed.size(), "MASTER_PORT": port}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, variables, config, ds, network), daemon=True)
    with without_stop_signals():
        process.start()
    theirs.close()
    return _Child(process, ours)


def _end(child: _Child) -> None:
    """At once, whatever it does; its memory on the device is free when this returns."""
    child.process.kill()
    child.process.join()
    child.connection.close()


def _ask(child: _Child, size: int, patience: float) -> Measured | None:
    """Let all children take micro-batches of this size. Collective; None where any rank ran out of memory.

    The ranks meet again and again meanwhile: the child of one may have failed, and the others' wait for it for ever.
    """
    with suppress(OSError):  # it has ended: seen below
        child.connection.send(size)
    answer: Measured | str | None = None
    waited, meetings_after_failure = 0.0, 0
    while True:
        preemption.stop_if_asked()
        if answer is None:
            answer = _answer(child)
            waited += _MEETING  # by no clock, which goes on where this process is suspended
            if answer is None and waited > patience:
                answer = f"no answer in {patience / 60:g} minutes (training.timeout)"
        else:
            time.sleep(_MEETING)
        answers = distributed.all_gather_objects(answer)
        if _OUT_OF_MEMORY in answers:
            return None
        failed = [(rank, said) for rank, said in enumerate(answers) if isinstance(said, str)]
        # a child that was killed for its memory may show a moment later than those that lost contact with it
        meetings_after_failure += bool(failed)
        if meetings_after_failure > 3:
            rank, said = failed[0]
            error = WorkerError(f"training.micro_batch: auto: measuring {size} failed on rank {rank}: {said}")
            error.on_every_rank = True
            raise error
        if all(isinstance(said, Measured) for said in answers):
            columns = zip(*(vars(said).values() for said in answers), strict=True)
            return Measured(*map(max, columns))


def _answer(child: _Child) -> Measured | str | None:
    """What it says within the time between two meetings, or what became of it."""
    try:
        return child.connection.recv() if child.connection.poll(_MEETING) else None
    except (EOFError, OSError):
        child.process.join()
        code = child.process.exitcode
        return _OUT_OF_MEMORY if code == -signal.SIGKILL else f"its process ended with exit code {code}"


# --- the child's side -----------------------------------------------------------------------------------------------


def _serve(connection: Connection, variables: dict[str, Any], config: RunConfig, ds: dict, network: Any) -> None:
    """Answer each size that is asked for until the parent ends this process."""
    serve_parent()
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's store is for the rendezvous of its own ranks
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        from l2e_ds.train import quiet_libraries

        quiet_libraries()
        rank, ranks, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        device = distributed.join(distributed.Launch("parent", rank, ranks, local_rank), config.training.timeout)
        take = _build(config, ds, network, device)
        while True:
            connection.send(take(connection.recv()))
    except EOFError:
        return
    except Exception as error:
        connection.send(_OUT_OF_MEMORY if _is_out_of_memory(error) else f"{type(error).__name__}: {one_line(error)}")
        threading.Event().wait()  # the others must hear this, not that they lost contact


def _is_out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def _build(config: RunConfig, ds: dict, network: Any, device: torch.device) -> Callable[[int], Measured]:
    """The run's network, inhibitor and engine, after a first step, so that the optimizer has all of its states.

    Returns what takes two micro-batches of a size through them, as the trainer does, and measures the second. Of the
    size that makes a whole global batch each is a step of its own; of the others both together are.
    """
    from l2e_ds.inhibition import Inhibitor
    from l2e_ds.models import build_network, neuron_sites
    from l2e_ds.training.deepspeed_config import zero_stage
    from l2e_ds.training.engine import build_engine
    from l2e_ds.training.loss import LossHead
    from l2e_ds.training.trainer import inhibition_settings

    ranks = distributed.size()
    share = config.training.global_batch // ranks
    accumulation = min(2, share)
    config = config.replace(
        "inhibition", start=0, warmup=0, decay=0, end=None
    )  # with its loss's gradient, as in later steps
    ds = ds | {"train_batch_size": accumulation * ranks, "gradient_accumulation_steps": accumulation}
    ds |= {"train_micro_batch_size_per_gpu": 1}
    model = build_network(config.model, network, config.training.seed, ds if zero_stage(ds) == 3 else None)
    inhibitor = None
    if config.inhibition.method != "none":
        sites = neuron_sites(model, config.inhibition.layers)
        inhibitor = Inhibitor(sites, inhibition_settings(config), device)
        inhibitor.attach()
    head = LossHead(model)
    engine = build_engine(model, config, ds, device)
    random = torch.Generator().manual_seed(distributed.rank())

    def take(size: int) -> Measured:
        seconds = math.inf
        for ends_step in (size == share, True):
            engine.set_gradient_accumulation_boundary(ends_step)
            rows = torch.randint(network.vocab_size, (size, config.data.sequence_length + 1), generator=random)
            rows = rows.to(device)
            _forget_peak(device)
            base, begin = _held(device), time.perf_counter()
            loss = head.loss(engine, rows[:, :-1], rows[:, 1:])
            if inhibitor is not None:
                loss = inhibitor.attach_loss(loss)
            engine.backward(loss)
            working = _peak(device)
            seconds = min(seconds, time.perf_counter() - begin)
            _forget_peak(device)
            engine.step()
            if ends_step and inhibitor is not None:
                inhibitor.step(engine.was_step_applied())
        return Measured(base, working, _peak(device), seconds)

    for _ in range(30):  # fp16 passes over steps until its loss scale is low enough
        take(1)
        if engine.was_step_applied():
            break
    return take
