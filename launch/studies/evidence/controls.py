"""Train a control of the evidence studies: what would make an effect of inhibition something else.

    python launch/studies/evidence/controls.py CONTROL RUN.yaml [section.key=value ...]

The controls change the layers that the run file would inhibit (`inhibition.layers`), in base.yaml the two middle ones:

`without-mlp`: their MLPs give nothing. If that is worse by less than 0.05 nats, a run is too short to judge a loss by:
what makes these layers small costs next to nothing, or even gains.
`small-start`: the weights of their MLPs start at 0.4 of their scale.
`l2=COEFFICIENT`: a plain penalty COEFFICIENT * mean(z^2) on the neurons z of each. It makes them smaller, and knows
nothing of monosemanticity. One micro-batch a step, and no fp16.

The method is none; everything else is the run file's, as with `l2e-ds train`. The run is in
studies/evidence/controls/runs/CONTROL-seedSEED unless `training.run_directory` is given.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from l2e_ds import train
from l2e_ds.config.reading import load_run_config
from l2e_ds.errors import ConfigError
from l2e_ds.models.families import blocks_of
from l2e_ds.models.network import build_network
from l2e_ds.models.sites import chosen_layers
from l2e_ds.training import building


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


def changed(control: str, layers: str | list[int], model: Any) -> Any:
    """Return the model with the control in these layers, those of a value of `inhibition.layers`.

    Raises SystemExit for a control that there is not, and under ZeRO-3.
    """
    blocks = [blocks_of(model)[layer] for layer in chosen_layers(layers, model.config.num_hidden_layers)]
    if any(parameter.numel() == 0 for block in blocks for parameter in block.parameters()):
        sys.exit("control: got deepspeed.config of ZeRO 3, which holds no whole weights, allowed: ZeRO 0 to 2")
    for block in blocks:
        if control == "without-mlp":
            # zeros whose gradient is zero stay zeros: the checkpoint is this network, too
            for parameter in block.mlp.dense_4h_to_h.parameters():
                parameter.data.zero_()
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
    control, run_file, *overrides = sys.argv[1:]
    overrides.append("inhibition.method=none")
    try:
        config = load_run_config(run_file, overrides)
    except ConfigError as error:
        sys.exit(f"controls: error: {error}")
    training = config.training
    if control.startswith("l2=") and (training.micro_batch != training.global_batch or training.precision == "fp16"):
        sys.exit(
            f"controls: error: {control} with training.global_batch {training.global_batch}, micro_batch"
            f" {training.micro_batch}, precision {training.precision}; allowed: one micro-batch a step on one rank, not"
            " in fp16"
        )
    if not any(word.startswith("training.run_directory=") for word in overrides):
        directory = f"studies/evidence/controls/runs/{control}-seed{training.seed}"
        overrides.append(f"training.run_directory={directory}")

    def build(*arguments: Any) -> Any:
        return changed(control, config.inhibition.layers, build_network(*arguments))

    building.build_network = build
    return train.main([run_file, *overrides])


if __name__ == "__main__":
    sys.exit(main())
