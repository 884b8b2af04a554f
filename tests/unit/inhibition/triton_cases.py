"""What `test_triton_gelu.py` runs in Triton's interpreter, and `tests/gpu` on a GPU. In a process of its own: whether
Triton interprets is decided when it is imported. Shapes: M tokens, N neurons."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn import functional

from l2e_ds.inhibition import Inhibitor, fused, losses, triton_gelu
from l2e_ds.inhibition.compiled_implementations import GeluInKernel
from l2e_ds.inhibition.losses import (
    BackwardTerms,
    Correction,
    FrozenStatistics,
    Regulariser,
    score,
    select_by_threshold,
)
from l2e_ds.inhibition.moments import sample_count
from tests.unit.inhibition.test_hook import (
    Network,
    assert_same,
    assert_same_state,
    lm_loss,
    settings,
    sites,
    text,
    train,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One unit in the last place; the interpreter cuts bfloat16 off where a GPU rounds.
PRECISION = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# One element; less than a tile; a tile and a whole stretch; more than one of each, nothing even.
SHAPES = [(1, 1), (7, 24), (128, 256), (261, 300)]
# the interpreter takes seconds for a large one
every_shape_and_dtype = pytest.mark.parametrize(
    ("tokens", "neurons", "dtype"),
    [
        (*shape, dtype)
        for shape in SHAPES
        for dtype in DTYPES
        if not INTERPRETED or dtype == torch.float32 or shape == (7, 24)
    ],
)
PUBLISHED, SCALE_INVARIANT = Regulariser("published"), Regulariser("scale-invariant")
REGULARISERS = [PUBLISHED, SCALE_INVARIANT, *(Regulariser("projected", power) for power in (0, 1, 2))]
every_regulariser = pytest.mark.parametrize("regulariser", REGULARISERS, ids=str)


def example(tokens: int, neurons: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, FrozenStatistics]:
    """Pre-activations, the gradient of the activations, and their statistics; of 24 and more neurons two are dead."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, neurons, generator=generator)
    x[0, 0] = 4.0  # selected
    incoming = torch.randn(tokens, neurons, generator=generator)
    mean = 0.3 + 0.1 * torch.randn(neurons, generator=generator)
    variance = 0.2 + 0.1 * torch.rand(neurons, generator=generator)
    if neurons >= 24:
        variance[[3, 7]] = torch.tensor([0.0, losses.VARIANCE_FLOOR])
    rate = 0.1 * torch.rand(neurons, generator=generator)
    constants = (tensor.to(DEVICE) for tensor in (mean, variance, torch.tensor(5.4), rate))
    return x.to(DEVICE, dtype), incoming.to(DEVICE, dtype), FrozenStatistics.of(*constants)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_are_those_of_pytorch(dtype):
    """To the last place, far from zero as well; of every shape: test_sums_are_those_of_float64."""
    x, _, statistics = example(7, 24, dtype)
    x[-1, :12] *= 20
    z, _ = triton_gelu.forward(x, statistics, PUBLISHED)
    assert z.dtype == dtype and z.is_contiguous()
    torch.testing.assert_close(z, functional.gelu(x), rtol=PRECISION[dtype], atol=1e-6)


@every_shape_and_dtype
def test_sums_are_those_of_float64(dtype, tokens, neurons):
    """Every sum, of the activations as they were stored."""
    x, _, statistics = example(tokens, neurons, dtype)
    z, sums = triton_gelu.forward(x, statistics, PUBLISHED)
    torch.testing.assert_close(z, functional.gelu(x), rtol=PRECISION[dtype], atol=1e-6)
    sums = fused.column_sums_of(sums, statistics, PUBLISHED)
    scores = score(z, statistics)
    selected = select_by_threshold(scores, statistics)
    assert 0 < int(selected.sum()) <= max(1, 0.2 * selected.numel())
    d = z.double() - statistics.mean.double()
    exact = d * d * statistics.inverse_variance.double()
    torch.testing.assert_close(sums.d, d.sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sums.d2, (d * d).sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(sums.selected, selected.double().sum(0))
    torch.testing.assert_close(sums.score, torch.where(selected, exact, 0.0).sum(0), rtol=1e-5, atol=0)
    log_ratio = torch.where(selected, exact / 5.4, 1.0).log().sum(0)
    torch.testing.assert_close(sums.measure, log_ratio, rtol=1e-5, atol=1e-5)
    for power in (0, 1, 2) if not INTERPRETED or (tokens, neurons) == (7, 24) else (1,):
        regulariser = Regulariser("projected", power)
        _, sums = triton_gelu.forward(x, statistics, regulariser)
        sums = fused.column_sums_of(sums, statistics, regulariser)
        expected = losses.projection_sums(z, selected, statistics, regulariser)
        torch.testing.assert_close(sums.projection_sums(power, sample_count(z)), expected, rtol=1e-5, atol=1e-4)


@every_regulariser
def test_loss_is_that_of_plain_operations(regulariser):
    """From the sums alone."""
    x, _, statistics = example(*((7, 24) if INTERPRETED else (128, 256)), torch.float32)
    z, sums = triton_gelu.forward(x, statistics, regulariser)
    sums = fused.column_sums_of(sums, statistics, regulariser)
    selected = select_by_threshold(score(z, statistics), statistics)
    expected = losses.inhibition_loss(z, selected, statistics, regulariser)
    found = sums.inhibition_loss(statistics, regulariser, sample_count(z))
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)


def test_a_neuron_that_wakes_up():
    """Scores of 1e12 and more, in every token, leave the loss finite: the product of ratios does not overflow."""
    x, _, statistics = example(64, 24, torch.float32)
    mean, variance = statistics.mean, statistics.variance.clone()
    variance[0] = 2 * losses.VARIANCE_FLOOR * (1 + mean[0] ** 2)
    statistics = FrozenStatistics.of(mean, variance, statistics.tau, statistics.rate)
    x[:, 0] = 3.0
    z, sums = triton_gelu.forward(x, statistics, PUBLISHED)
    sums = fused.column_sums_of(sums, statistics, PUBLISHED)
    selected = select_by_threshold(score(z, statistics), statistics)
    assert selected[:, 0].all() and float(score(z, statistics)[0, 0]) > 1e12
    expected = losses.inhibition_loss(z, selected, statistics, PUBLISHED)
    torch.testing.assert_close(
        sums.inhibition_loss(statistics, PUBLISHED, sample_count(z)), expected.double(), rtol=1e-4, atol=0
    )


def per_token() -> torch.Tensor:
    return torch.tensor(7.0, dtype=torch.float64, device=DEVICE)


def correction_of(statistics, regulariser):
    """Any: what takes part in a projection comes from elsewhere."""
    if not regulariser.is_projected:
        return losses.running_correction(statistics, regulariser)
    generator = torch.Generator().manual_seed(1)
    shift, pull = (0.2 * torch.randn(len(statistics.mean), generator=generator).to(DEVICE) for _ in range(2))
    return Correction(shift, pull)


def expected_gradient(x, z, incoming, statistics, regulariser, gradient_scale):
    """Of x, float64: autograd's through the GELU, behind incoming + gradient_scale * dL/dz."""
    selected = select_by_threshold(score(z, statistics), statistics)
    correction = correction_of(statistics, regulariser)
    added = gradient_scale * losses.inhibition_gradient(z, selected, statistics, regulariser, correction)
    x = x.double().requires_grad_()
    functional.gelu(x).backward(incoming.double() + added.double())
    return x.grad


@pytest.mark.parametrize(
    ("tokens", "neurons", "dtype", "regulariser"),
    [
        (*shape, dtype, regulariser)
        for shape in SHAPES
        for dtype in DTYPES
        for regulariser in REGULARISERS
        # in the interpreter each is varied alone
        if not INTERPRETED or (shape != (7, 24)) + (dtype != torch.float32) + (regulariser != Regulariser()) <= 1
    ],
    ids=str,
)
def test_gradient_is_autograd_of_float64(dtype, regulariser, tokens, neurons):
    """Through the GELU, with what the written-out loss adds in front of it."""
    x, incoming, statistics = example(tokens, neurons, dtype)
    gradient_scale = torch.tensor(0.5, device=DEVICE)
    z, _ = triton_gelu.forward(x, statistics, regulariser)
    correction = correction_of(statistics, regulariser)
    terms = BackwardTerms(statistics, regulariser, correction, gradient_scale, per_token())
    found, squares = triton_gelu.backward(incoming, x, terms)
    expected = expected_gradient(x, z, incoming, statistics, regulariser, gradient_scale)
    without = expected_gradient(x, z, incoming, statistics, regulariser, 0 * gradient_scale)
    selected = select_by_threshold(score(z, statistics), statistics)
    added = losses.inhibition_gradient(z, selected, statistics, regulariser, correction)
    sizes = torch.stack([g[selected].square().sum() for g in (7 * incoming.double(), added.double())])
    torch.testing.assert_close(squares, sizes, rtol=1e-5, atol=0)
    assert found.dtype == dtype and not torch.equal(expected, without)
    # rounded once, at the end, which the interpreter cuts off; float32 before
    torch.testing.assert_close(found.double(), expected, rtol=PRECISION[dtype], atol=max(PRECISION[dtype], 1e-5))


def test_backward_may_walk_down_more_rows(monkeypatch):
    """Any number of them gives the same gradient, to the bit, and the same sums."""
    x, incoming, statistics = example(261, 24, torch.float32)
    correction = correction_of(statistics, SCALE_INVARIANT)
    terms = BackwardTerms(statistics, SCALE_INVARIANT, correction, torch.tensor(0.5, device=DEVICE), per_token())
    expected, sums = triton_gelu.backward(incoming, x, terms)
    monkeypatch.setattr(triton_gelu, "BACKWARD_STRETCH", 32)
    found, found_sums = triton_gelu.backward(incoming, x, terms)
    assert torch.equal(found, expected)
    torch.testing.assert_close(found_sums, sums, rtol=1e-5, atol=0)


def test_gradients_that_are_not_contiguous():
    """An expanded one, as behind a sum, and a transposed one."""
    x, _, statistics = example(7, 24, torch.float32)
    gradient_scale = torch.tensor(0.5, device=DEVICE)
    for incoming in (torch.tensor(0.7, device=DEVICE).expand(7, 24), torch.randn(24, 7, device=DEVICE).t()):
        correction = correction_of(statistics, SCALE_INVARIANT)
        terms = BackwardTerms(statistics, SCALE_INVARIANT, correction, gradient_scale, per_token())
        found, _ = triton_gelu.backward(incoming, x, terms)
        assert torch.equal(found, triton_gelu.backward(incoming.contiguous(), x, terms)[0])


def test_only_the_pre_activation_is_kept():
    """As for a GELU alone."""
    x, _, statistics = example(7, 24, torch.float32)
    x.requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fused.WithInhibition.apply(
            x, lambda x: triton_gelu.forward(x, statistics, PUBLISHED)[0], lambda gradient, x, z: gradient, False
        )
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


# --- whole runs --------------------------------------------------------------------------------------------------


@cache
def inhibited(recompute=None, compiled=False, function="gelu", split=2, **changes):
    """Four steps on DEVICE: ((losses, records), inhibitor), not to be changed. The first has no history, and of a
    strength only the fourth has lambda."""
    network = Network(recompute=recompute).to(DEVICE)
    chosen = [replace(site, function=function) for site in sites(network)]
    inhibitor = Inhibitor(chosen, settings(**{"fused": True, **changes}), device=DEVICE)
    with inhibitor:
        run = torch.compile(network, backend="aot_eager") if compiled else None
        return train(network, inhibitor, range(4), split=split, run=run), inhibitor


def by_kernel(inhibitor: Inhibitor) -> bool:
    """Of the newest micro-batch, every layer the same."""
    (used,) = {isinstance(hook.implementation, GeluInKernel) for hook in inhibitor.hooks}
    return used


@pytest.mark.parametrize(
    ("method", "recompute", "split"),
    [
        ("published", False, 2),
        ("published", True, 2),
        ("scale-invariant", None, 2),
        ("projected", False, 2),
        ("strength", None, 1),
    ],
)
def test_runs_equal_those_of_plain_operations(method, recompute, split):
    """Losses, gradients, sums and state; and with checkpointing those without it, bit for bit."""
    plain, plain_inhibitor = inhibited(method=method, fused=False, split=split)
    assert not by_kernel(plain_inhibitor)
    found, inhibitor = inhibited(recompute=recompute, method=method, split=split)
    assert by_kernel(inhibitor) and not inhibitor.self_test_pending
    assert float(inhibitor.last[:, 0].min()) > 0
    assert_same(found, plain, rtol=1e-4, atol=1e-6)
    assert_same_state(inhibitor, plain_inhibitor, rtol=1e-4, atol=1e-6)
    once, once_inhibitor = inhibited(recompute=None, method=method, split=split)
    assert_same(found, once)
    assert_same_state(inhibitor, once_inhibitor)


def test_calls_are_counted_and_the_first_step_is_plain():
    """The self-test's counters, and the largest gradient it waits for."""
    network = Network(recompute=False).to(DEVICE)
    inhibitor = Inhibitor([replace(s, function="gelu") for s in sites(network)], settings(fused=True), device=DEVICE)
    with inhibitor:
        for step in range(2):
            for micro_batch in text(step).to(DEVICE).chunk(2):
                inhibitor.attach_loss(lm_loss(network, micro_batch)).backward()
            assert by_kernel(inhibitor) == bool(step)
            for hook in inhibitor.hooks:
                assert (hook.calls.forward, hook.calls.recomputed, hook.calls.backward) == (2, 2, 2)
                assert bool(hook.largest_gradient > 0) == bool(step)
            inhibitor.step()


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputation_goes_the_way_of_its_forward(recompute):
    """Also where the token mask of the next micro-batch is there already."""
    network = Network(recompute=recompute).to(DEVICE)
    inhibitor = Inhibitor([replace(s, function="gelu") for s in sites(network)], settings(fused=True), device=DEVICE)
    with inhibitor:
        train(network, inhibitor, [0])
        loss = inhibitor.attach_loss(lm_loss(network, text(1).to(DEVICE)))
        inhibitor.set_token_mask(torch.ones(2, 16, device=DEVICE))
        loss.backward()
        assert by_kernel(inhibitor)
        assert all(hook.calls.recomputed == 1 for hook in inhibitor.hooks)


def test_compiled_model_equals_eager():
    """Under torch.compile the kernel is called as often, outside the graphs."""
    eager, inhibitor = inhibited(recompute=None, method="published", split=2)
    torch.compiler.reset()
    compiled, compiled_inhibitor = inhibited(compiled=True, method="published", split=2)
    assert by_kernel(compiled_inhibitor) and not compiled_inhibitor.self_test_pending
    assert_same(compiled, eager, rtol=1e-4, atol=1e-6)
    assert_same_state(compiled_inhibitor, inhibitor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"coefficient": 0.0},
        {"fused": False},
        {"function": None},
    ],
    ids=str,
)
def test_where_pytorch_computes_the_gelu(changes):
    """With lambda 0, as a run without inhibition must be the same to the bit; and wherever `fused.py` is not used."""
    run, inhibitor = inhibited(**changes)
    assert not by_kernel(inhibitor)
    if changes == {"coefficient": 0.0}:
        assert_same(run, train(Network().to(DEVICE), None, range(4), split=2))


def test_padding_and_evaluation():
    """A token mask, and eval mode, go to PyTorch's GELU."""
    network = Network().to(DEVICE)
    inhibitor = Inhibitor([replace(s, function="gelu") for s in sites(network)], settings(fused=True), device=DEVICE)
    with inhibitor:
        train(network, inhibitor, range(2))
        assert by_kernel(inhibitor)
        network.eval()
        seen = network(text(0).to(DEVICE)[:, :-1])
        network.train()
        inhibitor.set_token_mask(torch.ones(8, 16, device=DEVICE))
        inhibitor.attach_loss(lm_loss(network, text(0).to(DEVICE))).backward()
        assert not by_kernel(inhibitor)
    network.eval()
    assert torch.equal(seen, network(text(0).to(DEVICE)[:, :-1]))
