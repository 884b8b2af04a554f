"""The registry of model families, which says where the neurons of a model are.

A neuron is one coordinate of the input of the output projection of a block's MLP (docs/method.md, 2). If an activation
module alone computes that input, the hook replaces the module, which works under torch.compile. In a gated MLP no
module returns the neurons, act(gate) * up, so the hook is placed before the output projection.

Shapes: N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn import functional

from l2e_ds.errors import ConfigError
from l2e_ds.inhibition.settings import NeuronSite


@dataclass(frozen=True)
class Family:
    """One model family of transformers.

    blocks: path of the list of blocks, from the model without its head; site: path, from a block, of the module that
    returns the neurons (kind "activation") or reads them ("projection"); attention: the values of `model.attention`.
    """

    blocks: str
    site: str
    kind: Literal["activation", "projection"]
    neurons: Callable[[Any], int] = lambda hf_config: hf_config.intermediate_size
    attention: tuple[str, ...] = ("sdpa", "eager", "flash_attention_2")


_GATED = Family("layers", "mlp.down_proj", "projection")

# By `model_type` of the configuration.
FAMILIES = {
    "bloom": Family("h", "mlp.gelu_impl", "activation", lambda hf_config: 4 * hf_config.hidden_size, ("eager",)),
    "falcon": Family("h", "mlp.act", "activation", lambda hf_config: hf_config.ffn_hidden_size),
    "gpt2": Family("h", "mlp.act", "activation", lambda hf_config: hf_config.n_inner or 4 * hf_config.n_embd),
    "gpt_neox": Family("layers", "mlp.act", "activation"),
    "llama": _GATED,
    "mistral": _GATED,
    "opt": Family("decoder.layers", "activation_fn", "activation", lambda hf_config: hf_config.ffn_dim),
    "qwen2": _GATED,
    "qwen3": _GATED,
}


def family_of(hf_config: Any, where: str = "the model") -> Family:
    """Return the family of a transformers configuration. where: what an error calls the model. Raises ConfigError."""
    if hf_config.model_type not in FAMILIES:
        raise ConfigError(
            f"{where}: is of the family {hf_config.model_type}, known are {', '.join(FAMILIES)}; another is registered"
            " in FAMILIES of l2e_ds/models/families.py (docs/families.md)"
        )
    return FAMILIES[hf_config.model_type]


def neurons_of(hf_config: Any) -> int:
    """Return N, the number of neurons of each layer. Raises ConfigError."""
    return family_of(hf_config).neurons(hf_config)


def blocks_of(model: Any) -> nn.ModuleList:
    """Return the blocks of a transformers model, with or without its head. Raises ConfigError."""
    return model.base_model.get_submodule(family_of(model.config).blocks)


def site_of(model: Any, layer: int) -> NeuronSite:
    """Return where the neurons of a layer are. Raises ConfigError."""
    from transformers.activations import GELUActivation

    family = family_of(model.config)
    parent, _, attribute = family.site.rpartition(".")
    module = blocks_of(model)[layer].get_submodule(parent)
    site = getattr(module, attribute)  # is it the exact GELU, not one of its approximations?
    is_gelu = family.kind == "activation" and isinstance(site, GELUActivation) and site.act is functional.gelu
    neurons = family.neurons(model.config)
    return NeuronSite(layer, module, attribute, family.kind, neurons, "gelu" if is_gelu else None)


def check_trainable(hf_config: Any, attention: str, where: str) -> None:
    """Raise ConfigError if a run cannot train such a model. where: the model's dotted key and value."""
    family = family_of(hf_config, where)
    if attention not in family.attention:
        allowed = ", ".join(family.attention)
        raise ConfigError(f"model.attention: got {attention}, a {hf_config.model_type} has: {allowed}")
    if getattr(hf_config, "layerdrop", 0):
        raise ConfigError(
            f"{where}: skips layers at random (layerdrop {hf_config.layerdrop}), so that their neurons would not be"
            " seen; set it to 0 in its config.json"
        )
