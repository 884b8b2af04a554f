"""Save, find and load checkpoints, published only when complete (docs/checkpoints.md has their files).

DeepSpeed writes `latest` before the other ranks' shards are on disk (docs/deepspeed.md, row 5). So all files are
written into `stepN.tmp`; each rank flushes its own to the disk and computes their checksums, in the background while
training continues; when all have, rank 0 writes the manifest, renames the folder and moves `latest`. All ranks agree
once a step whether that has happened (`advance`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from l2e_ds.checkpoint.changes import Changes, saved_config
from l2e_ds.checkpoint.elastic import ElasticLoad, layout, loss_scaler_state
from l2e_ds.checkpoint.state import TrainState, reseed, rng_state, set_rng_state
from l2e_ds.config.sections import RunConfig
from l2e_ds.console import say, warn
from l2e_ds.distributed import collectives
from l2e_ds.engine.engine import keeping_hyper_parameters
from l2e_ds.errors import CheckpointError, L2EError, SaveError
from l2e_ds.inhibition import Inhibitor
from l2e_ds.run_directory import manifest
from l2e_ds.run_directory.manifest import STATE
from l2e_ds.run_directory.names import checkpoint_name, published_checkpoints, step_of
from l2e_ds.system.files import error_line, fsync_path
from l2e_ds.system.provenance import versions

ELASTIC = ("ranks", "zero_stage")


Identity = dict[str, Any]
"""What must not change, except ELASTIC, between a checkpoint and the run that resumes from it, by name."""


@dataclass
class _Pending:
    """Holds a checkpoint that is written, but not published yet."""

    final: Path
    began: float
    blocked_seconds: float
    task: Future
    entries: manifest.Entries | None = None  # of all ranks, once all have secured their files


class CheckpointManager:
    """Saves, finds and loads the checkpoints of one run directory."""

    def __init__(self, run_directory: Path, keep_last: int | None = None) -> None:
        self.directory = run_directory / "checkpoints"
        self.keep_last = keep_last
        self.resume_from: Path | None = None
        """The checkpoint that the run resumes from; set by `open_checkpoints`."""
        self._pending: _Pending | None = None
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    # --- finding -------------------------------------------------------------------------------------------------

    def published(self) -> list[Path]:
        """Return the checkpoints under their final names, oldest first, damaged or not."""
        return published_checkpoints(self.directory.parent)

    def find(self, resume: str) -> Path | None:
        """Return the newest undamaged checkpoint that `training.resume` allows, or None for a fresh start. Collective;
        the ranks share the reading. Raises CheckpointError on every rank."""
        found = collectives.run_on_all(lambda: self._candidates(resume) if collectives.is_main() else [])
        candidates: list[Path] = collectives.broadcast_object(found)
        for path in reversed(candidates):
            problem = collectives.broadcast_object(manifest.check_files(path) if collectives.is_main() else None)
            if problem is None:  # each rank reads its share
                own = manifest.check_contents(path, collectives.rank(), collectives.size())
                problem = next(filter(None, collectives.all_gather_objects(own)), None)
            if problem is None:
                return path
            if collectives.is_main():
                say(f"l2e-ds: checkpoint {path}: {problem}; it is not used")
        if candidates:
            raise CheckpointError(
                f"training.resume: {candidates[-1].parent} holds checkpoints, but none is complete and undamaged;"
                " move them away to start afresh"
            )
        return None

    def _candidates(self, resume: str) -> list[Path]:
        """Return the checkpoints that `training.resume` allows, oldest first. Raises CheckpointError."""
        own = self.published()
        if resume == "never" and own:
            raise CheckpointError(
                f"training.resume: got never, but {self.directory} holds {own[-1].name};"
                " choose another training.run_directory or resume: auto"
            )
        if resume in ("auto", "never"):
            return own
        path = Path(resume)
        if own:  # requeued, or started again: PATH was where this run began
            if path.resolve().parent == self.directory.resolve() and path.resolve() != own[-1].resolve():
                raise CheckpointError(
                    f"training.resume: {path} is not the newest checkpoint of its run ({own[-1].name}); choose another"
                    " training.run_directory to branch off, or remove the later checkpoints"
                )
            return own
        if (path / "checkpoints").is_dir():
            found = [checkpoint.resolve() for checkpoint in published_checkpoints(path)]
            if not found:
                raise CheckpointError(f"training.resume: no complete checkpoint in {path}")
            return found
        problem = manifest.check_files(path) if path.is_dir() else "no such folder"
        if problem:
            raise CheckpointError(f"training.resume: {path}: {problem}; allowed: auto, never, a run or a checkpoint")
        return [path.resolve()]

    def is_own(self, path: Path) -> bool:
        """Return whether a checkpoint lies in this run's directory."""
        return path.parent.resolve() == self.directory.resolve()

    # --- saving --------------------------------------------------------------------------------------------------

    def save(
        self, engine: Any, inhibitor: Inhibitor | None, state: TrainState, identity: Identity, config: dict
    ) -> None:
        """Write a checkpoint and begin to publish it, which `advance` completes; the one before must be complete.
        Collective. Raises SaveError on every rank if any rank failed; what was written is then removed."""
        assert self._pending is None
        began = time.perf_counter()
        final = self.directory / checkpoint_name(state.step)
        temporary = final.with_suffix(".tmp")

        def prepare() -> None:
            if collectives.is_main():
                self.directory.mkdir(parents=True, exist_ok=True)
                for left_over in self.directory.glob("step*.tmp"):
                    _remove_tree(left_over)
                temporary.mkdir()

        def write() -> None:
            with _noting_failed_writes(engine) as failed:
                # all of our state under one key: other keys could overwrite the engine's (docs/deepspeed.md, row 7)
                ours = {"l2e_ds": {"step": state.step}}
                engine.save_checkpoint(str(self.directory), temporary.name, client_state=ours, save_latest=False)
            if failed:
                raise failed[0]
            # not by `save_file`, which lets only the owner read, whatever the umask
            (temporary / f"rng-rank{collectives.rank():05d}.safetensors").write_bytes(save(rng_state(engine.device)))
            if collectives.is_main():
                if inhibitor is not None:
                    (temporary / "inhibition.safetensors").write_bytes(save(inhibitor.state_dict()))
                content = {"train": asdict(state), "identity": identity, "config": config}
                content |= {"versions": versions("l2e_ds", "torch", "deepspeed")}
                content |= {"layout": layout(engine), "loss_scaler": loss_scaler_state(engine)}
                (temporary / STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

        for part in (prepare, write):
            self._agree_or_remove(_error_of(part), final)
        rank = collectives.rank()

        def secure() -> manifest.Entries:
            return manifest.flush_and_describe(temporary, manifest.files_of_rank(temporary, rank))

        task = self._background.submit(secure)
        self._pending = _Pending(final, began, time.perf_counter() - began, task)

    def advance(self, until_done: bool = False) -> tuple[int, dict[str, float]] | None:
        """Return the pending checkpoint's step and values of `kind: checkpoint` once it is published (until_done: wait
        for it), else None. Collective. Raises SaveError as `save` does."""
        while self._pending is not None:
            pending = self._pending
            if collectives.any_rank(not pending.task.done()):
                if not until_done:
                    return None
                time.sleep(0.02)
                continue
            self._agree_or_remove(pending.task.exception(), pending.final)
            if pending.entries is None:
                parts = collectives.all_gather_objects(pending.task.result())
                pending.entries = {name: entry for part in parts for name, entry in part.items()}
                publish = partial(self._publish, pending) if collectives.is_main() else lambda: None
                pending.task = self._background.submit(publish)
                continue
            self._pending = None
            return step_of(pending.final), {
                "blocked_seconds": pending.blocked_seconds,
                "published_seconds": time.perf_counter() - pending.began,
                "bytes": sum(int(entry["bytes"]) for entry in pending.entries.values()),
            }
        return None

    @property
    def is_busy(self) -> bool:
        """Whether this rank has yet to do its part of what `advance` waits for."""
        return self._pending is not None and not self._pending.task.done()

    def close(self) -> None:
        """Wait until the background thread has finished what it began, at most a minute."""
        self._background.shutdown(wait=False, cancel_futures=True)
        if self._pending is not None:
            wait([self._pending.task], timeout=60)

    def _publish(self, pending: _Pending) -> None:
        """Write the manifest and give the checkpoint its final name: on rank 0, in the background. Raises SaveError."""
        assert pending.entries is not None
        final, temporary = pending.final, pending.final.with_suffix(".tmp")
        unseen = [name for name in pending.entries if not (temporary / name).is_file()]
        if unseen:
            raise SaveError(
                f"rank 0 does not see {unseen[0]}; training.run_directory must lie on a file system shared by all nodes"
            )
        manifest.write_manifest(temporary, pending.entries)
        if final.exists():  # a damaged one
            remove_checkpoint(final)
        temporary.rename(final)
        try:
            self._tidy_up(final)
        except OSError as error:  # the checkpoint is published all the same
            warn(f"{self.directory}: {error.strerror}")

    def _tidy_up(self, newest: Path) -> None:
        """Move `latest`; set aside what a resume has passed over as damaged; remove what is no longer kept."""
        pointer = self.directory / "latest.tmp"
        pointer.write_text(newest.name + "\n", encoding="utf-8")
        fsync_path(pointer)
        pointer.replace(self.directory / "latest")
        fsync_path(self.directory)
        published = self.published()
        for path in published:
            if path > newest:  # this run resumed from an older one, which it does only if this one is damaged
                _remove_tree(path.with_suffix(".damaged"))
                path.rename(path.with_suffix(".damaged"))
        if self.keep_last is not None:
            good = [path for path in published if path <= newest and manifest.check_files(path) is None]
            for path in published:
                # never one that only seems damaged: a reading error may pass
                if good and path < good[-self.keep_last :][0]:
                    remove_checkpoint(path)

    def _agree_or_remove(self, error: BaseException | None, final: Path) -> None:
        """Remove what was written and raise SaveError on all ranks, if any failed. Collective."""
        if isinstance(error, RuntimeError) and shutil.disk_usage(self.directory).free < 1 << 20:
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # torch's writer does not report it
        reason = None if error is None else f"rank {collectives.rank()}: {_in_one_line(error)}"
        reasons = [found for found in collectives.all_gather_objects(reason) if found is not None]
        if not reasons:
            return
        self._pending = None
        kept = ""
        if collectives.is_main():
            shutil.rmtree(final.with_suffix(".tmp"), ignore_errors=True)
            good = [path.name for path in self.published() if manifest.check_files(path) is None]
            kept = f"the newest good checkpoint is {good[-1]}" if good else "there is no good checkpoint yet"
        error = SaveError(f"{final}: was not saved: {reasons[0]}; {collectives.broadcast_object(kept)}")
        error.step = step_of(final)
        raise error

    # --- loading -------------------------------------------------------------------------------------------------

    @staticmethod
    def load(path: Path, engine: Any, inhibitor: Inhibitor | None, identity: Identity) -> TrainState:
        """Load a checkpoint into engine, inhibitor and this rank's random states. Collective.

        With the same ranks and ZeRO stage the run is bit-identical to one that never stopped (for others see
        docs/checkpoints.md). On another number of ranks random states start anew from (seed, step, rank); only dropout
        draws from them in training. Raises CheckpointError where the checkpoint belongs to another set-up or a part
        does not load.
        """
        content = read_state(path)
        saved = content["identity"]
        state = TrainState(**content["train"])
        for key, value in identity.items():
            if key not in ELASTIC and saved.get(key) != value:
                raise CheckpointError(
                    f"{path}: was written with {key} {saved.get(key)}, this run has {key} {value}, which no resume may"
                    " change; model.pretrained starts from exported weights"
                )
        elastic = content.get("layout") != layout(engine)
        # stage 0 keeps everything in one file
        if elastic and (saved["zero_stage"], identity["zero_stage"]) != (0, 0):
            _load_elastic(path, engine, content, identity)
        else:
            _together(lambda: _load_as_saved(path, engine, state), path)

        def load_ours() -> None:
            if inhibitor is not None:
                inhibitor.load_state_dict(load_file(path / "inhibition.safetensors"))
            if saved["ranks"] == identity["ranks"]:
                set_rng_state(load_file(path / f"rng-rank{collectives.rank():05d}.safetensors"), engine.device)
            else:
                reseed(identity["seed"], state.step, collectives.rank())

        _together(load_ours, path)
        if elastic and collectives.is_main():
            before, after = (f"{one['ranks']} ranks, ZeRO {one['zero_stage']}" for one in (saved, identity))
            say(f"resumed in another layout: {before} -> {after}".replace(" 1 ranks", " 1 rank"))
        return state


def _load_as_saved(path: Path, engine: Any, state: TrainState) -> None:
    with keeping_hyper_parameters(engine):
        loaded, client = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None or client.get("l2e_ds", {}).get("step") != state.step:
        raise CheckpointError(f"{path}: DeepSpeed did not load it")


def _load_elastic(path: Path, engine: Any, content: dict, identity: Identity) -> None:
    load = ElasticLoad(path, engine, content)
    _together(load.copy_own_part, path)
    _together(load.spread_and_check, path)
    state = TrainState(**content["train"])
    engine.global_steps, engine.skipped_steps = state.step, state.step - state.applied
    engine.global_samples = state.step * identity["global_batch"]


def _together(action: Callable[[], Any], path: Path) -> None:
    """Run an action on every rank; if it fails on any, raise on all. Collective."""
    error = _error_of(action)
    if error is not None and not isinstance(error, L2EError):
        error = CheckpointError(f"{path}: rank {collectives.rank()}: {_in_one_line(error)}")
    collectives.raise_on_all(error)


def open_checkpoints(config: RunConfig) -> CheckpointManager:
    """Return the manager of a run's checkpoints, with the one to resume from. Collective. Raises CheckpointError where
    there is no such checkpoint, or where the run would become another one."""
    checkpoints = CheckpointManager(Path(config.training.run_directory), config.checkpoint.keep_last)
    path = checkpoints.resume_from = checkpoints.find(config.training.resume)
    if path is not None and checkpoints.is_own(path):
        collectives.run_on_all(lambda: changes_since(path, config).refuse(path))
    return checkpoints


def changes_since(path: Path, config: RunConfig) -> Changes:
    """Return the differences between a run file and a checkpoint's. Raises CheckpointError, ConfigError."""
    content = read_state(path)
    return Changes(saved_config(content["config"], path / STATE), config, content["train"]["applied"])


@contextlib.contextmanager
def _noting_failed_writes(engine: Any) -> Iterator[list[Exception]]:
    """Yield a list of the errors of DeepSpeed's writes, so that a rank that cannot write meets the others at its
    barriers; leave out its recovery scripts, whose work `l2e-ds export` does."""
    failed: list[Exception] = []
    write = engine.checkpoint_engine.save

    def save(*arguments: Any, **named: Any) -> Any:
        try:
            return write(*arguments, **named)
        except Exception as error:
            failed.append(error)

    engine.checkpoint_engine.save = save
    engine._copy_recovery_script = lambda _folder: None
    try:
        yield failed
    finally:
        del engine.checkpoint_engine.save, engine._copy_recovery_script


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint, first its name and then its files, so that none is ever found half removed."""
    doomed = checkpoint.with_suffix(".removed.tmp")
    with contextlib.suppress(FileNotFoundError):  # another process has removed it
        checkpoint.rename(doomed)
    _remove_tree(doomed)


def _remove_tree(path: Path) -> None:
    """Remove a folder, or a link to one elsewhere, which stays; another process may be removing the same."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _error_of(action: Callable[[], Any]) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, L2EError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    return error_line(error)


def read_state(path: Path) -> dict:
    """Return the content of state.json. Raises CheckpointError."""
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATE}: {error}") from None
