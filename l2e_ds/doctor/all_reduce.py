"""Is the all-reduce between the ranks right, how fast is it, and which rank is slow: what `l2e-ds doctor` measures."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from l2e_ds.distributed import collectives

_KIB, _MIB = 2**10, 2**20
SIZES = {"cpu": (8, 256 * _KIB, 4 * _MIB, 64 * _MIB), "cuda": (8, _MIB, 32 * _MIB, 256 * _MIB)}
"""Bytes a rank, by device; the first is small enough for its time to be the latency."""


@dataclass(frozen=True)
class Timing:
    """Calls of one size (bytes a rank): how many, the median and the longest, in seconds; right: every sum was."""

    size: int
    calls: int
    median: float
    longest: float
    right: bool = True


@dataclass(frozen=True)
class Measurement:
    """Of one rank. speed: of its matrix products, in 10^9 operations a second, while all ranks do the same."""

    timings: list[Timing]
    speed: float

    @property
    def wrong(self) -> list[int]:
        """Sizes for which this rank saw a sum that was not the sum of all ranks."""
        return [timing.size for timing in self.timings if not timing.right]


def measure(device: torch.device, seconds: float) -> Measurement:
    """All-reduce several sizes for about `seconds` in all, and compare every result with the sum. Collective."""
    speed, sizes = matrix_speed(device, seconds / 10), SIZES[device.type]
    return Measurement([_time_one_size(device, size, seconds * 0.9 / len(sizes)) for size in sizes], speed)


def matrix_speed(device: torch.device, seconds: float) -> float:
    """Return 10^9 operations a second of square matrix products for about `seconds` (at least three products)."""
    side, dtype = (4096, torch.float16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.ones(side, side, device=device, dtype=dtype) / side
    products, began = -3, 0.0
    while products < 3 or time.perf_counter() - began < seconds:
        if products == 0:  # the first three warm up
            began = time.perf_counter()
        matrix @ matrix
        _wait(device)
        products += 1
    return products * 2 * side**3 / (time.perf_counter() - began) / 1e9


def expected_sum(pattern: Tensor, ranks: int) -> Tensor:
    return pattern * sum(_weight(rank) for rank in range(ranks))


def _time_one_size(device: torch.device, size: int, seconds: float) -> Timing:
    # small integers: float32 adds them without rounding, in any order, so the sum can be compared exactly
    pattern = (torch.arange(size // 4, device=device) % 7 + 1).float()
    mine, expected = pattern * _weight(collectives.rank()), expected_sum(pattern, collectives.size())
    tensor, right = torch.empty_like(mine), True
    times: list[float] = []
    batch = 20 if size < _KIB else 1  # how often rank 0 is asked whether to go on
    deadline = time.perf_counter() + seconds
    while collectives.main_decides(len(times) < 4 or time.perf_counter() < deadline):
        for _ in range(batch):
            tensor.copy_(mine)
            _wait(device)
            began = time.perf_counter()
            dist.all_reduce(tensor)
            _wait(device)
            times.append(time.perf_counter() - began)
            right = right and torch.equal(tensor, expected)
    times = times[1:]  # the first call opens connections
    return Timing(size, len(times), statistics.median(times), max(times), right)


def _weight(rank: int) -> int:
    """Return what a rank multiplies the pattern with: not the same for all, and small for any number of ranks."""
    return rank % 16 + 1


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
