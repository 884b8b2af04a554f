"""Parts of an acceptance that look at single operations: the machine's ceilings, the method's kernels, the LM loss.

Shapes: M tokens of a micro-batch, N neurons of a layer, h hidden size, V vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from l2e_ds.acceptance.outcome import Outcome, Results, Scale
from l2e_ds.checkpoint.weights import DTYPES
from l2e_ds.inhibition import Inhibitor, NeuronSite, Settings
from l2e_ds.system.gpus import peak_tflops
from l2e_ds.training.loss import chunked_cross_entropy

ROWS = 4096  # of which a float64 reference is made at a time


def ceilings(scale: Scale) -> Outcome:
    """Measure copying, and one large product of matrices in bf16, which should reach half of the data sheet's peak."""
    size = 8192 if scale.on_gpu else 256
    left, right = (torch.randn(size, size, device=scale.device).bfloat16() for _ in range(2))
    reached = 2 * size**3 / scale.seconds(lambda: left @ right) / 1e12
    results: Results = {"copy GB/s": _copying_speed(scale) / 1e9, "bf16 product TFLOP/s": reached}
    peak = peak_tflops(scale.device, "bf16", None)
    if peak is None:
        return Outcome(None, results)
    results["share of peak"] = reached / peak
    return Outcome(reached / peak >= 0.5, results)


def _copying_speed(scale: Scale) -> float:
    """Return the bytes a second that copying a large tensor reads and writes."""
    source = torch.ones(2**29 if scale.on_gpu else 2**22, dtype=torch.bfloat16, device=scale.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / scale.seconds(lambda: target.copy_(source))


def activation(scale: Scale) -> Outcome:
    """Compare the hooked GELU with float64; on a GPU also with more elements than an int32 counts.

    The gradient is rounded to its dtype once, which is half an eps in the norm; 2 eps are allowed. What inhibition adds
    is many times as much.
    """
    results: Results = {}
    passed = True
    shapes = [(precision, min(scale.tokens, 8192), min(scale.widths.values())) for precision in scale.precisions]
    if scale.large is not None:
        shapes.append(("bf16", *scale.large))
    for precision, tokens, neurons in shapes:
        dtype = DTYPES[precision]
        error, effect = _error_of_activation(dtype, tokens, neurons, scale.device)
        results[f"{precision} [{tokens}, {neurons}] error"] = error
        # float32 goes through an approximation of the error function, good to 1e-6
        passed &= error < max(2 * torch.finfo(dtype).eps, 1e-5) < effect / 4
        if scale.on_gpu:
            torch.cuda.empty_cache()
    return Outcome(passed, results)


class Layer(nn.Module):
    """Holds the GELU of one layer, as its attribute `act`."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.GELU()


def hooked(layers: Sequence[nn.Module], neurons: int, settings: Settings, device: torch.device) -> Inhibitor:
    """Return an attached inhibitor of some layers of [1, M, N] activations each."""
    sites = [NeuronSite(index, layer, "act", "activation", neurons, "gelu") for index, layer in enumerate(layers)]
    inhibitor = Inhibitor(sites, settings, device)
    inhibitor.attach()
    return inhibitor


def one_pass(layers: Sequence[Any], inhibitor: Inhibitor | None, x: Tensor, incoming: Tensor, loss: Tensor) -> None:
    """Take x, [1, M, N], forward and backward through layers beside each other, of which each is given `incoming`.

    loss: [], in place of the LM loss, at which hooks note the scale of the gradient.
    """
    outputs = [layer.act(x) for layer in layers]
    root = loss if inhibitor is None else inhibitor.attach_loss(loss)  # last: then its gradient comes first
    torch.autograd.backward([root, *outputs], [torch.ones_like(root), *[incoming] * len(outputs)])


def _gradient(layer: Layer, inhibitor: Inhibitor | None, x: Tensor, incoming: Tensor) -> Tensor:
    """Return the gradient of x, [1, M, N], of one pass through a layer."""
    x.grad = None
    one_pass([layer], inhibitor, x, incoming, torch.ones((), device=x.device, requires_grad=True))
    assert x.grad is not None
    return x.grad


def _error_of_activation(dtype: torch.dtype, tokens: int, neurons: int, device: torch.device) -> tuple[float, float]:
    """Return the error of the inhibited gradient, and what inhibition by the published loss changes, relative to it."""
    generator = torch.Generator(device).manual_seed(0)
    share = 0.02
    settings = Settings(loss="published", coefficient=share * tokens * neurons, target_share=share)
    layer = Layer()
    inhibitor = hooked([layer], neurons, settings, device)

    def draw() -> Tensor:
        return torch.randn(1, tokens, neurons, generator=generator, device=device, dtype=dtype)

    x, incoming = draw().requires_grad_(), draw()
    _gradient(layer, inhibitor, x, incoming)  # the first step only measures: it knows no moments yet
    inhibitor.step()
    frozen = inhibitor.hooks[0].step_statistics
    found = _gradient(layer, inhibitor, x, incoming)
    squares = torch.zeros(3, dtype=torch.float64, device=device)
    for first in range(0, tokens, ROWS):
        part = slice(first, first + ROWS)
        wide = x.detach()[0, part].double().requires_grad_()
        exact = functional.gelu(wide)
        d = functional.gelu(x.detach()[0, part]).double() - frozen.mean.double()  # as stored: it decides the selection
        chosen = d.float().square() * frozen.inverse_variance >= frozen.tau
        added = torch.where(chosen, 2 / torch.where(chosen, d, 1.0), 0.0)
        reference, effect = (
            torch.autograd.grad(exact, wide, of_z, retain_graph=True)[0]
            for of_z in (incoming[0, part].double() + added, added)
        )
        differences = (found[0, part].double() - reference, effect, reference)
        squares += torch.stack([difference.square().sum() for difference in differences])
    error, effect_of_all, whole = squares.sqrt().tolist()
    return error / whole, effect_of_all / whole


def lm_loss(scale: Scale) -> Outcome:
    """Compare the LM loss and its gradients with float64, on a GPU at Pythia's vocabulary.

    The hidden states' gradient is a sum of V products of numbers rounded to the dtype: its relative error, in the norm,
    is of the order of eps; 4 eps are allowed.
    """
    tokens, hidden, vocabulary = (20_000, 512, 50_304) if scale.on_gpu else (700, 32, 5000)
    results: Results = {}
    passed = True
    for precision in scale.precisions:
        dtype = DTYPES[precision]
        generator = torch.Generator(scale.device).manual_seed(0)
        inputs = torch.randn(tokens, hidden, generator=generator, device=scale.device).to(dtype).requires_grad_()
        weight = 0.1 * torch.randn(vocabulary, hidden, generator=generator, device=scale.device)
        weight = weight.to(dtype).requires_grad_()
        targets = torch.randint(vocabulary, (tokens,), generator=generator, device=scale.device)
        scaled = 2.0**12 if dtype == torch.float16 else 1.0
        loss = chunked_cross_entropy(inputs, weight, targets)
        (loss * scaled).backward()
        exact_loss, of_inputs, of_weight = _exact_loss(inputs.detach(), weight.detach(), targets, scaled)
        results[f"{precision} loss error"] = difference = abs(float(loss.detach()) / exact_loss - 1)
        passed &= difference < max(torch.finfo(dtype).eps, 1e-5)
        for name, tensor, exact in (("hidden", inputs, of_inputs), ("weight", weight, of_weight)):
            assert tensor.grad is not None
            error = float((tensor.grad.double() - exact).norm() / exact.norm())
            results[f"{precision} {name} error"] = error
            passed &= error < max(4 * torch.finfo(dtype).eps, 1e-5)
    return Outcome(passed, results)


def _exact_loss(inputs: Tensor, weight: Tensor, targets: Tensor, scaled: float) -> tuple[float, Tensor, Tensor]:
    """Return the mean cross-entropy in float64 and the gradients of `scaled` times it, [M, h] and [V, h]."""
    x, wide = inputs.double().requires_grad_(), weight.double().requires_grad_()
    total = 0.0
    for rows, wanted in zip(x.split(ROWS // 8), targets.split(ROWS // 8), strict=True):
        loss = functional.cross_entropy(rows @ wide.T, wanted, reduction="sum") / len(targets)
        (loss * scaled).backward()
        total += float(loss.detach())
    assert x.grad is not None and wide.grad is not None
    return total, x.grad, wide.grad


def timings(scale: Scale) -> Outcome:
    """Time forward and backward of GELU alone and under inhibition, at the widths of some models.

    Shares are of the copying speed: GELU reads three tensors of [M, N] and writes two. `added ms` is what one hooked
    layer takes more, without what follows once a step.
    """
    results: Results = {}
    copied = _copying_speed(scale)
    for model, neurons in scale.widths.items():
        x = torch.randn(1, scale.tokens, neurons, device=scale.device).bfloat16().requires_grad_()
        incoming = torch.randn(1, scale.tokens, neurons, device=scale.device).bfloat16()
        without = scale.seconds(partial(_gradient, Layer(), None, x, incoming))
        with_it = _seconds_under_inhibition(scale, x, incoming)
        ideal = 5 * x.nbytes / copied
        results[f"{model} GELU share"] = ideal / without
        results[f"{model} L2E share"] = ideal / with_it
        results[f"{model} added ms"] = 1e3 * (with_it - without)
    if scale.on_gpu:
        from l2e_ds.inhibition import triton_gelu  # needs Triton, which is there on GPUs

        chosen = triton_gelu.STAGES, triton_gelu.BACKWARD_STRETCH
        for stages, stretch in ((2, 8), (3, 8), (4, 8), (2, 32), (2, 64)):  # the kernels' numbers, to choose by
            triton_gelu.STAGES, triton_gelu.BACKWARD_STRETCH = stages, stretch
            seconds = _seconds_under_inhibition(scale, x, incoming)
            results[f"{stages} stages, stretch {stretch}: ms"] = 1e3 * seconds
        triton_gelu.STAGES, triton_gelu.BACKWARD_STRETCH = chosen
    return Outcome(None, results)


def _seconds_under_inhibition(scale: Scale, x: Tensor, incoming: Tensor) -> float:
    """Return the seconds of forward and backward of an inhibited layer of [1, M, N] activations."""
    layer = Layer()
    inhibitor = hooked([layer], x.shape[-1], Settings(), scale.device)
    for _ in range(3):  # history, the self-test, compilation
        _gradient(layer, inhibitor, x, incoming)
        inhibitor.step()
    return scale.seconds(partial(_gradient, layer, inhibitor, x, incoming))


PARTS = {"ceilings": ceilings, "activation": activation, "loss": lm_loss, "timings": timings}
"""The function of each part of `l2e-ds accept` that needs the scale only."""
