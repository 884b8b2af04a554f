"""What is read from the neurons: a table of each text's activations in one pass, scores by bins in a second.

Ranks take turns at batches of texts; a batch is the same whatever their number. What they found is summed, a block at a
time, on rank 0, which alone computes the measures: tables are bit-identical for any number of ranks. Tables of texts
are on disk; what grows in memory with their number is their tokens and the weights of the bootstrap.

Shapes: B texts of a batch, T tokens a text, N neurons of a layer, F features, BINS bins of the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm import tqdm

from l2e_ds.analysis.load import LoadedModel
from l2e_ds.analysis.tables import LayerCounts, LayerOwn
from l2e_ds.distributed import collectives, heartbeat
from l2e_ds.errors import AnalysisError
from l2e_ds.inhibition.measure import observed

# Bins of the score phi: 64 of equal width between neighbouring powers of two, from 2^-8 to 2^16; below and above, one.
# That is how a float32 is written: its exponent and the first 6 bits of its mantissa are the number of the bin.
MANTISSA_BITS = 6
LOWEST, HIGHEST = -8, 16
BINS = (HIGHEST - LOWEST) * 2**MANTISSA_BITS + 1
_SHIFT = 23 - MANTISSA_BITS
_FIRST = (127 + LOWEST) * 2**MANTISSA_BITS - 1
# Of one neuron's activations, equal in width over what they may be; `Distribution.trimmed` joins them.
VALUE_BINS = 512
BLOCK = 1024  # rows of a table, or (squared) values of it, that are in memory at a time


def bin_edges() -> np.ndarray:
    """[BINS] float64: the lower edge of each bin; the first is 0."""
    octaves = 2.0 ** np.arange(LOWEST, HIGHEST)
    within = 1 + np.arange(2**MANTISSA_BITS) / 2**MANTISSA_BITS
    return np.concatenate([[0.0], np.outer(octaves, within).ravel()])


def bin_of(scores: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the bin of each score >= 0, int32; float32 of any shape."""
    return torch.bitwise_right_shift(scores.view(torch.int32), _SHIFT, out=out).sub_(_FIRST).clamp_(0, BINS - 1)


class _Buffers(dict[tuple[torch.Size, torch.dtype], Tensor]):
    """Memory for what is computed of a batch, used again for the next: to ask the system for it takes longer than the
    computation."""

    def like(self, z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        key = (z.shape, dtype)
        if key not in self:
            self[key] = torch.empty_like(z, dtype=dtype)
        return self[key]


@dataclass(frozen=True)
class LayerActivations:
    """A layer's table of texts, each [texts, N] float32 on disk: mean, variance (population) and largest activation of
    the text's T tokens. lowest: [N], the neuron's lowest activation of all. `tokens` is T; where a text is one sample
    (`as_one_sample`), 1."""

    layer: int
    mean: np.ndarray
    variance: np.ndarray
    top: np.ndarray
    lowest: np.ndarray
    tokens: int

    def as_one_sample(self, kind: str) -> LayerActivations:
        """Return each text as one sample: its mean or its largest activation ("max"), as in sparse probing."""
        value = self.mean if kind == "mean" else self.top
        lowest = np.minimum.reduce([value[first : first + BLOCK].min(0) for first in range(0, len(value), BLOCK)])
        return LayerActivations(self.layer, value, np.broadcast_to(np.float32(0), value.shape), value, lowest, 1)


def inverse_variance(own: LayerOwn) -> np.ndarray:
    """[N] float32: 1 / S^2, 0 for dead neurons."""
    alive = own.own >= 0
    return np.where(alive, 1 / np.where(alive, own.s, 1.0) ** 2, 0.0).astype(np.float32)


class Shown(NamedTuple):
    """A neuron whose distribution is wanted, between two values."""

    layer: int
    neuron: int
    lowest: float
    highest: float


@dataclass(frozen=True)
class Distribution:
    """Activations of one neuron by feature: counts [F, bins] int64 between edges [bins + 1]."""

    layer: int
    neuron: int
    edges: np.ndarray
    counts: np.ndarray

    def trimmed(self, most: int = 64) -> Distribution:
        """Without the empty bins at both ends, and in at most so many bins."""
        used = np.flatnonzero(self.counts.sum(0))
        first, last = int(used[0]), int(used[-1]) + 1
        width = math.ceil((last - first) / most)
        last = min(first + width * math.ceil((last - first) / width), self.counts.shape[1])
        starts = np.arange(first, last, width)
        return replace(
            self,
            edges=self.edges[[*starts, last]],
            counts=np.add.reduceat(self.counts[:, :last], starts, axis=1),
        )


class Texts:
    """The batches of tokens [texts, T] that are this rank's, and how its results get to rank 0."""

    def __init__(self, tokens: np.ndarray, batch: int, in_step: bool = False) -> None:
        """in_step: every rank runs equally often (ZeRO-3), some of them on a batch that is not theirs."""
        self.tokens, self.batch, self.in_step = tokens, batch, in_step
        starts = range(0, len(tokens), batch)
        self._mine = [start for place, start in enumerate(starts) if place % collectives.size() == collectives.rank()]
        most = math.ceil(len(starts) / collectives.size())
        self.idle = most - len(self._mine) if in_step else 0

    def __iter__(self) -> Iterator[slice]:
        for start in self._mine:
            yield slice(start, min(start + self.batch, len(self.tokens)))

    def __len__(self) -> int:
        return len(self._mine)


def run_over(model: LoadedModel, texts: Texts, see: Callable[[int, slice, Tensor], None], doing: str) -> None:
    """One pass: `see(index of the site, rows of the texts, neurons [B * T, N])` for every batch of this rank.

    Raises AnalysisError, on every rank, for what `see` raises as one.
    """
    rows: slice | None = None
    error: AnalysisError | None = None

    def seen(index: int, z: Tensor) -> None:
        nonlocal error
        if rows is None or error is not None:
            return
        try:
            see(index, rows, z)
        except AnalysisError as raised:  # out of a forward pass it would leave ranks waiting that gather weights
            error = raised

    progress_bar = tqdm(texts, doing, unit="batch", disable=None if collectives.is_main() else True)
    with observed(model.sites, seen), progress_bar as batches:
        for rows in batches:
            model.run(torch.from_numpy(texts.tokens[rows].astype(np.int64)))
            heartbeat.beat()
            if error is not None and not texts.in_step:
                break
        rows = None
        for _ in range(texts.idle):
            model.run(torch.from_numpy(texts.tokens[: texts.batch].astype(np.int64)))
    collectives.agree(error)


def collect_activations(model: LoadedModel, texts: Texts, folder: Path) -> list[LayerActivations]:
    """Return the first pass. folder: this rank's own, for its part of the tables and, on rank 0, for the whole.

    Returns the layers on rank 0, nothing elsewhere. Raises AnalysisError naming the layer, neuron and text whose
    activation is not finite.
    """
    count, length = texts.tokens.shape
    parts = [_Table(folder / f"layer-{site.layer:03d}", count, site.neurons) for site in model.sites]
    lowest = [torch.full((site.neurons,), math.inf, device=model.device) for site in model.sites]
    buffers = _Buffers()

    def see(index: int, rows: slice, z: Tensor) -> None:
        z = z.view(rows.stop - rows.start, length, -1).float()
        torch.minimum(lowest[index], z.amin((0, 1)), out=lowest[index])
        mean = z.mean(1)
        variance = torch.sub(z, mean[:, None], out=buffers.like(z)).square_().mean(1)
        found = torch.stack([mean, variance, z.amax(1)]).cpu().numpy()
        if not np.isfinite(found).all():
            _, text, neuron = (int(i) for i in np.argwhere(~np.isfinite(found))[0])
            raise AnalysisError(
                f"{model.source.given}: layer {model.sites[index].layer}, neuron {neuron}: its activations in text"
                f" {rows.start + text} are not finite"
            )
        parts[index].write(rows, found)

    run_over(model, texts, see, f"{model.source.label}: activations")
    whole = [part.joined() for part in parts]
    of_ranks = collectives.all_gather_objects([part.cpu().numpy() for part in lowest])
    return [
        LayerActivations(site.layer, *table, np.minimum.reduce([part[place] for part in of_ranks]), length)
        for place, (site, table) in enumerate(zip(model.sites, whole, strict=True))
        if table is not None
    ]


class _Table:
    """Three arrays [texts, N] float32 in files: mean, variance, top; zero where no row was written."""

    NAMES = ("mean", "variance", "top")

    def __init__(self, path: Path, texts: int, neurons: int) -> None:
        path.mkdir(parents=True)
        self.arrays = [
            open_memmap(path / f"{name}.npy", mode="w+", dtype=np.float32, shape=(texts, neurons))
            for name in self.NAMES
        ]

    def write(self, rows: slice, values: np.ndarray) -> None:
        for array, value in zip(self.arrays, values, strict=True):
            array[rows] = value

    def joined(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Return the sum over ranks on rank 0, in place; None elsewhere. Collective."""
        for array in self.arrays:
            _sum_on_main(array)
        mean, variance, top = self.arrays
        return (mean, variance, top) if collectives.is_main() else None


def _sum_on_main(array: np.ndarray) -> None:
    """Over the ranks, on rank 0, in place, a block of rows at a time; elsewhere it stays. Collective. Exact, as each
    row comes from one rank and is zero on the others."""
    rows = max(1, BLOCK * BLOCK // math.prod(array.shape[1:]))
    for first in range(0, len(array) if collectives.size() > 1 else 0, rows):
        block = slice(first, first + rows)
        tensor = torch.from_numpy(np.array(array[block]))
        tensor = tensor.cuda() if dist.get_backend() == "nccl" else tensor
        dist.reduce(tensor, 0)
        if collectives.is_main():
            array[block] = tensor.cpu().numpy()


def count_scores(
    model: LoadedModel,
    texts: Texts,
    labels: np.ndarray,
    own: Sequence[LayerOwn],
    features: int,
    shown: Sequence[Shown],
    folder: Path,
) -> tuple[list[LayerCounts], list[Distribution]]:
    """Return the second pass: scores by bins, and the distributions of some neurons.

    labels: [texts]; own: of each site, the same on every rank; shown: whose
    distribution is wanted; folder: as in `collect_activations`. Returns both on rank 0, empty lists
    elsewhere.
    """
    count, length = texts.tokens.shape
    device = model.device
    tables = [
        open_memmap(folder / f"scores-{site.layer:03d}.npy", mode="w+", dtype=np.int32, shape=(count, 2, BINS))
        for site in model.sites
    ]
    constants = [
        (
            torch.from_numpy(part.mean.astype(np.float32)).to(device),
            torch.from_numpy(inverse_variance(part)).to(device),
            torch.from_numpy(part.own).to(device),
        )
        for part in own
    ]
    fourth = [torch.zeros(site.neurons, dtype=torch.float64, device=device) for site in model.sites]
    values = torch.zeros(len(shown), features, VALUE_BINS, dtype=torch.float64)
    on_device = torch.from_numpy(np.asarray(labels)).to(device)
    buffers = _Buffers()

    def see(index: int, rows: slice, z: Tensor) -> None:
        mean, inverse, feature = constants[index]
        z = z.float()
        scores = torch.sub(z, mean, out=buffers.like(z)).square_().mul_(inverse)
        bins = bin_of(scores, buffers.like(z, torch.int32))
        fourth[index] += scores.square_().sum(0).double()
        batch = rows.stop - rows.start
        # the place of each neuron's counts in [B, 2, BINS]; those of dead neurons are put behind
        own_text = on_device[rows, None] == feature
        place = (torch.arange(batch, device=device)[:, None] * 2 + own_text) * BINS
        place = torch.where(feature >= 0, place, batch * 2 * BINS).int()
        bins.view(batch, length, -1).add_(place[:, None])
        counts = torch.bincount(bins.view(-1), minlength=batch * 2 * BINS)[: batch * 2 * BINS]
        tables[index][rows] = counts.view(batch, 2, BINS).cpu().numpy()
        for place_shown, (layer, neuron, low, high) in enumerate(shown):
            if layer == model.sites[index].layer:
                column = z.view(batch, length, -1)[:, :, neuron].clamp(low, high).cpu()
                for text, label in zip(column, labels[rows], strict=True):
                    values[place_shown, label] += torch.histc(text, VALUE_BINS, low, high)

    run_over(model, texts, see, f"{model.source.label}: scores")
    samples = count * length
    histograms = []
    for table, part in zip(tables, fourth, strict=True):
        _sum_on_main(table)
        collectives.all_reduce_sum(part)
        histograms.append(LayerCounts(table, part.cpu().numpy() / samples))
    if len(shown):
        _sum_on_main(values.numpy())
    distributions = [
        Distribution(layer, neuron, np.linspace(low, high, VALUE_BINS + 1), values[place].long().numpy())
        for place, (layer, neuron, low, high) in enumerate(shown)
    ]
    return (histograms, distributions) if collectives.is_main() else ([], [])


def count_scores_of_samples(layer: LayerActivations, labels: np.ndarray, own: LayerOwn, path: Path) -> LayerCounts:
    """As `count_scores` where a text is one sample: from the table of the first pass alone."""
    texts, neurons = layer.mean.shape
    table = open_memmap(path, mode="w+", dtype=np.int32, shape=(texts, 2, BINS))
    table[:] = 0
    fourth = np.zeros(neurons)
    alive, inverse = own.own >= 0, inverse_variance(own)
    for first in range(0, texts, 64):
        rows = slice(first, min(first + 64, texts))
        d = layer.mean[rows] - own.mean.astype(np.float32)
        scores = d * d * inverse
        fourth += (scores.astype(np.float64) ** 2).sum(0)
        bins = bin_of(torch.from_numpy(scores)).numpy()
        own_text = labels[rows, None] == own.own
        for place in range(rows.stop - rows.start):
            for is_own in (0, 1):
                chosen = bins[place][alive & (own_text[place] == bool(is_own))]
                table[first + place, is_own] = np.bincount(chosen, minlength=BINS)
    return LayerCounts(table, fourth / texts)


def distributions_of_samples(
    layers: Sequence[LayerActivations], labels: np.ndarray, features: int, shown: Sequence[Shown]
) -> list[Distribution]:
    """As `count_scores` gives them, where a text is one sample."""
    by_number = {layer.layer: layer for layer in layers}
    found = []
    for layer, neuron, low, high in shown:
        values = np.clip(by_number[layer].mean[:, neuron], low, high)
        counts = [np.histogram(values[labels == feature], VALUE_BINS, (low, high))[0] for feature in range(features)]
        found.append(Distribution(layer, neuron, np.linspace(low, high, VALUE_BINS + 1), np.stack(counts)))
    return found
