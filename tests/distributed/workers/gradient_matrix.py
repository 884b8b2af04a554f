"""Runs on two ranks: for stage x precision x accumulation x checkpointing, the gradients that DeepSpeed holds before
its step, against one float64 process (rank 0) that differentiates the written-out loss on the global batch. Three
losses: the published one and, with its projection over each micro-batch, the projected one, with `reduce: step`; in
float32 the scale-invariant one with `reduce: forward`. With the projected one there is a z-loss, and with its smaller
micro-batch the LM loss is computed in chunks.

usage: gradient_matrix.py OUTPUT pairwise|all
Writes OUTPUT/matrix.json: {combination: {"error": relative error of the whole gradient, "part": share of it that
the inhibition loss contributes, "calls": {layer: [forward, recomputed, backward]}, "selected": share, "norms": by layer
[as logged, of the gradients], "norm": DeepSpeed's}}.
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from torch.nn import functional

from l2e_ds.config.sections import ModelConfig
from l2e_ds.distributed import collectives, launch, process_group
from l2e_ds.engine.engine import loss_scale
from l2e_ds.models.network import build_network
from l2e_ds.models.pythia import network_config
from l2e_ds.system.process import leave_process, prepare_libraries
from l2e_ds.training import loss as lm_loss
from tests.distributed.training_case import LENGTH, TrainingCase
from tests.distributed.workers.train_cases import data, make_trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARE, WINDOW, SEED = 0.02, 5, 1234
COEFFICIENT = {"published": 0.3, "scale-invariant": 0.3, "projected": 1.0}
Z_LOSS = {"published": 0.0, "scale-invariant": 0.0, "projected": 0.1}
IN_ONE_PIECE = lm_loss.IN_ONE_PIECE


def pairwise():
    """Every stage, and every two values of the other choices together."""
    yield 0, "fp32", 4, False, "published"
    yield 1, "fp32", 2, True, "published"
    yield 1, "fp16", 4, True, "published"
    yield 2, "bf16", 4, False, "published"
    yield 2, "fp16", 2, False, "published"
    yield 3, "bf16", 2, True, "published"
    yield 3, "fp32", 4, True, "scale-invariant"
    yield 1, "fp32", 4, True, "projected"
    yield 3, "bf16", 2, False, "projected"


def combinations():
    """Of the published loss every three values of different choices together, which half of the product has."""
    for stage, precision, micro_batch, checkpointing in itertools.product(range(4), DTYPES, (4, 2), (False, True)):
        if (stage, precision) != (0, "fp16"):  # refused, see test_deepspeed_config
            if (stage + list(DTYPES).index(precision) + (micro_batch == 2) + checkpointing) % 2 == 0:
                yield stage, precision, micro_batch, checkpointing, "published"
            if (precision, micro_batch) == ("fp32", 4):  # with accumulation `forward` sees other batches
                yield stage, precision, micro_batch, checkpointing, "scale-invariant"
            if precision != "fp16" and (micro_batch == 2) == checkpointing:
                yield stage, precision, micro_batch, checkpointing, "projected"


def measured(stage, precision, micro_batch, checkpointing, loss, directory, device):
    """Of the second step: gradients by name (float64), hook calls, share, tau, norms by layer and DeepSpeed's; the
    first fills the moments."""
    sections = {
        "model": {"activation_checkpointing": checkpointing},
        "optimizer": {"peak_learning_rate": 1e-30, "gradient_clipping": 0.0},  # weights stay where they are
        "training": {
            "precision": precision,
            "micro_batch": micro_batch,
            "evaluate_every": 0,
            "seed": SEED,
            "z_loss": Z_LOSS[loss],
        },
        "inhibition": {
            "coefficient": COEFFICIENT[loss],
            "loss": loss,
            "target_share": SHARE,
            "statistics_window": WINDOW,
        },
        "deepspeed": {"config": f"ds_configs/zero{stage}.json"},
        "logging": {"layer_gradients": True},
    }
    if loss == "scale-invariant":
        sections["inhibition"]["reduce"] = "forward"
    lm_loss.IN_ONE_PIECE = 0 if loss == "projected" and micro_batch == 2 else IN_ONE_PIECE
    with make_trainer(TrainingCase(sections), directory, device) as trainer:
        trainer.train_step()
        gradients, calls = {}, {}
        engine_step, inhibitor_step = trainer.engine.step, trainer.inhibitor.step

        def step_and_look():
            if trainer.engine.is_gradient_accumulation_boundary():
                scale = loss_scale(trainer.engine)
                for name, parameter in trainer.engine.module.named_parameters():
                    gradient = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
                    gradients[name] = gradient.double().cpu().clone() / scale
            engine_step()

        def count_and_step(applied=True):
            for hook in trainer.inhibitor.hooks:
                calls[hook.site.layer] = [hook.calls.forward, hook.calls.recomputed, hook.calls.backward]
            inhibitor_step(applied)

        trainer.engine.step, trainer.inhibitor.step = step_and_look, count_and_step
        applied = trainer.train_step()
        assert applied
        share, tau = trainer.inhibitor.last[:, 0].mean(), trainer.inhibitor.last[:, 1].tolist()
        norms, whole_norm = trainer._layer_gradients.norms(), float(trainer.engine.get_global_grad_norm())
    return gradients, calls, float(share), tau, norms, whole_norm


def moments_of(batches, fade):
    """Mean and sample variance of samples that weigh `fade` once a later batch has come; [M, N] each, by definition."""
    weights = torch.cat(
        [torch.full((len(z), 1), fade ** (len(batches) - 1 - i)).double() for i, z in enumerate(batches)]
    )
    z = torch.cat(batches)
    mean = (weights * z).sum(0) / weights.sum()
    return mean, (weights * (z - mean) ** 2).sum(0) / (weights.sum() - 1)


def inhibition_loss(loss, z, mean, variance, selected, micro_batches):
    """Before it is divided by n; z: [M, N], of the micro-batches one after the other."""
    d2 = (z - mean) ** 2
    if loss == "published":
        return (selected * torch.log(d2)).sum()
    if loss == "scale-invariant":
        return (selected * torch.log(d2 / d2.mean(0))).sum()
    standardised = []
    for part in z.chunk(micro_batches):  # each has its own mean and deviation, through which the gradient flows
        center, deviation = part.mean(0), part.std(0, correction=0)
        standardised.append(center.detach() + deviation.detach() * (part - center) / deviation)
    return (selected * ((torch.cat(standardised) - mean).abs() / variance.sqrt() - 1)).sum()


def reference(precision, loss, tau, micro_batches):
    """Float64 autograd of L_LM + lambda * L_MS, and of L_LM alone, z-loss included, on the whole second batch; by
    name.

    tau: [layers], as it was in the second step.
    """
    config = ModelConfig(name="pythia-14m", vocab_size=64, num_layers=4, hidden_size=32, num_heads=2)
    model = build_network(config, network_config(config, LENGTH), SEED, None)
    model = model.to(DTYPES[precision]).double()
    neurons = {}
    for layer in (1, 2):
        model.gpt_neox.layers[layer].mlp.act.register_forward_hook(
            lambda _m, _i, z, layer=layer: neurons.__setitem__(layer, z.flatten(0, 1))
        )

    def run(step):
        from l2e_ds.data.sampler import SequenceOrder

        train = data()[0].train
        rows = SequenceOrder(len(train), SEED).sequences(step * 8 + np.arange(8))
        batch = torch.from_numpy(train.batch(np.asarray(rows)))
        logits = model(input_ids=batch[:, :-1]).logits.flatten(0, 1)
        z_loss = Z_LOSS[loss] * logits.logsumexp(1).square().mean()
        return functional.cross_entropy(logits, batch[:, 1:].flatten()) + z_loss

    with torch.no_grad():
        run(0)
    first = dict(neurons)
    without_inhibition = run(1)
    total = without_inhibition
    for (layer, z), threshold in zip(neurons.items(), tau, strict=True):
        samples = [first[layer], z.detach()] if loss == "scale-invariant" else [first[layer]]
        mean, variance = moments_of(samples, float(np.exp(-1 / WINDOW)))
        selected = ((z - mean) ** 2 / variance >= threshold).double()
        value = inhibition_loss(loss, z, mean, variance, selected, micro_batches)
        total = total + COEFFICIENT[loss] * value / (SHARE * z.numel())
    names = [name for name, _ in model.named_parameters()]
    whole = torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
    plain = torch.autograd.grad(without_inhibition, list(model.parameters()))
    return dict(zip(names, whole, strict=True)), dict(zip(names, plain, strict=True))


def norm(gradients):
    return float(torch.sqrt(sum((g.double() ** 2).sum() for g in gradients)))


def in_part(gradients, key):
    """Those whose norm is logged under `gradient_norm/layerI` or `gradient_norm/rest`."""
    parts = (name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest" for name in gradients)
    part = key.removeprefix("gradient_norm/").removeprefix("layer")
    return [gradient for gradient, its in zip(gradients.values(), parts, strict=True) if its == part]


def main() -> None:
    prepare_libraries()
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        type(get_accelerator()).is_fp16_supported = lambda self: True
    output, which = Path(sys.argv[1]), {"pairwise": pairwise, "all": combinations}[sys.argv[2]]
    device = process_group.join(launch.find_launch(), timeout_minutes=5)
    results, references = {}, {}
    for combination in which():
        name = "-".join(map(str, combination))
        gradients, calls, share, tau, norms, whole_norm = measured(*combination, output / name, device)
        if collectives.is_main():
            _, precision, micro_batch, _, loss = combination
            key = (precision, loss, micro_batch if loss == "projected" else None)
            if key not in references:
                micro_batches = 8 // (micro_batch * collectives.size())  # of all ranks together
                references[key] = reference(precision, loss, tau, micro_batches)
            whole, plain = references[key]
            assert gradients.keys() == whole.keys()
            results[name] = {
                "error": norm(gradients[k] - whole[k] for k in whole) / norm(whole.values()),
                "part": norm(whole[k] - plain[k] for k in whole) / norm(whole.values()),
                "calls": calls,
                "selected": share,
                "norms": {key: [logged, norm(in_part(gradients, key))] for key, logged in norms.items()},
                "norm": whole_norm,
            }
    if collectives.is_main():
        (output / "matrix.json").write_text(json.dumps(results, indent=1))
    process_group.leave()


if __name__ == "__main__":
    main()
    leave_process(0)
