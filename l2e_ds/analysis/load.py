"""What `MODEL` means on the command line, and the model behind it: a run directory, one of its checkpoints, a folder
that transformers loads, or a hub name with `@revision`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from l2e_ds.data.files import one_line
from l2e_ds.errors import CheckpointError, ConfigError
from l2e_ds.evaluation.export import DTYPES, find_checkpoint, load_network
from l2e_ds.families import family_of
from l2e_ds.inhibition.hook import NeuronSite
from l2e_ds.models import loading_sharded, neuron_sites
from l2e_ds.training.checkpoint import NAME, CheckpointManager

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


@dataclass(frozen=True)
class ModelSource:
    """What was asked for, found but not loaded.

    label: short, for tables and folders; checkpoint: verified, of a run; name, revision: what transformers loads.
    """

    given: str
    label: str
    checkpoint: Path | None = None
    name: str | None = None
    revision: str | None = None

    @property
    def step(self) -> int | None:
        return None if self.checkpoint is None else int(self.checkpoint.name[4:])


@dataclass
class LoadedModel:
    """A model in evaluation mode, whose neurons can be watched.

    run: calls the network below its output matrix with tokens [B, T]; sites: of the layers that were asked for;
    parameters: all of them; tokens: seen in training, where that is known.
    """

    source: ModelSource
    network: nn.Module
    sites: list[NeuronSite]
    layers: int
    parameters: int
    tokens: int | None
    device: torch.device
    release: Callable[[], None] | None = None

    def close(self) -> None:
        """Let go of weights that are sharded (ZeRO-3)."""
        if self.release is not None:
            self.release()

    @torch.no_grad()
    def run(self, tokens: torch.Tensor) -> None:
        """One forward pass, [B, T]."""
        self.network(input_ids=tokens.to(self.device), use_cache=False)


def find_model(given: str) -> ModelSource:
    """Raises CheckpointError for a damaged checkpoint or an empty run."""
    path = Path(given)
    if (path / "checkpoints").is_dir() or (NAME.fullmatch(path.name) and path.parent.name == "checkpoints"):
        checkpoint = find_checkpoint(path, None)
        run = checkpoint.parent.parent.resolve().name
        return ModelSource(given, f"{run}-{checkpoint.name}", checkpoint=checkpoint)
    name, _, revision = given.partition("@") if not path.exists() else (given, "", "")
    if not name or (revision and Path(name).exists()):
        raise ConfigError(f"MODEL: got {given!r}; a revision goes with a hub name, a folder holds one model")
    label = Path(name).resolve().name if path.exists() else name.rpartition("/")[2]
    label = f"{label}-{revision}" if revision else label
    return ModelSource(given, label.replace("/", "-"), name=name, revision=revision or None)


def all_checkpoints(run: str) -> list[ModelSource]:
    """Every complete checkpoint of a run, oldest first. Raises CheckpointError where there is none."""
    if not (Path(run) / "checkpoints").is_dir():
        raise CheckpointError(f"--all-checkpoints: {run} is not a run directory")
    found = CheckpointManager(Path(run)).complete()
    if not found:
        raise CheckpointError(f"{run}: has no complete checkpoint")
    return [find_model(str(path)) for path in found]


def check_model(source: ModelSource, layers: list[int] | None) -> PretrainedConfig:
    """The network's configuration, where everything that can be known from it is right. Loads no weight.

    Raises ConfigError: no such model, a family that is not known, a layer that there is not.
    """
    from transformers import AutoConfig

    folder = Path(str(source.name)) if source.checkpoint is None else source.checkpoint.parent.parent / "model"
    if (folder.exists() or source.checkpoint is not None) and not (folder / "config.json").is_file():
        raise ConfigError(f"{source.given}: is neither a run directory nor a folder with a model's config.json")
    try:
        network = AutoConfig.from_pretrained(str(folder), revision=source.revision)
    except (OSError, ValueError) as error:
        raise _not_loaded(source, error) from None
    family_of(network, source.given)
    count = network.num_hidden_layers
    wrong = next((layer for layer in layers or [] if not 0 <= layer < count), None)
    if wrong is not None:
        raise ConfigError(f"layer: got {wrong}, allowed: 0 to {count - 1} ({source.given} has {count})")
    return network


def load_tokenizer_of(source: ModelSource, instead: str | None) -> PreTrainedTokenizerFast:
    """The model's own, or the one named `instead`. Raises ConfigError where there is none."""
    from l2e_ds.data.tokenizer import load_tokenizer
    from l2e_ds.errors import DataError

    folder = source.name if source.checkpoint is None else str(source.checkpoint.parent.parent / "tokenizer")
    assert folder is not None
    try:
        return load_tokenizer(folder, source.revision) if instead is None else load_tokenizer(instead)
    except DataError as error:
        reason = str(error).removeprefix("data.tokenizer: ")
        if instead is not None:
            raise ConfigError(f"--tokenizer: {reason}") from None
        raise ConfigError(f"{source.given}: its tokenizer is missing ({reason}); name one with --tokenizer") from None


def load_model(
    source: ModelSource,
    layers: list[int] | None,
    precision: str,
    device: torch.device,
    zero3: bool = False,
) -> LoadedModel:
    """A model that `check_model` has passed. Raises ConfigError or CheckpointError where its weights cannot be loaded.

    zero3: the weights are sharded over the ranks by DeepSpeed and gathered layer by layer; every rank must then run
    equally often, and close the model before the next is loaded.
    """
    tokens = None
    if source.checkpoint is not None:
        network, state = load_network(source.checkpoint, precision)
        tokens = state["train"]["tokens"]
    else:
        network = _from_transformers(source, precision, zero3)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in network.parameters())
    sites = neuron_sites(network, sorted(set(layers)) if layers else "all")
    body = network.base_model.eval().requires_grad_(False)
    close = _shard(body, precision) if zero3 else None
    if not zero3:
        body.to(device)
    count = network.config.num_hidden_layers
    return LoadedModel(source, body, sites, count, parameters, tokens, device, close)


def _from_transformers(source: ModelSource, precision: str, zero3: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with loading_sharded({**ZERO3, **_dtype_section(precision)} if zero3 else None):
            return AutoModelForCausalLM.from_pretrained(source.name, revision=source.revision, dtype=DTYPES[precision])
    except (OSError, ValueError) as error:
        raise _not_loaded(source, error) from None


def _not_loaded(source: ModelSource, error: Exception) -> ConfigError:
    where = "transformers cannot load it" if Path(source.given).exists() else "no such folder, and no model of the hub"
    offline = " (HF_HUB_OFFLINE is 1)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    return ConfigError(f"{source.given}: {where}: {one_line(error)}{offline}")


def _dtype_section(precision: str) -> dict[str, Any]:
    return {} if precision == "fp32" else {precision: {"enabled": True}}


def _shard(network: nn.Module, precision: str) -> Callable[[], None]:
    """Make it one that gathers weights as it runs; what is returned lets go of it."""
    import contextlib
    import io

    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    config = {**ZERO3, **_dtype_section(precision)}
    with contextlib.redirect_stdout(io.StringIO()):  # it narrates
        if not any(hasattr(p, "ds_id") for p in network.parameters()):
            # a parameter at a time: initialize alone would bring all of them to the device first
            deepspeed.zero.Init(module=network, config_dict_or_path=config)
        engine = deepspeed.initialize(model=network, config=config)[0]

    def close() -> None:
        engine.destroy()
        FWD_MODULE_STACK.clear()  # 0.19.8 keeps every model that was ever sharded in it
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    return close
