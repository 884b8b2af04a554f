"""`l2e-ds checkpoint list | verify | prune RUN`: list, verify or remove what a run has saved."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

from l2e_ds.checkpoint.manager import read_state, remove_checkpoint
from l2e_ds.console import at_least
from l2e_ds.errors import CheckpointError, ConfigError
from l2e_ds.run_directory.lock import RunLock
from l2e_ds.run_directory.manifest import CANNOT_BE_READ, check_files, read_manifest, verify
from l2e_ds.run_directory.names import MANIFEST, is_checkpoint, published_checkpoints, step_of


def _published(run: Path) -> list[Path]:
    if not (run / "checkpoints").is_dir():
        raise CheckpointError(f"{run}: is not a run directory (it has no folder checkpoints)")
    return published_checkpoints(run)


def list_checkpoints(arguments: argparse.Namespace) -> int:
    """Print a run's checkpoints and what names and sizes show to be wrong with them. Raises CheckpointError."""
    rows = [("step", "written", "GB", "ranks", "ZeRO", "state")]
    for path in _published(arguments.run):
        files, problem = read_manifest(path), check_files(path)
        size = "?" if isinstance(files, str) else f"{sum(int(file['bytes']) for file in files.values()) / 1e9:.3f}"
        ranks = stage = "?"
        if problem is None:
            try:
                identity = read_state(path)["identity"]
                ranks, stage = str(identity["ranks"]), str(identity["zero_stage"])
            except CheckpointError as error:
                problem = str(error)
        try:
            written = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.lstat().st_mtime))
        except FileNotFoundError:  # the run has removed it meanwhile
            continue
        rows.append((str(step_of(path)), written, size, ranks, stage, problem or "complete"))
    for suffix, state in ((".damaged", "set aside: a resume passed over it"), (".tmp", "not finished")):
        rows += [(path.name, "", "", "", "", state) for path in _folders(arguments.run, suffix)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:5]
    for row in rows:
        print("  ".join([*(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False)), row[5]]))
    return 0


def verify_checkpoints(arguments: argparse.Namespace) -> int:
    """Read every byte of a run's checkpoints (or of one) and print what is wrong. Raises CheckpointError."""
    run, step = arguments.run, arguments.step
    if is_checkpoint(run) and run.is_dir():
        if step is not None:
            raise CheckpointError(f"--step: goes with a run directory, {run} is a checkpoint")
        paths = [run]
    else:
        paths = [path for path in _published(run) if step in (None, step_of(path))]
        if not paths:
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise CheckpointError(f"{run}: has no {wanted}")
    bad = 0
    for path in paths:
        problem = verify(path)
        if problem is not None and not os.path.lexists(path):
            print(f"{path.name}  removed meanwhile", flush=True)
            continue
        bad += problem is not None
        print(f"{path.name}  {problem or 'good'}", flush=True)
    if bad:
        raise CheckpointError(f"{bad} of {len(paths)} checkpoints cannot be used")
    return 0


def prune_checkpoints(arguments: argparse.Namespace) -> int:
    """Remove all but the newest undamaged checkpoints and those of every so many steps.

    Raises, before anything is removed, ConfigError, and CheckpointError where none is undamaged or one cannot be read,
    as that may be for now only; and CheckpointError where one cannot be removed.
    """
    run, keep_every = arguments.run, arguments.keep_every
    at_least("--keep-last", arguments.keep_last, 1)
    at_least("--keep-every", keep_every, 1)
    published = _published(run)
    for path in published:
        _refuse_unreadable(path)
    good = [path for path in published if check_files(path) is None]
    kept: list[Path] = []
    for path in reversed(good):  # every byte of the newest ones is verified: they must be worth keeping
        if len(kept) == arguments.keep_last:
            break
        problem = verify(path)
        if problem is None:
            kept.append(path)
        else:
            if CANNOT_BE_READ in problem:
                raise CheckpointError(f"{path}: {problem}; nothing is removed")
            print(f"{path.name}  {problem}", file=sys.stderr)
    if published and not kept:
        raise CheckpointError(f"{run}: has no undamaged checkpoint; nothing is removed")
    if keep_every:
        kept += [path for path in good if step_of(path) % keep_every == 0]

    def remove(doomed: list[Path]) -> None:
        for path in doomed:
            if not arguments.dry_run:
                try:
                    remove_checkpoint(path)
                except OSError as error:
                    raise CheckpointError(f"{path}: cannot be removed ({error.strerror})") from None
            print(f"{'would remove' if arguments.dry_run else 'removed'} {path.name}")

    with contextlib.suppress(ConfigError), RunLock(run):  # else a run has it, and may be writing such a folder
        remove(_folders(run, ".tmp"))
    remove([path for path in published if path not in kept] + _folders(run, ".damaged"))
    print(f"kept {', '.join(str(step_of(path)) for path in sorted(set(kept))) or 'nothing'}")
    return 0


def _refuse_unreadable(checkpoint: Path) -> None:
    """Raise CheckpointError if it cannot be known whether a checkpoint has all its files."""
    files = read_manifest(checkpoint)
    try:
        for name in [MANIFEST] if isinstance(files, str) else [MANIFEST, *files]:
            with contextlib.suppress(FileNotFoundError), open(checkpoint / name, "rb"):
                pass
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {CANNOT_BE_READ} ({error.strerror}); nothing is removed") from None


def _folders(run: Path, suffix: str) -> list[Path]:
    return sorted(path for path in (run / "checkpoints").glob(f"step*{suffix}") if path.is_dir())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="list|verify|prune")
    listing = verbs.add_parser("list", help="steps, sizes, ranks and what is wrong with them by name and size")
    listing.add_argument("run", type=Path, metavar="RUN")
    listing.set_defaults(of_checkpoints=list_checkpoints)
    verifying = verbs.add_parser("verify", help="read every byte and compare with the manifest")
    verifying.add_argument("run", type=Path, metavar="RUN|CHECKPOINT")
    verifying.add_argument("--step", type=int, help="of a run: only this checkpoint")
    verifying.set_defaults(of_checkpoints=verify_checkpoints)
    pruning = verbs.add_parser("prune", help="remove old checkpoints")
    pruning.add_argument("run", type=Path, metavar="RUN")
    pruning.add_argument("--keep-last", type=int, required=True, metavar="N", help="keep the newest N good ones")
    pruning.add_argument("--keep-every", type=int, metavar="K", help="also keep those whose step is a multiple of K")
    pruning.add_argument("--dry-run", action="store_true", help="print what would be removed, and stop")
    pruning.set_defaults(of_checkpoints=prune_checkpoints)


def run(arguments: argparse.Namespace) -> int:
    """Run one of the three commands. Raises ConfigError or CheckpointError."""
    return arguments.of_checkpoints(arguments)
