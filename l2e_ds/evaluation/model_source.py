"""Find and load what `MODEL` means on the command line: a run directory, a checkpoint, a folder or a hub name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l2e_ds.checkpoint.weights import DTYPES, find_checkpoint, load_network
from l2e_ds.data.tokenizer import load_tokenizer
from l2e_ds.errors import CheckpointError, ConfigError, DataError
from l2e_ds.models.network import loading_sharded
from l2e_ds.run_directory.manifest import complete_checkpoints
from l2e_ds.run_directory.names import is_checkpoint, step_of
from l2e_ds.system.files import one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

MODEL = "a run directory, one of its checkpoints, a folder that transformers loads, or a hub name (NAME@REVISION)"


@dataclass(frozen=True)
class ModelSource:
    """A model that was found, but is not loaded: a run's verified checkpoint, or what transformers loads. given: the
    word on the command line; label: a short name for tables and folders."""

    given: str
    label: str
    checkpoint: Path | None = None
    name: str | None = None
    revision: str | None = None

    @property
    def step(self) -> int | None:
        return None if self.checkpoint is None else step_of(self.checkpoint)


def find_model(given: str, step: int | None = None) -> ModelSource:
    """Return the model that `given` names; step: default the newest. Raises CheckpointError, ConfigError."""
    path = Path(given)
    if (path / "checkpoints").is_dir() or (is_checkpoint(path) and path.parent.name == "checkpoints"):
        checkpoint = find_checkpoint(path, step)
        run = checkpoint.parent.parent.resolve().name
        return ModelSource(given, f"{run}-{checkpoint.name}", checkpoint=checkpoint)
    if step is not None:
        raise ConfigError(f"--step: goes with a run directory, {given} is none")
    name, _, revision = given.partition("@") if not path.exists() else (given, "", "")
    if not name or (revision and Path(name).exists()):
        raise ConfigError(f"MODEL: got {given!r}; a revision goes with a hub name, a folder holds one model")
    label = Path(name).resolve().name if path.exists() else name.rpartition("/")[2]
    label = f"{label}-{revision}" if revision else label
    return ModelSource(given, label.replace("/", "-"), name=name, revision=revision or None)


def all_checkpoints(run: str) -> list[ModelSource]:
    """Return every complete checkpoint of a run, oldest first. Raises CheckpointError if there is none."""
    if not (Path(run) / "checkpoints").is_dir():
        raise CheckpointError(f"--all-checkpoints: {run} is not a run directory")
    found = complete_checkpoints(Path(run))
    if not found:
        raise CheckpointError(f"{run}: has no complete checkpoint")
    return [find_model(str(path)) for path in found]


def network_config(source: ModelSource) -> PretrainedConfig:
    """Return a model's configuration without loading weights. Raises ConfigError if there is no such model."""
    from transformers import AutoConfig

    folder = Path(str(source.name)) if source.checkpoint is None else source.checkpoint.parent.parent / "model"
    if (folder.exists() or source.checkpoint is not None) and not (folder / "config.json").is_file():
        raise ConfigError(f"{source.given}: is neither a run directory nor a folder with a model's config.json")
    try:
        return AutoConfig.from_pretrained(str(folder), revision=source.revision)
    except (OSError, ValueError) as error:
        raise _not_loaded(source, error) from None


def load_tokenizer_of(source: ModelSource, instead: str | None) -> PreTrainedTokenizerFast:
    """Return the model's own tokenizer, or the one named `instead`. Raises ConfigError if there is none."""
    folder = source.name if source.checkpoint is None else str(source.checkpoint.parent.parent / "tokenizer")
    assert folder is not None
    try:
        return load_tokenizer(folder, source.revision) if instead is None else load_tokenizer(instead)
    except DataError as error:
        if instead is not None:
            raise ConfigError(error.problem, where="--tokenizer") from None
        reason = f"its tokenizer is missing ({error.problem}); name one with --tokenizer"
        raise ConfigError(reason, where=source.given) from None


def load_causal_model(
    source: ModelSource, precision: str, zero3: dict | None = None
) -> tuple[PreTrainedModel, int | None]:
    """Return the network with its output matrix, on the CPU, and the tokens it has seen in training, or None. zero3: a
    DeepSpeed configuration by which it is sharded. Raises ConfigError or CheckpointError."""
    from transformers import AutoModelForCausalLM

    if source.checkpoint is not None:
        network, state = load_network(source.checkpoint, precision)
        return network, state["train"]["tokens"]
    try:
        with loading_sharded(zero3):
            dtype = DTYPES[precision]
            return AutoModelForCausalLM.from_pretrained(source.name, revision=source.revision, dtype=dtype), None
    except Exception as error:  # safetensors and torch have errors of their own for damaged files
        raise _not_loaded(source, error) from None


def _not_loaded(source: ModelSource, error: Exception) -> ConfigError:
    where = "transformers cannot load it" if Path(source.given).exists() else "no such folder, and no model of the hub"
    offline = " (HF_HUB_OFFLINE is 1)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    return ConfigError(f"{source.given}: {where}: {one_line(error)}{offline}")
