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

    def watch(index: int, site: NeuronSite) -> Any:
        child = getattr(site.module, site.attribute)

        def look(z: Tensor) -> None:
            see(index, z.detach().reshape(-1, site.neurons))

        if site.kind == "activation":
            return child.register_forward_hook(lambda _module, _inputs, output: look(output))
        return child.register_forward_pre_hook(lambda _module, inputs: look(inputs[0]))

    try:
        for index, site in enumerate(sites):
            handles.append(watch(index, site))
        yield
    finally:
        for handle in handles:
            handle.remove()


class ScoreHistogram:
    """Counts scores in bins, with the sum of those in each. table: [2, BINS] float64, of zeros, where they are kept."""

    def __init__(self, table: Tensor) -> None:
        self.counts, self.sums = table

    def add(self, scores: Tensor, kept: Tensor) -> None:
        """Add scores, [M, N] float32. kept: [M, N] float32, how many times each counts."""
        position = (scores.clamp(min=10**LOWEST).log10() - LOWEST) * (BINS / (HIGHEST - LOWEST))
        bins = position.long().clamp(0, BINS - 1).flatten()
        self.counts += torch.bincount(bins, kept.double().flatten(), BINS)
        self.sums += torch.bincount(bins, (scores * kept).double().flatten(), BINS)

    def mean_of_top(self, share: float) -> float:
        """Return the mean of the highest `share` of all scores."""
        wanted = share * self.counts.sum()
        counts = self.counts.flip(0)
        taken = (wanted - (counts.cumsum(0) - counts)).clamp(min=0).minimum(counts)
        mean = self.sums.flip(0) / counts.clamp(min=torch.finfo(counts.dtype).tiny)
        return float((taken * mean).sum() / wanted)


@torch.no_grad()
def measure_scores(
    sites: Sequence[NeuronSite],
    passes: Callable[[Callable[[Tensor | None], None]], None],
    share: float,
    device: torch.device | str,
) -> list[LayerScores]:
    """Return the scores of each site's layer, the same on every rank. Collective.

    passes(set_weight): called twice, runs the model over the same batches of this rank each time. Before a forward pass
    it may call set_weight with how many tokens each token counts as, [M, 1] (0: it is left out), or None (1 each).
    share: of all (token, neuron) pairs, those with the highest scores, for `top_share_score`. device: where the
    activations are.
    """
    weight: Tensor | None = None

    def set_weight(value: Tensor | None) -> None:
        nonlocal weight
        weight = value

    zero = [torch.zeros(site.neurons, dtype=torch.float64, device=device) for site in sites]
    moments = [Moments.empty(site.neurons, device) for site in sites]

    def slices(z: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        parts = z.split(SLICE)
        return zip(parts, [None] * len(parts) if weight is None else weight.split(SLICE), strict=True)

    def add_moments(index: int, z: Tensor) -> None:
        for part, weights in slices(z):
            count = sample_count(part, weights)
            sums = exact_sums(part, zero[index], weights)
            moments[index] = moments[index].merge(Moments.from_sums(count, *sums, zero[index]))

    with observed(sites, add_moments):
        passes(set_weight)
    moments = [_merge_over_ranks(part) for part in moments]

    alive = [is_alive(m.mean, m.variance) for m in moments]
    inverse = [
        torch.where(live, 1 / m.variance.clamp(min=VARIANCE_FLOOR), 0.0) for live, m in zip(alive, moments, strict=True)
    ]
    tables = torch.zeros(len(sites), 2, BINS, dtype=torch.float64, device=device)
    histograms = [ScoreHistogram(table) for table in tables]
    squares = [torch.zeros_like(part) for part in zero]

    def add_scores(index: int, z: Tensor) -> None:
        for part, weights in slices(z):
            scores = (part.float() - moments[index].mean.float()).square() * inverse[index].float()
            kept = torch.ones_like(scores) if weights is None else weights.float().expand_as(scores)
            squares[index] += (scores.square() * kept).sum(0).double()
            histograms[index].add(scores, kept)

    with observed(sites, add_scores):
        passes(set_weight)
    all_reduce_sum(tables)
    results = []
    for index, site in enumerate(sites):
        live = alive[index]
        fourth = all_reduce_sum(squares[index]) / moments[index].count
        results.append(
            LayerScores(
                site.layer,
                histograms[index].mean_of_top(share),
                float(moments[index].variance.sqrt().mean()),
                float(fourth[live].median()) if bool(live.any()) else float("nan"),
                float(1 - live.double().mean()),
            )
        )
    return results


def _merge_over_ranks(moments: Moments) -> Moments:
    """Return the moments over all ranks, by sums around their common mean. Collective."""
    count = all_reduce_sum(moments.count.clone())
    mean = all_reduce_sum(moments.mean * moments.count) / count.clamp(min=1)
    m2 = all_reduce_sum(moments.m2 + moments.count * (moments.mean - mean).square())
    return Moments(count, mean, m2)
