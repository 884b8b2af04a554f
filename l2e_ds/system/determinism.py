"""Deterministic algorithms of PyTorch, for as long as they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def allow_deterministic_products() -> None:
    """Give cuBLAS a workspace with which its products are deterministic; to be called before this process's first
    product. A value of the user's is kept."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let PyTorch use deterministic algorithms only, and raise a RuntimeError where an operation has none.

    On CPUs nothing changes. On GPUs `allow_deterministic_products` must have been called.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds bugs, takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
