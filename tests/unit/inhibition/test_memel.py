"""The baseline: top-k per token, reverse and naive deactivation. Shapes: M tokens, N neurons."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from l2e_ds.inhibition.losses import FrozenStatistics, score, select_by_threshold, select_top_k
from l2e_ds.inhibition.memel import deactivate


def statistics(neurons: int, tau: float = 1.0) -> FrozenStatistics:
    generator = torch.Generator().manual_seed(neurons)
    mean = torch.randn(neurons, generator=generator)
    variance = torch.rand(neurons, generator=generator) + 0.5
    return FrozenStatistics.of(mean, variance, torch.tensor(tau), torch.zeros(neurons))


def samples(tokens: int, neurons: int) -> torch.Tensor:
    return torch.randn(tokens, neurons, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_deactivation(factor, dtype):
    """Selected values become the mean and their gradient is reversed (or dropped); all else passes untouched."""
    z = samples(9, 12).to(dtype).requires_grad_()
    mean = torch.linspace(-1, 1, 12)
    selected = torch.rand(9, 12, generator=torch.Generator().manual_seed(1)) < 0.3
    incoming = samples(9, 12).flip(0).to(dtype)
    calls = []
    out = deactivate(z, mean, selected, factor, lambda: calls.append(1))
    assert out.dtype == dtype and calls == []
    out.backward(incoming)
    assert calls == [1]
    for i in range(9):
        for j in range(12):
            assert out[i, j] == (mean[j].to(dtype) if selected[i, j] else z[i, j])
            assert z.grad[i, j] == (factor * incoming[i, j] if selected[i, j] else incoming[i, j])


def test_reverse_deactivation_is_the_published_expression():
    """Value and gradient are those of z' = mean + (stop_gradient(z) - z), docs/method.md, 6."""
    mean, selected = torch.linspace(-1, 1, 12), samples(9, 12).abs() > 1
    z = samples(9, 12).requires_grad_()
    written_out = samples(9, 12).requires_grad_()
    ours = deactivate(z, mean, selected, -1.0, lambda: None)
    reference = torch.where(selected, mean + (written_out.detach() - written_out), written_out)
    torch.testing.assert_close(ours, reference, rtol=0, atol=0)
    (ours.sin() * samples(9, 12)).sum().backward()
    (reference.sin() * samples(9, 12)).sum().backward()
    torch.testing.assert_close(z.grad, written_out.grad, rtol=0, atol=0)


@pytest.mark.parametrize("neurons", [1, 7, 50, 100, 128, 2048])
@pytest.mark.parametrize("share", ["0.001", "0.01", "0.02", "0.03", "0.1", "0.29", "0.5", "0.99"])
def test_exactly_k_of_each_token(share, neurons):
    """ceil(share * N) neurons a token, in exact arithmetic (0.02 * 50 is 1), and they are the highest."""
    scores = score(samples(13, neurons), statistics(neurons))
    selected = select_top_k(scores, statistics(neurons), float(share))
    k = -(-(Fraction(share) * neurons).numerator // (Fraction(share) * neurons).denominator)
    assert selected.sum(1).tolist() == [k] * 13
    for row, chosen in zip(scores.tolist(), selected.tolist(), strict=True):
        highest = set(sorted(range(neurons), key=row.__getitem__)[-k:])
        assert {j for j in range(neurons) if chosen[j]} == highest


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_equals_the_threshold_at_the_true_quantile(share):
    """For a token whose k-th highest score is tau, the moving threshold selects what top-k selects."""
    neurons = 200
    for token in range(20):
        z = samples(20, neurons)[token : token + 1]
        scores = score(z, statistics(neurons))
        k = round(share * neurons)
        tau = sorted(scores.flatten().tolist())[-k]
        at_quantile = statistics(neurons, tau)
        assert torch.equal(select_by_threshold(scores, at_quantile), select_top_k(scores, at_quantile, share))
