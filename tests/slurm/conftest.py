"""A real SLURM of two nodes on this machine, started and stopped by a fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.reliability.virtual_slurm import virtual_slurm, why_not


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """Yield the environment in which srun, sbatch and scontrol reach the cluster."""
    problem = why_not()
    if problem is not None:
        pytest.skip(problem)
    with virtual_slurm() as environment:
        yield environment
