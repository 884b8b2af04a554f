"""One compiled pass against the plain tensor operations. Shapes: M tokens, N neurons."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from l2e_ds.inhibition import fused, losses
from l2e_ds.inhibition.losses import (
    BackwardTerms,
    Correction,
    FrozenStatistics,
    Regulariser,
    score,
    select_by_threshold,
)
from l2e_ds.inhibition.moments import Moments, sample_count

NEURONS = 24
PUBLISHED, SCALE_INVARIANT = Regulariser("published"), Regulariser("scale-invariant")
PROJECTED = [Regulariser("projected", power) for power in (0, 1, 2)]
# every loss, and every dtype: each pair is compiled, which takes seconds
every_loss_and_dtype = pytest.mark.parametrize(
    ("regulariser", "dtype"),
    [
        *((regulariser, torch.float32) for regulariser in (PUBLISHED, SCALE_INVARIANT, *PROJECTED)),
        *((PROJECTED[1], dtype) for dtype in (torch.bfloat16, torch.float16)),
    ],
    ids=str,
)


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, FrozenStatistics]:
    """Activations, an incoming gradient, and statistics with two dead neurons; about 2 % are selected."""
    z = (0.2 + 0.7 * numbers(0, tokens, NEURONS)).to(dtype)
    variance = 0.3 + 0.1 * numbers(2, NEURONS).square()
    variance[[3, 7]] = torch.tensor([0.0, losses.VARIANCE_FLOOR])
    rate = torch.rand(NEURONS, generator=torch.Generator().manual_seed(3)) * 0.1
    statistics = FrozenStatistics.of(0.1 * numbers(1, NEURONS), variance, torch.tensor(5.4), rate)
    return z, numbers(4, tokens, NEURONS).to(dtype), statistics


@every_loss_and_dtype
@pytest.mark.parametrize("tokens", [7, 69], ids=["fewer than a group", "groups and a remainder"])
def test_sums_are_those_of_float64(regulariser, dtype, tokens):
    """Every sum equals the written-out one in float64 over the same selection."""
    z, _, statistics = example(tokens, dtype)
    scores = score(z, statistics)
    selected = select_by_threshold(scores, statistics)
    if tokens > 50:
        assert 0 < int(selected.sum()) < 0.1 * selected.numel()
    d = z.double() - statistics.mean.double()
    exact = d * d * statistics.inverse_variance.double()
    sums = fused.column_sums(z, statistics, regulariser)
    torch.testing.assert_close(sums.d, d.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.d2, (d * d).sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(sums.selected, selected.double().sum(0))
    torch.testing.assert_close(sums.score, torch.where(selected, exact, 0.0).sum(0), rtol=1e-5, atol=0)
    expected = losses.inhibition_loss(z.double(), selected, statistics, regulariser)
    found = sums.inhibition_loss(statistics, regulariser, sample_count(z))
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-4)
    step, projection_sums = fused.observe(z, statistics, regulariser)
    header = [tokens, float(found), float(sums.score.sum())]
    torch.testing.assert_close(step[:3], torch.tensor(header).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(step[3:], torch.cat([sums.d, sums.d2, sums.selected]), rtol=1e-6, atol=1e-6)
    if regulariser.is_projected:
        plain = losses.projection_sums(z.double(), selected, statistics, regulariser)
        torch.testing.assert_close(projection_sums, plain / tokens, rtol=1e-5, atol=1e-5)
    else:
        assert projection_sums is None


def test_sums_without_history():
    """Far from zero, where float32 squares would lose the variance: two passes keep it."""
    z = 1000 + 0.01 * numbers(0, 69, NEURONS)
    nothing = torch.zeros(NEURONS)
    statistics = FrozenStatistics.of(nothing, nothing, torch.tensor(5.4), nothing)
    step, _ = fused.observe_without_history(z, statistics, PROJECTED[1])
    header, d, d2, selected = step.split([3, NEURONS, NEURONS, NEURONS])
    assert header.tolist() == [69, 0, 0]
    moments = Moments.from_sums(header[0], d, d2, nothing.double())
    torch.testing.assert_close(moments.mean, z.double().mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(moments.variance, z.double().var(0), rtol=1e-3, atol=0)
    assert selected.count_nonzero() == 0


def test_a_neuron_that_wakes_up():
    """Scores of 1e12 and more, in every token of a group, leave the loss finite: the product of ratios does not
    overflow."""
    z, _, statistics = example(64, torch.float32)
    mean, variance = statistics.mean, statistics.variance.clone()
    variance[0] = 2 * losses.VARIANCE_FLOOR * (1 + mean[0] ** 2)
    statistics = FrozenStatistics.of(mean, variance, statistics.tau, statistics.rate)
    z[:, 0] = mean[0] + 3.0
    selected = select_by_threshold(score(z, statistics), statistics)
    assert selected[:, 0].all() and float(score(z, statistics)[0, 0]) > 1e12
    for regulariser in (PUBLISHED, PROJECTED[0]):
        expected = losses.inhibition_loss(z, selected, statistics, regulariser)
        sums = fused.column_sums(z, statistics, regulariser)
        found = sums.inhibition_loss(statistics, regulariser, sample_count(z))
        torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=0)


def correction_of(statistics: FrozenStatistics, regulariser: Regulariser) -> Correction:
    """Any: what takes part in a projection comes from elsewhere."""
    if regulariser.is_projected:
        return Correction(0.1 * numbers(6, NEURONS), 0.2 * numbers(7, NEURONS))
    return losses.running_correction(statistics, regulariser)


SCALE = torch.tensor(0.03)
PER_TOKEN = torch.tensor(7.0, dtype=torch.float64)


def assert_squares(squares, incoming, gradient, selected):
    expected = [float(g[selected].square().sum()) for g in (7 * incoming.double(), gradient.double())]
    # of positive float32 terms, each rounded a few times
    assert squares.tolist() == pytest.approx(expected, rel=1e-5) and min(expected) > 0


@every_loss_and_dtype
def test_gradient_is_the_plain_one(dtype, regulariser):
    """Added in float32, rounded once to the gradient's precision; to the bit in float32 where nothing is selected."""
    z, incoming, statistics = example(69, dtype)
    selected = select_by_threshold(score(z, statistics), statistics)
    correction = correction_of(statistics, regulariser)
    plain = losses.inhibition_gradient(z, selected, statistics, regulariser, correction)
    terms = BackwardTerms(statistics, regulariser, correction, SCALE, PER_TOKEN)
    found, squares = fused.add_gradient(incoming, z, terms)
    assert found.dtype == dtype
    total = incoming.double() + plain.double() * float(SCALE)
    # one rounding of the sum, to half the distance of its neighbours, and a few in float32 before
    neighbours = total.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    before = 8 * torch.finfo(torch.float32).eps * (incoming.abs().double() + plain.abs().double() * float(SCALE))
    assert bool(((found.double() - total).abs() <= neighbours / 2 + before).all())
    assert_squares(squares, incoming, plain, selected)
    if regulariser == PUBLISHED:
        assert torch.equal(found[~selected], incoming[~selected])
        assert not torch.equal(found[selected], incoming[selected])


@every_loss_and_dtype
def test_gradient_within_that_of_the_gelu(dtype, regulariser):
    """Of the pre-activation: float64's GELU derivative times the gradient of z with the inhibition's."""
    _, incoming, statistics = example(69, dtype)
    x = numbers(5, 69, NEURONS).to(dtype)
    # cdf(x) = z / x where there is none, or hardly one, to divide by; and where the cdf itself is next to nothing
    x[:4, 0] = torch.tensor([0.0, -0.0, 1e-38, -1e-25]).to(dtype)
    x[4:8, 0] = torch.tensor([-3.0, -5.0, -9.0, 9.0]).to(dtype)
    z, correction = torch.nn.functional.gelu(x), correction_of(statistics, regulariser)
    selected = select_by_threshold(score(z, statistics), statistics)
    assert int(selected.sum()) > 0
    plain = losses.inhibition_gradient(z, selected, statistics, regulariser, correction)
    exact = torch.ops.aten.gelu_backward(incoming.double() + 0.03 * plain.double(), x.double())
    terms = BackwardTerms(statistics, regulariser, correction, SCALE, PER_TOKEN)
    found, squares = fused.gelu_backward(incoming, x, z, terms)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
    assert_squares(squares, incoming, plain, selected)


PROGRAM = """
import torch
from l2e_ds.errors import CompileError
from l2e_ds.inhibition import fused, losses
z, n = torch.randn(32, 8), torch.ones(8)
try:
    fused.column_sums(z, losses.FrozenStatistics.of(0 * n, n, torch.tensor(5.0), 0 * n), losses.Regulariser())
except CompileError as error:
    print(error)
"""


@pytest.mark.full
def test_a_compiler_that_is_missing(tmp_path):
    """The error is one line that says what is needed, and what works without it."""
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert re.fullmatch(r"inhibition.fused: torch.compile failed \(.+\); .+inhibition.fused: false.+\n", done.stdout), (
        done
    )
