"""Find the largest micro-batch that fits, once, and remember it: `training.micro_batch: auto` (docs/micro-batch.md).

Every rank starts a child process that trains micro-batches of random tokens, and the ranks decide together which size
to try next. A child that runs out of memory, hangs or is killed does no harm to its parent.

A size is a number of sequences per micro-batch; memory is in bytes per rank.
"""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import psutil
import torch

from l2e_ds.config.batch import abbreviate, divisors
from l2e_ds.config.sections import RunConfig
from l2e_ds.console import say
from l2e_ds.distributed import collectives, heartbeat
from l2e_ds.engine.configuration import memory_remedies
from l2e_ds.errors import ConfigError
from l2e_ds.system.memory import cgroup_room
from l2e_ds.training.micro_batch_trial import Measured, child_process

FILE = "micro_batch.json"
USABLE = 0.9  # share of memory; the rest is for evaluations, checkpoints, fragmentation and other processes
GAIN = 1.05  # by which a larger micro-batch must be faster on CPUs, where measuring takes long and memory is plentiful

GIB = 2**30


def find(
    config: RunConfig, ds: dict, hf_config: Any, device: torch.device, limit: float | None = None
) -> tuple[int, str | None]:
    """Return the micro-batch of a run that was resolved with `auto`, and the text to write to FILE if it was measured.

    hf_config: the Hugging Face configuration of the model. On CPUs a larger micro-batch must also be faster, unless
    `limit`, in bytes, replaces what a rank may use (`_devices`). Collective. Raises ConfigError if not even 1 fits,
    WorkerError if measuring fails, and Interrupted.
    """
    path = Path(config.training.run_directory) / FILE
    candidates = divisors(config.training.global_batch // collectives.size())
    if candidates == [1]:
        return 1, None  # a rank has one sequence
    devices, usable = _devices(device)
    about = circumstances(config, ds, collectives.size()) | {"devices": devices}
    number, problem = collectives.broadcast_object(remembered(path, about, candidates))
    if number is not None:
        _say(f"micro-batch {number} (remembered in {path})")
        return number, None
    if problem is not None:
        _say(f"{path}: {problem}; measuring the micro-batch again")
    by_speed = device.type == "cpu" and limit is None
    limit = usable if limit is None else limit
    known = _measure(config, ds, hf_config, candidates, limit, by_speed)
    number = choose(known, limit, by_speed)
    if number is None:
        raise ConfigError(none_fits_message(known, limit, memory_remedies(config, ds)))
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
    return number, json.dumps(record, indent=2) + "\n"


def circumstances(config: RunConfig, ds: dict, ranks: int) -> dict[str, Any]:
    """Return what the memory of a micro-batch depends on, except the devices, as it would be read back from JSON."""
    varying = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    inhibition = config.inhibition.model_dump(
        mode="json", include={"method", "retrieval", "mechanism", "loss", "layers", "reduce", "fused"}
    )
    about = {
        "ranks": ranks,
        "global_batch": config.training.global_batch,
        "sequence_length": config.data.sequence_length,
        "precision": config.training.precision,
        "deterministic": config.training.deterministic,
        "model": config.model.model_dump(mode="json"),
        "inhibition": inhibition,
        "deepspeed": {key: value for key, value in ds.items() if key not in varying},
    }
    return json.loads(json.dumps(about))


def remembered(path: Path, about: dict[str, Any], candidates: list[int]) -> tuple[int | None, str | None]:
    """Return the micro-batch that a file holds for these circumstances and None, or None and why it holds none.

    Without a file both are None. If `about` lacks `devices`, as in a dry run, those of the file are not compared.
    candidates: the micro-batches that divide the rank's share of a global batch.
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


def _devices(device: torch.device) -> tuple[list[str], float]:
    """Return each kind of device of all ranks once (name, memory, of CPUs how many ranks share it), and the number of
    bytes that every rank may use. Collective."""
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
        found = collectives.all_gather_objects((f"{name}, {memory / GIB:.0f} GiB", memory))
        return sorted({kind for kind, _ in found}), USABLE * min(memory for _, memory in found)
    total, free = f"cpu, {psutil.virtual_memory().total / GIB:.0f} GiB", psutil.virtual_memory().available
    own = (socket.gethostname(), total, min(free, cgroup_room()))
    found = collectives.all_gather_objects(own)  # read by all before any begins to use it
    hosts = [host for host, *_ in found]
    kinds = {f"{total}, {hosts.count(host)} ranks" for host, total, _ in found}
    return sorted(kinds), USABLE * min(free for *_, free in found) / max(map(hosts.count, hosts))


def _say(line: str) -> None:
    if collectives.is_main():
        say(f"l2e-ds: {line}")


def next_size(candidates: list[int], known: dict[int, Measured], limit: float, by_speed: bool) -> int | None:
    """Return the size to measure next, or None if what is known decides.

    candidates: ascending; known: what was measured, by size; limit: in bytes. Only a size that should fit (`estimate`)
    is tried, except that without `by_speed` the second one is tried in any case. With it sizes at most double.
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
    """Return the estimated peak of a size, in bytes.

    It lies on the line through the two largest known sizes. With one known size, all that forward and backward added is
    taken to grow with the size.
    """
    last = max(known)
    one = known[last]
    slope = (one.working - one.base) / last
    if len(known) > 1:
        before = sorted(known)[-2]
        slope = max(0.0, (one.working - known[before].working) / (last - before))
    return max(one.stepping, one.working + slope * (size - last))


def choose(known: dict[int, Measured], limit: float, by_speed: bool) -> int | None:
    """Return the largest measured size that fits, or None; with `by_speed`, as long as each is faster by GAIN."""
    fitting = sorted(size for size, one in known.items() if one.peak <= limit)
    if not fitting or not by_speed:
        return fitting[-1] if fitting else None
    best = fitting[0]
    for size in fitting[1:]:
        if size / known[size].seconds < GAIN * best / known[best].seconds:
            break
        best = size
    return best


def none_fits_message(known: dict[int, Measured], limit: float, remedies: str) -> str:
    """Return what to tell the user if `choose` finds no size. remedies: what needs less memory."""
    needed = f"{known[1].peak / GIB:.2f} GiB" if 1 in known else "more than there is"
    return (
        f"training.micro_batch: got auto, but not even 1 fits: it needs {needed}, and {limit / GIB:.2f} GiB per rank"
        f" are usable; try {remedies}"
    )


def _measure(
    config: RunConfig, ds: dict, hf_config: Any, candidates: list[int], limit: float, by_speed: bool
) -> dict[int, Measured]:
    """Return what was measured of each size that did not run out of memory. Collective. Raises WorkerError,
    Interrupted."""
    known: dict[int, Measured] = {}
    while next_size(candidates, known, limit, by_speed) is not None:
        with child_process(config, ds, hf_config) as ask:
            while (size := next_size(candidates, known, limit, by_speed)) is not None:
                heartbeat.progress(f"measuring micro-batch {size}")
                found = ask(size)
                if found is None:  # out of memory, which this child does not survive
                    candidates = [smaller for smaller in candidates if smaller < size]
                    break
                known[size] = found
    return known
