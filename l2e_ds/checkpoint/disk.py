"""What checkpoints take of the disk, and when they are due. Imports nothing slow: a dry run reads it."""

from __future__ import annotations

import shutil
from pathlib import Path

from l2e_ds.config.sections import RunConfig

MASTER = 4  # bytes of a float32 master weight
EARLY = frozenset({0, *(2**i for i in range(10))})  # steps of the early checkpoints


def is_due(step: int, last: int, every: int, early: bool) -> bool:
    """Return whether a checkpoint is due: at the end, every N steps, and early as Pythia (0, 1, 2, 4 ... 512)."""
    return step == last or bool(every and step > 0 and step % every == 0) or (early and step in EARLY)


def count_due(last: int, every: int, early: bool) -> int:
    """Return at how many steps from 0 to `last` a checkpoint is due."""
    others = {last, *(step for step in EARLY if early and step <= last)}
    multiples = last // every if every else 0
    return multiples + sum(not (every and step > 0 and step % every == 0) for step in others)


def moment_bytes(optimizer: str, parameters: int, matrices: int) -> int:
    """Return the bytes of an optimizer's moments: of AdamW two float32 a parameter, or two bytes with 8 bits; of Muon
    one float32 for the `matrices` parameters that are its own, and AdamW's for the rest."""
    if optimizer == "muon":
        return 8 * parameters - 4 * matrices
    return {"adamw": 8, "adamw-8bit": 2}[optimizer] * parameters


def checkpoint_bytes(parameters: int, moments: int, stage: int, element: int, hooked: int, neurons: int) -> int:
    """Return the bytes of one checkpoint.

    moments: bytes of the optimizer's; stage: of ZeRO; element: bytes of a weight in the network, which stage 3 leaves
    out; hooked: number of inhibited layers, each with 4 N + 8 float64; neurons: N. In float32 stage 0 has one copy of
    the weights.
    """
    master = 0 if stage == 0 and element == 4 else MASTER
    weights = 0 if stage == 3 else element
    return parameters * (master + weights) + moments + hooked * (4 * neurons + 8) * 8


def disk_space(config: RunConfig, size: int) -> tuple[str, str | None]:
    """Return what checkpoints of `size` bytes take of the disk, and a warning if it has less, or None; a line each."""
    steps, section = config.training.steps, config.checkpoint
    written = count_due(steps, section.every, section.early)
    kept = min(written, section.keep_last or written)
    most = min(written, kept + 1) * size  # one is removed only when the next is published
    line = f"{kept:,} kept, {_readable(size)} each: {_readable(kept * size)} on disk"
    if kept < written:
        line = f"{kept:,} of {written:,}{line.removeprefix(f'{kept:,}')}, {_readable(most)} while one is written"
    directory = Path(config.training.run_directory)
    room = _room(directory)
    if room is None or most <= room:
        return line, None
    remedy = "checkpoint.keep_last=N keeps only the N newest" if kept == written else "give another run directory"
    return line, f"the disk of {directory} on this machine has only {_readable(room)} for them; {remedy}"


def _readable(size: float) -> str:
    """Return bytes as a short text, in powers of 1,000 as disks are sold."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 1e6:,.1f} MB"


def _room(run_directory: Path) -> int | None:
    """Return the bytes free on the disk of a run directory, with those of its present checkpoints; None: unknown."""
    try:
        place = next(path for path in (run_directory, *run_directory.absolute().parents) if path.exists())
        own = (path.stat().st_size for path in (run_directory / "checkpoints").rglob("*") if path.is_file())
        return shutil.disk_usage(place).free + sum(own)
    except OSError:  # a name that no folder can have: only a run on this machine refuses it
        return None
