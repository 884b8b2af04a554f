"""How much memory this process uses and may still use."""

from __future__ import annotations

import ctypes
import math
import os
from contextlib import suppress
from pathlib import Path

import torch

from l2e_ds.errors import L2EError


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of the memory allocated on the GPU, or on a CPU that of the process's resident set.

    (getrusage would count what its parent had, too.)
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_memory("VmHWM")


def process_memory(name: str) -> int:
    """Return bytes of this process by a name in /proc/self/status: VmRSS (resident), VmHWM (its peak), RssAnon (no
    file's).

    Raises L2EError if the system does not report it.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise L2EError(f"/proc/self/status: has no {name}")


def cgroup_room(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return bytes that a container or a job may still use (cgroup v2); infinite where nothing limits it."""
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


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator says that a GPU or this machine has no memory left; an error of ours is none."""
    if isinstance(error, L2EError):
        return False
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def keep_freed_memory() -> None:
    """Let glibc keep the memory that large tensors free, instead of returning it and asking for zeroed pages again.

    A step on a CPU frees and takes hundreds of megabytes; without this a fifth of its time goes into page faults
    (docs/speed.md). The process then stays at its peak. Variables MALLOC_*_THRESHOLD_ of the user's decide for
    themselves, and other C libraries are left alone.
    """
    if {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        if not mallopt(mmap_threshold, 2**30):
            mallopt(mmap_threshold, 2**25)  # glibc before 2.35 refuses more
        mallopt(trim_threshold, 2**31 - 1)
