"""A model whose neurons can be watched, whole on every rank or sharded over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from l2e_ds.errors import ConfigError
from l2e_ds.evaluation.model_source import ModelSource, load_causal_model, network_config
from l2e_ds.inhibition.settings import NeuronSite
from l2e_ds.models.families import family_of
from l2e_ds.models.sites import neuron_sites

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


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


def check_model(source: ModelSource, layers: list[int] | None) -> PretrainedConfig:
    """Return the network's configuration, where everything that can be known from it is right. Loads no weight.

    Raises ConfigError: no such model, a family that is not known, a layer that there is not.
    """
    network = network_config(source)
    family_of(network, source.given)
    count = network.num_hidden_layers
    wrong = next((layer for layer in layers or [] if not 0 <= layer < count), None)
    if wrong is not None:
        raise ConfigError(f"layer: got {wrong}, allowed: 0 to {count - 1} ({source.given} has {count})")
    return network


def load_model(
    source: ModelSource,
    layers: list[int] | None,
    precision: str,
    device: torch.device,
    zero3: bool = False,
) -> LoadedModel:
    """Return a model that `check_model` has passed.

    Raises ConfigError or CheckpointError where its weights cannot be loaded.

    zero3: the weights are sharded over the ranks by DeepSpeed and gathered layer by layer; every rank must then run
    equally often, and close the model before the next is loaded.
    """
    sharded = {**ZERO3, **_dtype_section(precision)} if zero3 else None
    network, tokens = load_causal_model(source, precision, sharded)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in network.parameters())
    sites = neuron_sites(network, sorted(set(layers)) if layers else "all")
    body = network.base_model.eval().requires_grad_(False)
    close = _shard(body, precision) if zero3 else None
    if not zero3:
        body.to(device)
    count = network.config.num_hidden_layers
    return LoadedModel(source, body, sites, count, parameters, tokens, device, close)


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
