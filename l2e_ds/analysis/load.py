"""Load a model whose neurons can be observed, whole on every rank or sharded over the ranks."""

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
    """A model in evaluation mode, whose neurons can be observed.

    network: without its output matrix; sites: those of the layers that were asked for; layers, parameters: how many
    the whole model has; tokens: how many it has seen in training, or None if that is not known; close: releases sharded
    weights (ZeRO-3).
    """

    source: ModelSource
    network: nn.Module
    sites: list[NeuronSite]
    layers: int
    parameters: int
    tokens: int | None
    device: torch.device
    close: Callable[[], None] = lambda: None

    @torch.no_grad()
    def run(self, tokens: torch.Tensor) -> None:
        """Run one forward pass over tokens, int64 [B, T]."""
        self.network(input_ids=tokens.to(self.device), use_cache=False)


def check_model(source: ModelSource, layers: list[int] | None, option: str) -> PretrainedConfig:
    """Return the network's configuration. option: by which the layers were given. Raises ConfigError for a missing
    model, an unknown family or layer."""
    network = network_config(source)
    family_of(network, source.given)
    count = network.num_hidden_layers
    wrong = next((layer for layer in layers or [] if not 0 <= layer < count), None)
    if wrong is not None:
        raise ConfigError(f"{option}: got {wrong}, allowed: 0 to {count - 1} ({source.given} has {count})")
    return network


def load_model(
    source: ModelSource,
    layers: list[int] | None,
    precision: str,
    device: torch.device,
    zero3: bool = False,
) -> LoadedModel:
    """Load a model that `check_model` has accepted.

    zero3: shard the weights over the ranks by DeepSpeed, which gathers them layer by layer. Every rank must then run
    equally often, and close the model before the next is loaded. Raises ConfigError, CheckpointError.
    """
    sharded = {**ZERO3, **({} if precision == "fp32" else {precision: {"enabled": True}})} if zero3 else None
    network, tokens = load_causal_model(source, precision, sharded)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in network.parameters())
    sites = neuron_sites(network, sorted(set(layers)) if layers else "all")
    body = network.base_model.eval().requires_grad_(False)
    loaded = LoadedModel(source, body, sites, network.config.num_hidden_layers, parameters, tokens, device)
    if sharded:
        loaded.close = _shard(body, sharded)
    else:
        body.to(device)
    return loaded


def _shard(network: nn.Module, config: dict[str, Any]) -> Callable[[], None]:
    """Shard a network, so that it gathers weights as it runs. Returns a function that releases it."""
    import contextlib
    import io

    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints what it does
        if not any(hasattr(p, "ds_id") for p in network.parameters()):
            # Shards one parameter at a time; `initialize` alone would first bring all of them to the device.
            deepspeed.zero.Init(module=network, config_dict_or_path=config)
        engine = deepspeed.initialize(model=network, config=config)[0]

    def close() -> None:
        engine.destroy()
        FWD_MODULE_STACK.clear()  # DeepSpeed 0.19.8 keeps in it every model that was ever sharded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    return close
