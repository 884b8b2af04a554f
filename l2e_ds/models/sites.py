"""Choose the layers of a network that are inhibited, and find their neurons.

Shapes: B sequences per micro-batch, T tokens per sequence, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, get_args

from l2e_ds.config.sections import LayerChoice
from l2e_ds.errors import ConfigError
from l2e_ds.inhibition.settings import NeuronSite
from l2e_ds.models.families import blocks_of, site_of


def chosen_layers(choice: str | list[int], layers: int) -> list[int]:
    """Return the indices of the hooked layers (docs/method.md, 7) of so many `layers`, ascending.

    Raises ConfigError.
    """
    named = get_args(LayerChoice)
    are_numbers = isinstance(choice, list) and all(isinstance(i, Integral) for i in choice)
    if not (are_numbers and 0 < len(choice) == len(set(choice))) and choice not in named:
        raise ConfigError(
            f"inhibition.layers: got {choice!r}, allowed: {', '.join(named)}, or a list of distinct numbers from 0 to"
            f" {layers - 1}"
        )
    if isinstance(choice, list):
        wrong = [i for i in choice if not 0 <= i < layers]
        if wrong:
            raise ConfigError(f"inhibition.layers: got {wrong[0]}, allowed: 0 to {layers - 1} ({layers} layers)")
        return sorted(choice)
    if choice == "all":
        return list(range(layers))
    if choice == "top-bottom":
        return sorted({0, layers - 1})
    width = min(layers, 2) if choice == "mid-2" else max(1, round(layers / 3))
    first = (layers - width) // 2
    return list(range(first, first + width))


def comparison_layers(inhibited: Sequence[int], layers: int) -> list[int]:
    """Return as many layers that are not inhibited as are, the nearest to them, ascending.

    They are fewer if there are not enough. layers: how many the network has.
    """
    others = sorted(set(range(layers)) - set(inhibited), key=lambda i: min(abs(i - one) for one in inhibited))
    return sorted(others[: len(inhibited)])


def neuron_sites(model: Any, layers: str | list[int] = "mid-2") -> list[NeuronSite]:
    """Return the sites of the neurons, [B, T, N], of the chosen layers.

    model: a transformers model, with or without its head. Raises ConfigError for another kind of model, for a family
    that is not registered (families.py) and for layers out of range.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise ConfigError(
            f"neuron_sites: got a {type(model).__name__} without `config`, allowed: a transformers model (not wrapped);"
            " of any other say where its neurons are, with a NeuronSite a layer (docs/python-api.md)"
        )
    return [site_of(model, layer) for layer in chosen_layers(layers, len(blocks_of(model)))]
