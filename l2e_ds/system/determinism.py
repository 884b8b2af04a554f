"""Deterministic algorithms of PyTorch, for as long as they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from l2e_ds.errors import ConfigError

WORKSPACES = (":4096:8", ":16:8")
"""Of cuBLAS, with which its products are deterministic (PyTorch checks it)."""


def allow_deterministic_products() -> None:
    """Give cuBLAS a workspace with which its products are deterministic; to be called before this process's first
    product. Raises ConfigError where the user gave it another."""
    given = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACES[0])
    if given not in WORKSPACES:
        raise ConfigError(
            f"training.deterministic: the variable CUBLAS_WORKSPACE_CONFIG is {given!r}, allowed:"
            f" {' or '.join(WORKSPACES)}, or none"
        )


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let PyTorch use deterministic algorithms only, and raise a RuntimeError where an operation has none.

    On CPUs nothing changes. On GPUs `allow_deterministic_products` must have been called.
    """
    if not wanted:
        yield
        return
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds bugs, takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
