"""`measure_scores` against NumPy on the concatenated activations. Shapes: M tokens, N neurons."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from l2e_ds.inhibition import NeuronSite
from l2e_ds.inhibition.measure import measure_scores

NEURONS = (41, 23)
SIZES = ((3, 40), (1, 7), (5, 64), (2, 11))  # micro-batches [B, T]


class Network(nn.Module):
    """Two layers of neurons, one seen after its activation, one before its down projection."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(8, n) for n in NEURONS)
        self.act = nn.GELU()
        self.down = nn.Linear(NEURONS[1], 3)
        with torch.no_grad():
            for up in self.up:  # dead neurons; an even number of them leaves an odd number of live ones
                up.weight[:4] = 0
                up.weight[4:] *= torch.logspace(-1, 1, len(up.weight) - 4).reshape(-1, 1)

    def neurons(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = nn.functional.gelu(self.up[0](x))
        return first, self.up[1](x).relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.act(self.up[0](x))
        return first.sum(-1, keepdim=True) + self.down(self.up[1](x).relu())


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 1.0), (0.0, 0.25, 1.0, 3.0)])
@pytest.mark.parametrize("share", [0.003, 0.02, 0.1])
def test_equals_numpy(share, weights):
    """Top-share mean MS within 1.2 %; mean S, median kurtosis of live neurons and the dead share exactly.

    Micro-batches differ in size; rows of weight 0 count nowhere, however extreme, others as if
    they were there so many times.
    """
    torch.manual_seed(0)
    network = Network()
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(*size, 8, generator=generator) for size in SIZES]
    numbers = [torch.tensor(weights)[torch.randint(len(weights), size, generator=generator)] for size in SIZES]
    for x, number in zip(inputs, numbers, strict=True):
        x[number == 0] = 50.0
    sites = [NeuronSite(3, network, "act", "activation", 41), NeuronSite(7, network, "down", "projection", 23)]
    outputs = [network(x) for x in inputs]

    def passes(set_weight):
        for i, (x, number) in enumerate(zip(inputs, numbers, strict=True)):
            set_weight(number.reshape(-1, 1) if len(weights) > 1 else None)
            torch.testing.assert_close(network(x), outputs[i], rtol=0, atol=0)  # it only reads

    results = measure_scores(sites, passes, share, "cpu")
    assert [result.layer for result in results] == [3, 7]
    assert not network.act._forward_hooks and not network.down._forward_pre_hooks
    for layer, result in enumerate(results):
        with torch.no_grad():
            z = torch.cat([network.neurons(x)[layer].flatten(0, 1) for x in inputs]).double().numpy()
        number = torch.cat([part.flatten() for part in numbers]).numpy()
        z = z.repeat((4 * number).astype(int), axis=0)
        variance = z.var(0) * number.sum() / (number.sum() - 1)
        alive = variance > 1e-12
        phi = (z - z.mean(0)) ** 2 / np.where(alive, variance, np.inf)
        highest = np.sort(phi.flatten())[::-1]
        wanted = share * phi.size
        whole = int(wanted)
        top = (highest[:whole].sum() + (wanted - whole) * highest[whole]) / wanted
        assert result.top_share_score == pytest.approx(top, rel=0.012)
        assert result.mean_s == pytest.approx(np.sqrt(variance).mean(), rel=1e-5)
        assert result.kurtosis == pytest.approx(np.median((phi**2).mean(0)[alive]), rel=1e-4)
        assert result.dead_share == pytest.approx(1 - alive.mean())
        assert 0 < result.dead_share < 1


def test_normal_distribution():
    """Normally distributed neurons: kurtosis near 3, S near their own, no dead ones (a check of the definitions)."""
    layer = nn.Module()
    layer.act = nn.Identity()
    z = 2.5 * torch.randn(20_000, 9, generator=torch.Generator().manual_seed(0)) + 4

    def passes(set_weight):
        for part in z.split(3_000):
            layer.act(part)

    (result,) = measure_scores([NeuronSite(0, layer, "act", "activation", 9)], passes, 0.02, "cpu")
    assert result.kurtosis == pytest.approx(3, rel=0.05)
    assert result.mean_s == pytest.approx(2.5, rel=0.02)
    assert result.dead_share == 0
    assert result.top_share_score == pytest.approx(7.3, rel=0.05)  # E[x^2 | x^2 >= q] of a chi-squared at 2 %


def test_hooks_are_removed_after_an_exception():
    """A failing pass leaves the network without hooks."""
    network = Network()

    def passes(set_weight):
        network(torch.randn(2, 3, 8))
        raise RuntimeError("stop")

    sites = [NeuronSite(0, network, "act", "activation", 41), NeuronSite(1, network, "down", "projection", 23)]
    with pytest.raises(RuntimeError, match="stop"):
        measure_scores(sites, passes, 0.02, "cpu")
    assert not network.act._forward_hooks and not network.down._forward_pre_hooks
