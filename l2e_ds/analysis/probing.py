"""Sparse probing with one neuron (Gurnee et al. 2023): find the neuron that alone tells a feature's texts from others.

A probe classifies a text as one of the feature's if the neuron's value is above a threshold (direction +1) or below it
(-1). Direction and threshold are those with the highest F1 on the training texts. The threshold lies half-way between
two neighbouring training values, or beyond all of them.

Shapes: F features, C neurons (a block of a layer's), N neurons of a layer, seeds: splits into training and test texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from l2e_ds.analysis.measures import Array, column_blocks

TRAIN_SHARE = 0.8
SPLITS = 3
PLACES = 10


@dataclass(frozen=True)
class Probes:
    """The best probe of each neuron for each feature, over seeds of the split.

    f1_train, f1_test: [F, N] float64, means over seeds. f1_test_sd: [F, N] float64, sample standard deviation, NaN for
    one seed. direction: [F, N] int64, +1 or -1, that of most seeds.
    """

    f1_train: Array
    f1_test: Array
    f1_test_sd: Array
    direction: Array


def training_masks(labels: Array, splits: int, seed: int) -> Array:
    """Return which texts are training texts, bool [splits, texts]: four fifths of each feature's, but never all."""
    random = np.random.default_rng(seed)
    masks = np.zeros((splits, len(labels)), dtype=bool)
    for feature in np.unique(labels):
        rows = np.flatnonzero(labels == feature)
        train = min(max(1, round(TRAIN_SHARE * len(rows))), len(rows) - 1)
        for mask in masks:
            mask[random.permutation(rows)[:train]] = True
    return masks


def probe_layer(values: Array, labels: Array, features: int, masks: Array) -> Probes:
    """Return the best probes of every neuron of a layer.

    values: [texts, N], a text's mean or largest activation, read in blocks of neurons; labels: [texts] in [0, F);
    masks: [seeds, texts] bool, see `training_masks`.
    """
    texts, neurons = values.shape
    blocks = [
        _probe_block(np.ascontiguousarray(values[:, columns].T), labels, features, masks)
        for columns in column_blocks(neurons, 4 * texts)  # a dozen arrays of a block are in memory at once
    ]
    f1_train, f1_test, f1_test_sd, direction = (np.concatenate(parts, axis=1) for parts in zip(*blocks, strict=True))
    return Probes(f1_train, f1_test, f1_test_sd, direction)


def best_neurons(f1_train: Array, alive: Array, places: int = PLACES) -> Array:
    """Return the live neurons with the highest training F1 for each feature, best first, int64 [F, places].

    There are fewer places if fewer neurons are alive. f1_train: [F, neurons]; alive: [neurons] bool.
    """
    order = np.argsort(-np.where(alive, f1_train, -1.0), axis=1, kind="stable")
    return order[:, : min(places, int(alive.sum()))]


def _probe_block(values: Array, labels: Array, features: int, masks: Array) -> tuple[Array, Array, Array, Array]:
    """Return the four arrays of `Probes` for a block, [F, C] each. values: [C, texts]."""
    ordered = _Sorted(values, labels)
    fits = [_fit(ordered, values, labels, features, mask) for mask in masks]
    train, test, direction = (np.stack(parts) for parts in zip(*fits, strict=True))
    sd = test.std(axis=0, ddof=1) if len(masks) > 1 else np.full(test.shape[1:], np.nan)
    return train.mean(axis=0), test.mean(axis=0), sd, np.where(direction.sum(axis=0) >= 0, 1, -1)


class _Sorted:
    """The texts in the order of each neuron's values, sorted once for all features and splits, [C, texts] each.

    order: the text at each place; value: ascending; first, last: the first and last place with the same value; places:
    grouped by the text's feature, ascending within each.
    """

    def __init__(self, values: Array, labels: Array) -> None:
        self.order = np.argsort(values, axis=1, kind="stable")
        self.value = np.take_along_axis(values, self.order, axis=1)
        place = np.arange(values.shape[1])
        edge = np.ones((len(values), 1), dtype=bool)
        new = self.value[:, 1:] != self.value[:, :-1]
        self.first = np.maximum.accumulate(np.where(np.hstack([edge, new]), place, 0), axis=1)
        ends = np.where(np.hstack([new, edge]), place, values.shape[1])
        self.last = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
        self.places = np.argsort(labels[self.order], axis=1, kind="stable")


def _fit(ordered: _Sorted, values: Array, labels: Array, features: int, mask: Array) -> tuple[Array, Array, Array]:
    """Return F1 on the training and on the test texts and direction of the best probes of one split, [F, C] each."""
    neurons = len(values)
    train = mask[ordered.order]
    total = int(mask.sum())
    upto = np.cumsum(train, axis=1)
    at_most = np.take_along_axis(upto, ordered.last, axis=1)  # training texts with at most this value
    below = np.take_along_axis(upto - train, ordered.first, axis=1)
    train_values = ordered.value[train].reshape(neurons, total).astype(np.float64)
    # Beyond the smallest and the largest training value there is no neighbour.
    bounded = np.pad(train_values, ((0, 0), (1, 1)), constant_values=(-np.inf, np.inf))
    f1_train, f1_test, directions = (np.empty((features, neurons)) for _ in range(3))
    test_values, test_labels = values[:, ~mask], labels[~mask]
    start = 0
    for feature, texts in enumerate(np.bincount(labels, minlength=features)):
        places = ordered.places[:, start : start + texts]
        start += texts
        own = np.take_along_axis(train, places, axis=1)
        # F1 is highest if the last text that the threshold includes is a training text of the feature, so only those
        # are tried. Of several with equal values, the last (from above: the first) counts all hits; the others give a
        # lower F1.
        hits = np.cumsum(own, axis=1)
        positives = int((mask & (labels == feature)).sum())
        taken_low, taken_high = (np.take_along_axis(a, places, axis=1) for a in (at_most, total - below))
        low = np.where(own, 2 * hits / (taken_low + positives), 0.0)
        high = np.where(own, 2 * (positives - hits + 1) / (taken_high + positives), 0.0)
        upwards = high.max(axis=1) >= low.max(axis=1)
        column = np.where(upwards, high.argmax(axis=1), low.argmax(axis=1))[:, None]
        f1_train[feature] = np.maximum(high.max(axis=1), low.max(axis=1))
        directions[feature] = np.where(upwards, 1, -1)
        taken = np.take_along_axis(np.where(upwards[:, None], total - taken_high, taken_low), column, axis=1)
        # `bounded` is shifted by one: the training values on both sides of the threshold are at taken and taken + 1.
        sides = np.take_along_axis(bounded, np.hstack([taken, taken + 1]), axis=1)
        predicted = (test_values > sides.mean(axis=1, keepdims=True)) == upwards[:, None]
        positive = test_labels == feature
        f1_test[feature] = 2 * predicted[:, positive].sum(axis=1) / (predicted.sum(axis=1) + positive.sum())
    return f1_train, f1_test, directions
