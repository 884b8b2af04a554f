"""Measure the all-reduce between ranks for `l2e-ds doctor`: whether its sums are right, and how fast it is."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from l2e_ds.distributed import collectives

_KIB, _MIB = 2**10, 2**20
SIZES = {"cpu": (8, 256 * _KIB, 4 * _MIB, 64 * _MIB), "cuda": (8, _MIB, 32 * _MIB, 256 * _MIB)}
"""Bytes that each rank contributes, by device; the first is small enough for its time to be the latency."""


@dataclass(frozen=True)
class Timing:
    """Holds the all-reduces of one size, in bytes, as one rank saw them; times in seconds."""

    size: int
    calls: int
    median: float
    longest: float
    is_right: bool = True


def measure(device: torch.device, seconds: float) -> list[Timing]:
    """All-reduce several sizes for about `seconds` in all, and compare every result with the sum. Collective."""
    sizes = SIZES[device.type]
    return [_time_one_size(device, size, seconds / len(sizes)) for size in sizes]


def _time_one_size(device: torch.device, size: int, seconds: float) -> Timing:
    # small integers: float32 adds them without rounding, in any order, so the sum can be compared exactly
    pattern = (torch.arange(size // 4, device=device) % 7 + 1).float()
    mine = pattern * _weight(collectives.rank())
    expected = pattern * sum(_weight(rank) for rank in range(collectives.size()))
    tensor, is_right, times = torch.empty_like(mine), True, list[float]()
    deadline = time.perf_counter() + seconds
    while collectives.broadcast_object(len(times) < 4 or time.perf_counter() < deadline):
        tensor.copy_(mine)
        get_accelerator().synchronize()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        get_accelerator().synchronize()
        times.append(time.perf_counter() - began)
        is_right = is_right and torch.equal(tensor, expected)
    times = times[1:]  # the first call opens connections
    return Timing(size, len(times), statistics.median(times), max(times), is_right)


def _weight(rank: int) -> int:
    """Return the factor of a rank's contribution: it differs between ranks, and is small for any number of them."""
    return rank % 16 + 1
