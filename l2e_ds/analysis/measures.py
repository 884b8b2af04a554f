"""Compute the measures of docs/analysis.md from each text's moments and histograms, which are NumPy arrays.

Shapes: F features, T tokens of a text (the same for all), C neurons (a block of a layer's), K shares, BINS bins of the
score. `...` stands for leading axes, such as one of bootstrap resamples. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from l2e_ds.inhibition.losses import is_alive

Array = np.ndarray

# The shares k of the FKR curve: 0.1 % to 20 %, nearly even on a logarithmic axis.
SHARES = (
    *(0.001, 0.00125, 0.0016, 0.002, 0.0025, 0.003, 0.004, 0.005, 0.006, 0.008),
    *(0.01, 0.0125, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.08),
    *(0.1, 0.125, 0.16, 0.2),
)
BLOCK_NEURONS = 1024
BLOCK_VALUES = 2**22  # values of one float64 array of a block: 32 MiB


def column_blocks(neurons: int, rows: int) -> Iterator[slice]:
    """Yield the columns of a [rows, neurons] array in blocks of at most 1,024 neurons and about 2**22 values."""
    size = max(1, min(BLOCK_NEURONS, BLOCK_VALUES // max(1, rows)))
    for start in range(0, neurons, size):
        yield slice(start, min(start + size, neurons))


@dataclass(frozen=True)
class FeatureMoments:
    """Moments of each neuron within each feature.

    texts: [F] int64, texts of each feature; tokens: T; mean, variance: [..., F, C], over all tokens of the feature's
    texts, the variance being the population's (divided by the count).
    """

    texts: Array
    tokens: int
    mean: Array
    variance: Array


def feature_moments(mean: Array, variance: Array, labels: Array, features: int, tokens: int) -> FeatureMoments:
    """Merge the moments of the texts, which are of equal length, into those of their features, which all have one.

    mean, variance: [texts, C], a text's mean and population variance; labels: [texts] int64 in [0, F).
    """
    means = np.empty((features, mean.shape[1]))
    variances = np.empty_like(means)
    for feature in range(features):
        rows = labels == feature
        text_means = mean[rows].astype(np.float64)
        means[feature] = text_means.mean(axis=0)
        variances[feature] = (variance[rows].astype(np.float64) + (text_means - means[feature]) ** 2).mean(axis=0)
    return FeatureMoments(np.bincount(labels, minlength=features), tokens, means, variances)


def overall_moments(moments: FeatureMoments) -> tuple[Array, Array]:
    """Return mean and sample variance S^2 = M2 / (count - 1) over all tokens of all features, [..., C] each."""
    share = (moments.texts / moments.texts.sum())[:, None]
    mean = (share * moments.mean).sum(axis=-2)
    variance = (share * (moments.variance + (moments.mean - mean[..., None, :]) ** 2)).sum(axis=-2)
    count = int(moments.texts.sum()) * moments.tokens
    return mean, variance * (count / (count - 1))


def mean_scores(moments: FeatureMoments) -> Array:
    """Return the mean score phi (eq. 1) inside each feature, [..., F, C], by mean and S of all tokens; 0 if dead."""
    mean, variance = overall_moments(moments)
    alive = is_alive(mean, variance)
    inverse = np.where(alive, 1 / np.where(alive, variance, 1.0), 0.0)[..., None, :]
    return (moments.variance + (moments.mean - mean[..., None, :]) ** 2) * inverse


def scores_outside(inside: Array, texts: Array) -> Array:
    """Return the mean score over the tokens of all other features (eq. 2), [..., F, C].

    texts: how many texts each feature has, [F].
    """
    others = texts * (1 - np.eye(len(texts)))
    return (others / others.sum(axis=1, keepdims=True)) @ inside


def own_features(inside: Array) -> tuple[Array, Array]:
    """Return the relatively monosemantic feature l*, int64 [..., C], and its mean score (eq. 3), [..., C].

    If several features have the largest score, l* is the first. For a dead neuron, whose scores are all 0, it is -1.
    """
    score = inside.max(axis=-2)
    # The mean score of a live neuron is (count - 1) / count, so its largest is above 0.
    return np.where(score > 0, inside.argmax(axis=-2), -1), score


def own_against_all(inside: Array) -> float:
    """Return the K-S statistic between scores of own features and of all pairs. inside: [F, C] of live neurons."""
    from scipy import stats  # an optional dependency, which options and help of the commands do without

    return float(stats.ks_2samp(inside.max(axis=0), inside.ravel(), method="asymp").statistic)


def holm(p_values: Array) -> Array:
    """Return p-values, [tests], adjusted by Holm's step-down method for a family of tests."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1))
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


@dataclass(frozen=True)
class FalseKilling:
    """Selected activations of a layer at each share, and how many of them are killed falsely (eq. 4).

    tau: [..., K], the threshold, NaN if all neurons are dead. selected, false: [..., K], counts of (token, neuron)
    pairs. error: [..., K], a bound of the error of `rate`.
    """

    tau: Array
    selected: Array
    false: Array
    error: Array

    @property
    def rate(self) -> Array:
        """The FKR, [..., K], NaN where nothing is selected."""
        return _divided(self.false, self.selected)


def false_killing(histogram: Array, edges: Array, shares: tuple[float, ...], pairs: int) -> FalseKilling:
    """Return the False Killing Rate (eq. 4) of one layer at each share k of its (token, neuron) pairs.

    histogram: [..., 2, BINS], counts of scores of live neurons; index 1 of the second last axis is for those on a text
    of the neuron's own feature. edges: [BINS], lower edge of each bin, ascending. pairs: tokens x neurons of the layer,
    including dead ones, as in training, where a dead neuron's score is 0. tau_k is the k-th largest score with
    k = ceil(share * pairs), or the smallest one counted if there are fewer.

    Only a part of the bin that holds tau_k is selected. Its scores are assumed to be spread evenly over the bin, and
    the two kinds to be mixed evenly. So the error of tau is below the bin's width (in the last bin, which has no end,
    tau is the bin's lower edge), and that of the rate is at most `error`, for any distribution within the bin.
    """
    wrong, own = (np.asarray(histogram[..., kind, :], dtype=np.float64) for kind in (0, 1))
    above, wrong_above = (_counts_from(counts) for counts in (wrong + own, wrong))
    upper_edges = np.append(edges[1:], edges[-1])
    taus, selected, false, errors = [], [], [], []
    for share in shares:
        rank = np.minimum(math.ceil(share * pairs - 1e-9), above[..., 0])
        is_empty = rank == 0
        # The bin of the rank-th largest score, which is not empty.
        bin_ = np.maximum(np.count_nonzero(above >= np.maximum(rank, 1)[..., None], axis=-1) - 1, 0)
        in_wrong, in_own, before, wrong_before = (
            np.take_along_axis(counts, (bin_ + offset)[..., None], axis=-1)[..., 0]
            for counts, offset in ((wrong, 0), (own, 0), (above, 1), (wrong_above, 1))
        )
        needed = rank - before
        fraction = _divided(needed, in_wrong + in_own)
        taus.append(np.where(is_empty, np.nan, upper_edges[bin_] - fraction * (upper_edges[bin_] - edges[bin_])))
        selected.append(rank)
        false.append(np.where(is_empty, 0.0, wrong_before + fraction * in_wrong))
        errors.append(_worst_error(false[-1] / np.maximum(rank, 1), needed, in_wrong, in_own, before, wrong_before))
    tau, selected_, false_, error = (np.stack(parts, axis=-1) for parts in (taus, selected, false, errors))
    return FalseKilling(tau, selected_, false_, np.where(selected_ > 0, error, np.nan))


def _counts_from(counts: Array) -> Array:
    """Return the sum of each bin and all above it, [..., BINS + 1], of which the last is 0. counts: [..., BINS]."""
    return np.append(counts[..., ::-1].cumsum(axis=-1)[..., ::-1], np.zeros((*counts.shape[:-1], 1)), axis=-1)


def _worst_error(rate: Array, needed: Array, wrong: Array, own: Array, before: Array, wrong_before: Array) -> Array:
    """Return the largest distance of the true rate from `rate`, if between `needed` and all of the bin are selected."""
    most = np.clip(wrong, needed, wrong + own)
    highest = (wrong_before + np.minimum(wrong, most)) / np.maximum(before + most, 1)
    least = np.clip(own, needed, wrong + own)
    lowest = (wrong_before + np.maximum(0.0, least - own)) / np.maximum(before + least, 1)
    return np.maximum(highest - rate, rate - lowest)


def join_layers(layers: list[FalseKilling]) -> FalseKilling:
    """Return all layers as one, of which each keeps its own tau_k: selected and falsely killed are summed, tau is NaN.

    `error`, the mean weighted by selected, bounds the error of the rate unless several scores equal tau_k.
    """
    selected = np.sum([layer.selected for layer in layers], axis=0)
    false = np.sum([layer.false for layer in layers], axis=0)
    errors = np.sum([np.where(layer.selected > 0, layer.error * layer.selected, 0.0) for layer in layers], axis=0)
    return FalseKilling(np.full_like(false, np.nan), selected, false, _divided(errors, selected))


def suggested_share(curve: FalseKilling, shares: tuple[float, ...]) -> tuple[Array, Array]:
    """Return the share with the lowest FKR, or the least of several, and that FKR, [...] each; NaN if all are dead."""
    rate = curve.rate
    best = np.where(np.isnan(rate), np.inf, rate).argmin(axis=-1)
    lowest = np.take_along_axis(rate, best[..., None], axis=-1)[..., 0]
    return np.where(np.isnan(lowest), np.nan, np.asarray(shares)[best]), lowest


def is_edge(share: float) -> bool:
    """Return whether a share is the smallest or largest that is tried, so that the lowest FKR may be beyond it."""
    return share in (SHARES[0], SHARES[-1])


def _divided(numerator: Array, denominator: Array) -> Array:
    """Divide, with NaN in place of a division by zero."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)
