"""Divide a global batch into ranks, accumulation steps and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l2e_ds.config.sections import RunConfig
from l2e_ds.errors import ConfigError


@dataclass(frozen=True)
class BatchArithmetic:
    """Holds global_batch = micro_batch * ranks * accumulation (sequences) and tokens_per_step, that times T."""

    global_batch: int
    micro_batch: int
    ranks: int
    accumulation: int
    tokens_per_step: int

    def __str__(self) -> str:
        return (
            f"{self.global_batch} sequences = {self.micro_batch} micro-batch x {self.ranks} ranks"
            f" x {self.accumulation} accumulation steps; {self.tokens_per_step:,} tokens a step"
        )


def batch_arithmetic(config: RunConfig, ranks: int) -> BatchArithmetic:
    """Return how a run's global batch is divided among so many ranks; `micro_batch: auto` counts as 1 until it is
    found. Raises ConfigError if no whole number of accumulation steps gives the global batch."""
    batch, micro = config.training.global_batch, config.training.micro_batch
    if micro == "auto":
        if batch % ranks:
            raise ConfigError(
                f"training.global_batch: {batch} is not a multiple of {ranks} ranks (training.micro_batch: auto divides"
                f" the rest); make it a multiple of {ranks}"
            )
        micro = 1
    if batch % (micro * ranks):
        fitting = divisors(batch // ranks) if batch % ranks == 0 else []
        allowed = (
            f"allowed micro-batches: {abbreviate(fitting)}" if fitting else f"make it a multiple of {micro * ranks}"
        )
        raise ConfigError(
            f"training.global_batch: {batch} is not a multiple of training.micro_batch {micro} x {ranks} ranks;"
            f" {allowed}"
        )
    return BatchArithmetic(batch, micro, ranks, batch // (micro * ranks), batch * config.data.sequence_length)


def divisors(number: int) -> list[int]:
    """Return the divisors up to 10,000: no micro-batch is larger."""
    return [m for m in range(1, min(number, 10_000) + 1) if number % m == 0]


def abbreviate(numbers: Sequence[int]) -> str:
    """Return up to eight numbers as text, of more the first and last ones."""
    shown = [str(n) for n in numbers]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]])
