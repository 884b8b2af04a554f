"""Read the neurons' activations: a table of each text's moments in a first pass, scores by bins in a second.

The batches of texts are dealt out to the ranks, and are the same for any number of ranks. The ranks' results are
summed, a block at a time, on rank 0, which alone computes the measures, so that tables are bit-identical for any number
of ranks. Tables of texts are on disk.

Shapes: B texts of a batch, T tokens a text, N neurons of a layer, F features, BINS bins of the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

# Bins of the score phi: 64 of equal width between neighbouring powers of two, from 2^-8 to 2^16. The first bin also
# holds all scores below, the last all above. The exponent of a float32 and the first 6 bits of its mantissa are thus
# the number of its bin.
MANTISSA_BITS = 6
LOWEST, HIGHEST = -8, 16
BINS = (HIGHEST - LOWEST) * 2**MANTISSA_BITS + 1
_SHIFT = 23 - MANTISSA_BITS
_FIRST = (127 + LOWEST) * 2**MANTISSA_BITS - 1
# Bins of equal width over the range of one neuron's activations, which `trim_distribution` joins.
VALUE_BINS = 512
BLOCK = 1024  # rows of a table (or, squared, values of it) that are in memory at a time


def bin_edges() -> np.ndarray:
    """Return the lower edge of each bin, float64 [BINS]; the first is 0."""
    octaves = 2.0 ** np.arange(LOWEST, HIGHEST)
    within = 1 + np.arange(2**MANTISSA_BITS) / 2**MANTISSA_BITS
    return np.concatenate([[0.0], np.outer(octaves, within).ravel()])


def bin_of(scores: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the bin of each score, int32. scores: float32 of any shape, none below 0."""
    return torch.bitwise_right_shift(scores.view(torch.int32), _SHIFT, out=out).sub_(_FIRST).clamp_(0, BINS - 1)


class _Buffers(dict[tuple[torch.Size, torch.dtype], Tensor]):
    """Tensors that are used again for every batch, as allocating them takes longer than the computation."""

    def like(self, z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        key = (z.shape, dtype)
        if key not in self:
            self[key] = torch.empty_like(z, dtype=dtype)
        return self[key]


@dataclass(frozen=True)
class LayerActivations:
    """A layer's table of texts.

    mean, variance, top: mean, population variance and largest of the activations of a text's T tokens, each float32
    [texts, N] on disk. lowest: each neuron's lowest activation of all, [N]. tokens: T, or 1 if a text is one sample.
    """

    layer: int
    mean: np.ndarray
    variance: np.ndarray
    top: np.ndarray
    lowest: np.ndarray
    tokens: int

    def as_one_sample(self, kind: str) -> LayerActivations:
        """Return a table in which each text is one sample, by its mean or its largest activation ("max")."""
        value = self.mean if kind == "mean" else self.top
        lowest = np.minimum.reduce([value[first : first + BLOCK].min(0) for first in range(0, len(value), BLOCK)])
        return LayerActivations(self.layer, value, np.broadcast_to(np.float32(0), value.shape), value, lowest, 1)


def inverse_variance(own: LayerOwn) -> np.ndarray:
    """Return 1 / S^2 of each neuron, or 0 if it is dead, float32 [N]."""
    alive = own.own >= 0
    return np.where(alive, 1 / np.where(alive, own.s, 1.0) ** 2, 0.0).astype(np.float32)


class ShownNeuron(NamedTuple):
    """A neuron whose distribution is wanted, and its lowest and highest activation."""

    layer: int
    neuron: int
    lowest: float
    highest: float


MOST_BINS = 64
"""The most bins of a distribution that is shown."""


def trim_distribution(neuron: ShownNeuron, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a neuron's distribution without the empty bins at both ends, in at most MOST_BINS bins.

    counts: activations by feature and bin, int64 [F, VALUE_BINS]. Returns edges [bins + 1] and counts [F, bins].
    """
    used = np.flatnonzero(counts.sum(0))
    first, last = int(used[0]), int(used[-1]) + 1
    width = math.ceil((last - first) / MOST_BINS)
    last = min(first + width * math.ceil((last - first) / width), VALUE_BINS)
    starts = np.arange(first, last, width)
    edges = np.linspace(neuron.lowest, neuron.highest, VALUE_BINS + 1)
    return edges[[*starts, last]], np.add.reduceat(counts[:, :last], starts, axis=1)


class Texts:
    """This rank's batches of texts.

    tokens: of all texts, [texts, T]. own: the rows of each of this rank's batches. in_step: with ZeRO-3 every rank must
    run equally often; some then run `idle` times more, on texts whose results are not used.
    """

    def __init__(self, tokens: np.ndarray, batch: int, in_step: bool = False) -> None:
        self.tokens, self.batch, self.in_step = tokens, batch, in_step
        batches = [slice(start, min(start + batch, len(tokens))) for start in range(0, len(tokens), batch)]
        self.own = batches[collectives.rank() :: collectives.size()]
        self.idle = math.ceil(len(batches) / collectives.size()) - len(self.own) if in_step else 0


def run_over(model: LoadedModel, texts: Texts, see: Callable[[int, slice, Tensor], None], doing: str) -> None:
    """Run the model over this rank's batches.

    Calls see(index of the site, rows of the texts, neurons [B * T, N]) for every site and batch. Raises AnalysisError
    on every rank if `see` raises it on one.
    """
    rows: slice | None = None
    error: AnalysisError | None = None

    def seen(index: int, z: Tensor) -> None:
        nonlocal error
        if rows is None or error is not None:
            return
        try:
            see(index, rows, z)
        except AnalysisError as raised:  # ranks that gather weights would wait for ever if it left a forward pass
            error = raised

    progress_bar = tqdm(texts.own, doing, unit="batch", disable=None if collectives.is_main() else True)
    with observed(model.sites, seen), progress_bar as batches:
        for rows in batches:
            model.run(torch.from_numpy(texts.tokens[rows].astype(np.int64)))
            heartbeat.beat()
            if error is not None and not texts.in_step:
                break
        rows = None
        for _ in range(texts.idle):
            model.run(torch.from_numpy(texts.tokens[: texts.batch].astype(np.int64)))
    collectives.raise_on_all(error)


def collect_activations(model: LoadedModel, texts: Texts, folder: Path) -> list[LayerActivations]:
    """Run the first pass and return the layers on rank 0, and nothing elsewhere. Collective.

    folder: this rank's own, for its part of the tables and, on rank 0, for the whole tables. Raises AnalysisError.
    """
    count, length = texts.tokens.shape
    folder.mkdir(parents=True, exist_ok=True)
    # Mean, variance and largest activation of each text. Rows that this rank does not write stay zero.
    tables = [
        open_memmap(folder / f"layer-{site.layer:03d}.npy", mode="w+", dtype=np.float32, shape=(3, count, site.neurons))
        for site in model.sites
    ]
    lowest = [torch.full((site.neurons,), math.inf, device=model.device) for site in model.sites]
    buffers = _Buffers()

    def see(index: int, rows: slice, z: Tensor) -> None:
        z = z.view(rows.stop - rows.start, length, -1).float()
        torch.minimum(lowest[index], z.amin((0, 1)), out=lowest[index])
        mean = z.mean(1)
        variance = torch.sub(z, mean[:, None], out=buffers.like(z)).square_().mean(1)
        values = torch.stack([mean, variance, z.amax(1)]).cpu().numpy()
        if not np.isfinite(values).all():
            _, text, neuron = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise AnalysisError(
                f"{model.source.given}: layer {model.sites[index].layer}, neuron {neuron}: its activations in text"
                f" {rows.start + text} are not finite"
            )
        tables[index][:, rows] = values

    run_over(model, texts, see, f"{model.source.label}: activations")
    for table in tables:
        for array in table:
            _sum_on_main(array)
    lowest_by_rank = collectives.all_gather_objects([values.cpu().numpy() for values in lowest])
    if not collectives.is_main():
        return []
    return [
        LayerActivations(site.layer, mean, variance, top, np.minimum.reduce(lowest_of_site), length)
        for site, (mean, variance, top), lowest_of_site in zip(
            model.sites, tables, zip(*lowest_by_rank, strict=True), strict=True
        )
    ]


def _sum_on_main(array: np.ndarray) -> None:
    """Sum an array, of which each row is zero on all ranks but one, in place on rank 0, in blocks. Collective."""
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
    shown: Sequence[ShownNeuron],
    folder: Path,
    samples: Sequence[LayerActivations] | None = None,
) -> tuple[list[LayerCounts], np.ndarray]:
    """Run the second pass: count scores by bins, and the activations of the neurons in `shown`. Collective.

    labels: index of each text's feature, int64 [texts]; own: by site, the same on every rank; folder: as in
    `collect_activations`; samples: count the values of these tables, in which a text is one sample, instead of running
    the model; rank 0 has them, the others have []. Returns on rank 0 the scores, and activations by feature and bin,
    int64 [shown, F, VALUE_BINS].
    """
    count, length = len(texts.tokens), texts.tokens.shape[1] if samples is None else 1
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
    labels_on_device = torch.from_numpy(np.asarray(labels)).to(device)
    buffers = _Buffers()

    def see(index: int, rows: slice, z: Tensor) -> None:
        mean, inverse, feature = constants[index]
        z = z.float()
        scores = torch.sub(z, mean, out=buffers.like(z)).square_().mul_(inverse)
        bins = bin_of(scores, buffers.like(z, torch.int32))
        fourth[index] += scores.square_().sum(0).double()
        batch = rows.stop - rows.start
        # Where each neuron's counts begin in the flat [B, 2, BINS]; those of dead neurons come after its end.
        is_own = labels_on_device[rows, None] == feature
        offset = (torch.arange(batch, device=device)[:, None] * 2 + is_own) * BINS
        offset = torch.where(feature >= 0, offset, batch * 2 * BINS).int()
        bins.view(batch, length, -1).add_(offset[:, None])
        counts = torch.bincount(bins.view(-1), minlength=batch * 2 * BINS)[: batch * 2 * BINS]
        tables[index][rows] = counts.view(batch, 2, BINS).cpu().numpy()
        for number, (layer, neuron, low, high) in enumerate(shown):
            if layer == model.sites[index].layer:
                activations = z.view(batch, length, -1)[:, :, neuron].clamp(low, high).cpu()
                for of_text, label in zip(activations, labels[rows], strict=True):
                    values[number, label] += torch.histc(of_text, VALUE_BINS, low, high)

    if samples is None:
        run_over(model, texts, see, f"{model.source.label}: scores")
    for index, layer in enumerate(samples or []):
        for first in range(0, count, texts.batch):
            rows = slice(first, min(first + texts.batch, count))
            see(index, rows, torch.from_numpy(layer.mean[rows]).to(device))
    histograms = []
    for table, part in zip(tables, fourth, strict=True):
        _sum_on_main(table)
        collectives.all_reduce_sum(part)
        histograms.append(LayerCounts(table, part.cpu().numpy() / (count * length)))
    if len(shown):
        _sum_on_main(values.numpy())
    return histograms, values.long().numpy()
