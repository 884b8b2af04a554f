"""Measure the norm of the gradient of each layer's weights (`logging.layer_gradients`).

Shapes: L layers of the network, hooked or not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from l2e_ds.distributed import collectives
from l2e_ds.engine.engine import loss_scale, own_gradient, wait_for_gradients
from l2e_ds.models.families import blocks_of


class LayerGradients:
    """Measures steps in which `measure` is called, on all ranks, between the last backward and the optimizer's step."""

    def __init__(self, engine: Any, model: Any) -> None:
        """model: the network in the engine. Raises ConfigError for one whose layers are not known."""
        self._engine = engine
        parts = {f"layer{index}": list(block.parameters()) for index, block in enumerate(blocks_of(model))}
        in_layers = {id(parameter) for part in parts.values() for parameter in part}
        parts["rest"] = [parameter for parameter in model.parameters() if id(parameter) not in in_layers]
        self._parts = parts
        self._squares: Tensor | None = None  # [L + 1] float64, of what this rank holds

    @torch.no_grad()
    def measure(self) -> None:
        """Note the norms of the gradients that the engine holds. Only with offload and under ZeRO-3 the host waits for
        the device, until they are reduced."""
        wait_for_gradients(self._engine)
        squares = torch.zeros(len(self._parts), dtype=torch.float64, device=self._engine.device)
        for index, parameters in enumerate(self._parts.values()):
            own = [gradient for one in parameters if (gradient := own_gradient(self._engine, one)) is not None]
            if own:
                norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in own]
                squares[index] = torch.stack(norms).square().sum()
        self._squares = squares / loss_scale(self._engine) ** 2

    def norms(self) -> dict[str, float]:
        """Return the metrics of the step that was measured since the last call, if there is one. Collective."""
        squares, self._squares = self._squares, None
        if squares is None:
            return {}
        if self._engine.zero_optimization_stage() > 0:  # else every rank holds all
            collectives.all_reduce_sum(squares)
        found = zip(self._parts, squares.tolist(), strict=True)
        return {f"gradient_norm/{name}": math.sqrt(square) for name, square in found}
