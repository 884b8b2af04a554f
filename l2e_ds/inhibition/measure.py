"""Measure how monosemantic the neurons of some layers are on given text, for any training method (docs/method.md, 9).

Two passes over the same batches give exact moments, and then scores with these moments. Activations are only read.
Shapes: M tokens of a micro-batch, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l2e_ds.distributed.collectives import all_reduce_sum
from l2e_ds.inhibition.losses import VARIANCE_FLOOR, is_alive
from l2e_ds.inhibition.moments import Moments, exact_sums, sample_count
from l2e_ds.inhibition.settings import NeuronSite

# Scores are counted in bins of equal logarithmic width. A bin's own sum is exact, so that only the part of one bin at
# the edge of the top share is approximate, by at most the bin's width of 1.1 %.
BINS, LOWEST, HIGHEST = 2048, -4.0, 6.0  # the bounds are exponents of 10
# Tokens that are scored together. An activation takes some 30 bytes of temporaries: those of a whole micro-batch would
# not fit into the memory that training fills with such a micro-batch (training.micro_batch: auto).
SLICE = 4096


@dataclass(frozen=True)
class LayerScores:
    """Holds what was measured of one layer.

    top_share_score: the mean MS of the highest `share` of all (token, neuron) pairs. mean_s: the mean over neurons of
    the standard deviation S. kurtosis: the median over live neurons of E[phi^2], which is 3 for a normal distribution;
    NaN without live neurons. dead_share: the share of neurons that do not vary.
    """

    layer: int
    top_share_score: float
    mean_s: float
    kurtosis: float
    dead_share: float


@contextmanager
def observed(sites: Sequence[NeuronSite], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `see(index of the site, activations [M, N])` in every forward pass within."""
    handles: list[Any] = []
    try:
        for index, site in enumerate(sites):
            child = getattr(site.module, site.attribute)
            if site.kind == "activation":
                handles.append(
                    child.register_forward_hook(
                        lambda _m, _i, output, index=index, n=site.neurons: see(index, output.detach().reshape(-1, n))
                    )
                )
            else:
                handles.append(
                    child.register_forward_pre_hook(
                        lambda _m, inputs, index=index, n=site.neurons: see(index, inputs[0].detach().reshape(-1, n))
                    )
                )
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_scores(
    sites: Sequence[NeuronSite],
    passes: Callable[[Callable[[Tensor | None], None]], None],
    share: float,
    device: torch.device | str,
    group: Any = None,
) -> list[LayerScores]:
    """Return the scores of each site's layer, the same on every rank. Collective over `group` (default: all ranks).

    passes(set_weight): called twice, runs the model over the same batches of this rank each time. Before a forward pass
    it may call set_weight with how many tokens each token counts as, [M, 1] (0: it is left out), or None (1 each).
    share: of all (token, neuron) pairs, those with the highest scores, for `top_share_score`. device: where the
    activations are.
    """
    weight: list[Tensor | None] = [None]

    def set_weight(value: Tensor | None) -> None:
        weight[0] = value

    zero = [torch.zeros(site.neurons, dtype=torch.float64, device=device) for site in sites]
    moments = [Moments.empty(site.neurons, device) for site in sites]

    def slices(z: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        weights = [None] * len(z.split(SLICE)) if weight[0] is None else weight[0].split(SLICE)
        return zip(z.split(SLICE), weights, strict=True)

    def add_moments(index: int, z: Tensor) -> None:
        for part, weights in slices(z):
            count = sample_count(part, weights)
            sums = exact_sums(part, zero[index], weights)
            moments[index] = moments[index].merge(Moments.from_sums(count, *sums, zero[index]))

    with observed(sites, add_moments):
        passes(set_weight)
    moments = [_merge_over_ranks(part, group) for part in moments]

    alive = [is_alive(m.mean, m.variance) for m in moments]
    inverse = [
        torch.where(live, 1 / m.variance.clamp(min=VARIANCE_FLOOR), 0.0) for live, m in zip(alive, moments, strict=True)
    ]
    histograms = torch.zeros(len(sites), 2, BINS, dtype=torch.float64, device=device)
    squares = [torch.zeros_like(part) for part in zero]

    def add_scores(index: int, z: Tensor) -> None:
        for part, weights in slices(z):
            scores = (part.float() - moments[index].mean.float()).square() * inverse[index].float()
            kept = torch.ones_like(scores) if weights is None else weights.float().expand_as(scores)
            squares[index] += (scores.square() * kept).sum(0).double()
            position = (scores.clamp(min=10**LOWEST).log10() - LOWEST) * (BINS / (HIGHEST - LOWEST))
            bins = position.long().clamp(0, BINS - 1).flatten()
            histograms[index, 0] += torch.bincount(bins, kept.double().flatten(), BINS)
            histograms[index, 1] += torch.bincount(bins, (scores * kept).double().flatten(), BINS)

    with observed(sites, add_scores):
        passes(set_weight)
    all_reduce_sum(histograms, group)
    results = []
    for index, site in enumerate(sites):
        live = alive[index]
        fourth = all_reduce_sum(squares[index], group) / moments[index].count
        results.append(
            LayerScores(
                site.layer,
                _mean_of_top(histograms[index, 0], histograms[index, 1], share),
                float(moments[index].variance.sqrt().mean()),
                float(fourth[live].median()) if bool(live.any()) else float("nan"),
                float(1 - live.double().mean()),
            )
        )
    return results


def _merge_over_ranks(moments: Moments, group: Any) -> Moments:
    """Return the moments over all ranks, by sums around their common mean. Collective."""
    count = all_reduce_sum(moments.count.clone(), group)
    mean = all_reduce_sum(moments.mean * moments.count, group) / count.clamp(min=1)
    m2 = all_reduce_sum(moments.m2 + moments.count * (moments.mean - mean).square(), group)
    return Moments(count, mean, m2)


def _mean_of_top(counts: Tensor, sums: Tensor, share: float) -> float:
    """Return the mean of the highest `share` of all values. counts, sums: [BINS] of each bin, ascending."""
    wanted = share * counts.sum()
    above = counts.flip(0).cumsum(0)
    taken = (wanted - (above - counts.flip(0))).clamp(min=0).minimum(counts.flip(0))
    mean = sums.flip(0) / counts.flip(0).clamp(min=torch.finfo(counts.dtype).tiny)
    return float((taken * mean).sum() / wanted)
