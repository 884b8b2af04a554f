"""Train a control of the evidence studies: what would make an effect of inhibition something else.

    python launch/studies/evidence/controls.py CONTROL RUN.yaml [section.key=value ...]

`without-mlp`: the MLPs of the inhibited layers (`inhibition.layers`) give nothing. If that is no worse than keeping
them, the run is too short to judge a loss by: whatever makes these layers small gains.
`small-start`: their weights start at 0.4 of their scale.
`l2=COEFFICIENT`: a plain penalty COEFFICIENT * mean(z^2) on the neurons z of each of these layers; they shrink
and knows nothing of monosemanticity.

Give `inhibition.method=none`. Everything else is the run file's, as with `l2e-ds train`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from l2e_ds import train
from l2e_ds.families import blocks_of
from l2e_ds.models import build_network, chosen_layers
from l2e_ds.training import trainer

LAYERS = "mid-2"


class _Penalty(torch.autograd.Function):
    """The same activations; their gradient becomes that of the loss + coefficient * mean(z^2)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, coefficient: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.coefficient = coefficient
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        return gradients[0] + 2 * ctx.coefficient / z.numel() * z, None


def changed(control: str, model: Any) -> Any:
    """The model with the control in it. Raises SystemExit for a control that there is not."""
    blocks = [blocks_of(model)[layer] for layer in chosen_layers(LAYERS, model.config.num_hidden_layers)]
    for block in blocks:
        if control == "without-mlp":
            block.mlp.register_forward_hook(lambda module, inputs, output: 0 * output)
        elif control == "small-start":
            for linear in (module for module in block.mlp.modules() if isinstance(module, nn.Linear)):
                linear.weight.data *= 0.4
        elif control.startswith("l2="):
            coefficient = float(control.removeprefix("l2="))
            block.mlp.act.register_forward_hook(
                lambda module, inputs, output, coefficient=coefficient: _Penalty.apply(output, coefficient)
            )
        else:
            sys.exit(f"control: got {control}, allowed: without-mlp, small-start, l2=COEFFICIENT")
    return model


def main() -> int:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    control, *words = sys.argv[1:]

    def build(*arguments: Any) -> Any:
        return changed(control, build_network(*arguments))

    trainer.build_network = build
    return train.main([*words, "inhibition.method=none", f"inhibition.layers={LAYERS}"])


if __name__ == "__main__":
    sys.exit(main())
