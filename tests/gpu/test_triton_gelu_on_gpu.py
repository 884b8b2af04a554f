"""GELU and method in one kernel on a real GPU; written without one at hand. Shapes: M tokens, N neurons."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from l2e_ds.inhibition import fused, losses
from l2e_ds.inhibition.losses import (
    BackwardTerms,
    Correction,
    FrozenStatistics,
    Regulariser,
    score,
    select_by_threshold,
)
from l2e_ds.inhibition.moments import sample_count

CASES = Path(__file__).parents[1] / "unit/inhibition/triton_cases.py"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PRECISION = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def test_all_cases_of_the_interpreter():
    """The same file, compiled: no TRITON_INTERPRET."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.match(r"\d{2,} passed(, \d+ warnings?)? in ", done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("loss", ["published", "scale-invariant", "projected"])
def test_a_large_micro_batch(dtype, loss):
    """[4096, 10240]: activations, sums and gradient against float64; the same every time; the host never waits."""
    from l2e_ds.inhibition import triton_gelu

    tokens, neurons = 4096, 10240
    torch.manual_seed(0)
    with torch.device("cuda"):
        x = (1.5 * torch.randn(tokens, neurons)).to(dtype)
        incoming = torch.randn(tokens, neurons).to(dtype)
        statistics = FrozenStatistics.of(
            0.5 + 0.1 * torch.randn(neurons),
            0.6 + 0.2 * torch.rand(neurons),
            torch.tensor(5.4),
            0.1 * torch.rand(neurons),
        )
        gradient_scale = torch.tensor(0.5)
        correction = Correction(0.1 * torch.randn(neurons), 0.1 * torch.randn(neurons))
    regulariser = Regulariser(loss)
    if not regulariser.is_projected:
        correction = losses.running_correction(statistics, regulariser)
    per_token = torch.ones((), dtype=torch.float64, device="cuda")
    terms = BackwardTerms(statistics, regulariser, correction, gradient_scale, per_token)
    runs = []
    for again in range(2):
        # the first time compiles; after that not even a synchronisation
        torch.cuda.set_sync_debug_mode("error" if again else "default")
        try:
            z, sums = triton_gelu.forward(x, statistics, regulariser)
            sums = fused.column_sums_of(sums, statistics, regulariser)
            value = sums.inhibition_loss(statistics, regulariser, sample_count(z))
            found, squares = triton_gelu.backward(incoming, x, terms)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        runs.append((z, *(part for part in vars(sums).values() if part is not None), value, found, squares))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    torch.testing.assert_close(z, functional.gelu(x), rtol=PRECISION[dtype], atol=1e-6)

    selected = select_by_threshold(score(z, statistics), statistics)
    assert 0.001 < float(selected.double().mean()) < 0.2
    d = z.double() - statistics.mean.double()
    exact = d * d * statistics.inverse_variance.double()
    torch.testing.assert_close(sums.d, d.sum(0), rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(sums.d2, (d * d).sum(0), rtol=1e-5, atol=0)
    assert torch.equal(sums.selected, selected.double().sum(0))
    torch.testing.assert_close(sums.score, torch.where(selected, exact, 0.0).sum(0), rtol=1e-5, atol=0)
    expected = losses.inhibition_loss(z, selected, statistics, regulariser)
    torch.testing.assert_close(value, expected.double(), rtol=1e-4, atol=0)
    if regulariser.is_projected:
        projected = losses.projection_sums(z, selected, statistics, regulariser)
        torch.testing.assert_close(
            sums.projection_sums(regulariser.power, sample_count(z)), projected, rtol=1e-4, atol=1e-2
        )

    gradient = losses.inhibition_gradient(z, selected, statistics, regulariser, correction)
    sizes = torch.stack([g.double()[selected].square().sum() for g in (incoming, gradient)])
    torch.testing.assert_close(squares, sizes, rtol=1e-4, atol=0)
    added = (gradient_scale * gradient).to(dtype)
    wide = x.double().requires_grad_()
    functional.gelu(wide).backward((incoming + added).double())
    torch.testing.assert_close(found.double(), wide.grad, rtol=4 * PRECISION[dtype], atol=4 * PRECISION[dtype])
