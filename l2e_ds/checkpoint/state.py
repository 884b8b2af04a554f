"""Hold what a run must remember beside weights, optimizer and the method's statistics."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class TrainState:
    """Holds where training is.

    step: global batches consumed (= optimizer steps tried); applied: those that changed the weights;
    tokens: consumed in training; evaluated, evaluated_on_tasks: steps of the newest finished evaluations; streams:
    the position of each set that is a stream, by name (on rank 0); guard: what `guard.judge_evaluation` remembers;
    gradient_norms: of the last `training.spike_window` applied steps, where `training.spike_deviations` is given.
    """

    step: int = 0
    applied: int = 0
    tokens: int = 0
    evaluated: int = -1
    evaluated_on_tasks: int = -1
    streams: dict[str, dict[str, Any]] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    gradient_norms: list[float] = field(default_factory=list)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return this rank's random states as tensors: Python, NumPy, torch on the CPU and on its device."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert isinstance(keys, np.ndarray) and (version, name) == (3, "MT19937")
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Set the random states that `rng_state` returned; a GPU's is left alone if they are of a CPU."""
    has_gauss, gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss if has_gauss else None))
    position, numpy_gauss, cached = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(numpy_gauss), cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_everything(seed: int, rank: int) -> None:
    """Seed this rank's random states, each rank with another seed; neither batches nor first weights draw from them."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed this rank's random states where it resumes at `step` without the saved states of a rank."""
    seed_everything(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]), 0)
