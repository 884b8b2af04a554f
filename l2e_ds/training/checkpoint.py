"""Checkpoints: DeepSpeed's shards plus one small state of ours, published only when complete.

    checkpoints/
      latest                         name of the newest checkpoint
      step00000150/
        *_states.pt                  DeepSpeed's shards (pickles: resume only from a source you trust)
        state.json                   step, tokens, data position, configuration, versions
        inhibition.safetensors       moments and tau of every hooked layer
        rng-rank00000.safetensors    random states, one file a rank
        manifest.json                every file with its size; written last

DeepSpeed writes `latest` before the other ranks' shards are on disk (DEEPSPEED.md, silent failure 5), so we
publish: all files into `stepN.tmp`, fsync, agreement of all ranks, manifest, rename, then `latest`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from l2e_ds import distributed
from l2e_ds.data.files import fsync_path
from l2e_ds.errors import CheckpointError, L2EError
from l2e_ds.inhibition import Inhibitor
from l2e_ds.training.state import TrainState, rng_state, set_rng_state

NAME = re.compile(r"step(\d{8})")


@dataclass(frozen=True)
class Identity:
    """What must not change between a checkpoint and the run that goes on from it."""

    ranks: int
    zero_stage: int
    precision: str
    data: str  # fingerprint of the training tokens
    sequence_length: int
    global_batch: int
    seed: int
    order: str
    network: str
    layers: list[int]  # hooked


def is_due(step: int, last: int, every: int, early: bool) -> bool:
    """Whether a checkpoint is due after `step` steps: the end, every N, and Pythia's 0, 1, 2, 4 ... 512."""
    if step == last or (every and step % every == 0 and step > 0):
        return True
    return early and (step == 0 or (step <= 512 and step & (step - 1) == 0))


class CheckpointManager:
    """Saves, finds and loads the checkpoints of one run directory."""

    def __init__(self, run_directory: Path, keep_last: int | None = None) -> None:
        self.directory = run_directory / "checkpoints"
        self.keep_last = keep_last

    # --- finding -------------------------------------------------------------------------------------------------

    def complete(self) -> list[Path]:
        """Published checkpoints with every file of their manifest, oldest first. Says which ones are left out."""
        found = []
        for path in sorted(self.directory.glob("step*")) if self.directory.is_dir() else []:
            if not NAME.fullmatch(path.name):
                continue
            problem = check_manifest(path)
            if problem:
                print(f"checkpoint {path}: {problem}; it is not used", file=sys.stderr)
            else:
                found.append(path)
        return found

    def find(self, resume: str) -> Path | None:
        """The checkpoint that `training.resume` means, or None for a fresh start. Rank 0 decides for all.

        Raises CheckpointError on every rank.
        """
        found: Path | L2EError | None = None
        if distributed.is_main():
            try:
                found = self._find(resume)
            except CheckpointError as error:
                found = error
        found = distributed.main_decides(found)
        if isinstance(found, L2EError):
            raise found
        return found

    def _find(self, resume: str) -> Path | None:
        if resume in ("auto", "never"):
            present = self.complete()
            if resume == "never" and present:
                raise CheckpointError(
                    f"training.resume: got never, but {self.directory} holds {present[-1].name};"
                    " choose another training.run_directory or resume: auto"
                )
            if not present and self.directory.is_dir() and any(self.directory.glob("step*[0-9]")):
                raise CheckpointError(
                    f"training.resume: {self.directory} holds checkpoints, but none is complete;"
                    " move them away to start afresh"
                )
            return present[-1] if present else None
        path = Path(resume).expanduser()
        own = self.complete()
        if own:  # requeued, or started again: PATH was where this run began
            if path.resolve().parent == self.directory.resolve() and path.resolve() != own[-1].resolve():
                raise CheckpointError(
                    f"training.resume: {path} is not the newest checkpoint of its run ({own[-1].name}); choose another"
                    " training.run_directory to branch off, or remove the later checkpoints"
                )
            return own[-1]
        if (path / "checkpoints").is_dir():
            newest = CheckpointManager(path).complete()
            if not newest:
                raise CheckpointError(f"training.resume: no complete checkpoint in {path}")
            return newest[-1].resolve()
        problem = check_manifest(path) if path.is_dir() else "no such folder"
        if problem:
            raise CheckpointError(f"training.resume: {path}: {problem}; allowed: auto, never, a run or a checkpoint")
        return path.resolve()

    # --- saving --------------------------------------------------------------------------------------------------

    def save(
        self, engine: Any, inhibitor: Inhibitor | None, state: TrainState, identity: Identity, config: dict
    ) -> Path:
        """Write and publish a checkpoint; collective. Raises CheckpointError on every rank if any rank failed."""
        final = self.directory / f"step{state.step:08d}"
        temporary = final.with_suffix(".tmp")

        def prepare() -> None:
            if distributed.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)

        def write() -> None:
            save_file(rng_state(engine.device), temporary / f"rng-rank{distributed.rank():05d}.safetensors")
            if distributed.is_main():
                if inhibitor is not None:
                    save_file(inhibitor.state_dict(), temporary / "inhibition.safetensors")
                content = {"train": asdict(state), "identity": asdict(identity), "config": config, **_versions()}
                (temporary / "state.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

        def publish() -> None:
            if not distributed.is_main():
                return
            written = len(list(temporary.glob("rng-rank*.safetensors")))
            if written != distributed.size():
                raise CheckpointError(
                    f"{final}: holds the files of {written} of {distributed.size()} ranks;"
                    " training.run_directory must lie on a file system that all nodes share"
                )
            manifest = {}
            for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
                fsync_path(path)
                manifest[str(path.relative_to(temporary))] = path.stat().st_size
            (temporary / "manifest.json").write_text(json.dumps({"files": manifest}, indent=1) + "\n", encoding="utf-8")
            fsync_path(temporary / "manifest.json")
            fsync_path(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            pointer = self.directory / "latest.tmp"
            pointer.write_text(final.name + "\n", encoding="utf-8")
            fsync_path(pointer)
            pointer.replace(self.directory / "latest")
            fsync_path(self.directory)
            self._prune()

        _together(prepare, final)
        # everything of ours under one key: others would overwrite the engine's own (silent failure 7)
        _together(
            lambda: engine.save_checkpoint(
                str(self.directory),
                tag=temporary.name,
                client_state={"l2e_ds": {"step": state.step}},
                save_latest=False,
            ),
            final,
        )
        _together(write, final)
        _together(publish, final)
        return final

    def _prune(self) -> None:
        if self.keep_last is not None:
            published = sorted(p for p in self.directory.glob("step*") if NAME.fullmatch(p.name))
            for path in published[: -self.keep_last]:
                shutil.rmtree(path)

    # --- loading -------------------------------------------------------------------------------------------------

    @staticmethod
    def load(path: Path, engine: Any, inhibitor: Inhibitor | None, identity: Identity) -> TrainState:
        """Bring engine, inhibitor and this rank's random states to where the checkpoint was. Collective.

        Raises CheckpointError where the checkpoint belongs to another set-up or a part does not load.
        """
        content = read_state(path)
        check_identity(path, content["identity"], asdict(identity))

        def load_parts() -> None:
            loaded, client = engine.load_checkpoint(str(path.parent), tag=path.name)
            if loaded is None or client.get("l2e_ds", {}).get("step") != content["train"]["step"]:
                raise CheckpointError(f"{path}: DeepSpeed did not load it")
            if inhibitor is not None:
                inhibitor.load_state_dict(load_file(path / "inhibition.safetensors"))
            set_rng_state(load_file(path / f"rng-rank{distributed.rank():05d}.safetensors"), engine.device)

        _together(load_parts, path)
        return TrainState(**content["train"])


def _together(action: Callable[[], Any], path: Path) -> None:
    """Run on every rank; if it failed on any, raise on all."""
    error: L2EError | None = None
    try:
        action()
    except L2EError as raised:
        error = raised
    except Exception as raised:
        reason = " ".join(str(raised).split())[:300]
        error = CheckpointError(f"{path}: rank {distributed.rank()}: {type(raised).__name__}: {reason}")
    distributed.agree(error)


def check_identity(path: Path, saved: dict, current: dict) -> None:
    """Raises CheckpointError naming the first thing in which checkpoint and run differ."""
    for key, value in current.items():
        if saved.get(key) != value:
            raise CheckpointError(f"{path}: was written with {key} {saved.get(key)}, this run has {key} {value}")


def changed_values(path: Path, config: dict) -> list[str]:
    """What the run file says otherwise than when the checkpoint was written, as `section.key: old -> new`."""
    saved = read_state(path)["config"]
    return [
        f"{section}.{key}: {saved.get(section, {}).get(key)} -> {value}"
        for section, values in config.items()
        for key, value in values.items()
        if saved.get(section, {}).get(key) != value
    ]


def check_manifest(path: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words, or None."""
    try:
        files = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "has no manifest (it was not finished)"
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is not readable"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def read_state(path: Path) -> dict:
    """The content of state.json. Raises CheckpointError."""
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'state.json'}: {error}") from None


def _versions() -> dict:
    import deepspeed

    import l2e_ds

    return {
        "versions": {"l2e_ds": l2e_ds.__version__, "torch": str(torch.__version__), "deepspeed": deepspeed.__version__}
    }
