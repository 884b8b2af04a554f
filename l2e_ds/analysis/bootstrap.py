"""95 % intervals by resampling texts, feature by feature: tokens of one text are not independent, texts are.

Shapes: B resamples, F features, T tokens of a text, C neurons (a block of a layer's), BINS bins of the score.

A resample is a row of weights: how often each text was drawn. What is asked of it is then a matrix product over
texts. The seed and the labels alone make the weights, so two models seen through the same texts are resampled
alike and their difference has a paired interval.

Mean, S and scores are derived anew from each resample; the neurons' own features are held where their score or the
FKR is concerned (see `held_own_scores`, `resampled_histogram`).
"""

from __future__ import annotations

import numpy as np

from l2e_ds.analysis.measures import BLOCK_VALUES, Array, FeatureMoments

RESAMPLES = 200
TAIL = 0.025


def resample_weights(labels: Array, resamples: int, seed: int) -> Array:
    """[B, texts] float64: how often each text was drawn, each feature's texts from that feature with replacement."""
    weights = np.empty((resamples, len(labels)))
    random = np.random.default_rng(seed)
    for feature in np.unique(labels):
        rows = np.flatnonzero(labels == feature)
        weights[:, rows] = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples)
    return weights


def resampled_moments(
    weights: Array, mean: Array, variance: Array, labels: Array, moments: FeatureMoments
) -> FeatureMoments:
    """Return the moments of each resample: those of `feature_moments`, with a leading axis [B, F, C].

    weights: [B, texts]; mean, variance: [texts, C]; moments: of the texts as they are, around whose means it sums.
    """
    shape = (len(weights), *moments.mean.shape)
    means, variances = np.empty(shape), np.empty(shape)
    for feature, texts in enumerate(moments.texts):
        rows = labels == feature
        w = weights[:, rows] / texts
        d = mean[rows].astype(np.float64) - moments.mean[feature]
        shift = w @ d
        means[:, feature] = moments.mean[feature] + shift
        variances[:, feature] = np.maximum(w @ (variance[rows] + d * d) - shift * shift, 0.0)
    return FeatureMoments(moments.texts, moments.tokens, means, variances)


def held_own_scores(inside: Array, own: Array) -> Array:
    """Return each resample's mean score of the neurons' own features, these held: [B, F, C], [C] -> [B, C].

    0 for own = -1.

    The own score is a maximum over features, so noise alone lifts it, and a resample that chose anew would lift it
    twice: in simulations such intervals lay wholly above the estimate. With l* held they are of the figure that this
    many texts give on average. That figure is itself above the one of endless texts, the more the fewer texts and the
    more alike features are (1.14 for 1.05 with 5 features of 60 texts that hardly differ), and no interval says so.
    """
    chosen = np.take_along_axis(inside, np.maximum(own, 0)[None, None], axis=1)[:, 0]
    return np.where(own >= 0, chosen, 0.0)


def resampled_histogram(weights: Array, histogram: Array) -> Array:
    """[B, texts], [texts, 2, BINS] -> [B, 2, BINS] float64: each text's counts as often as it was drawn.

    The neurons' own features, means and S are held at those of the whole set, by which the scores were counted: the
    interval of the FKR has the texts' share in it, not that of these three.
    """
    texts, kinds, bins = histogram.shape
    total = np.zeros((len(weights), kinds * bins))
    size = max(1, BLOCK_VALUES // (kinds * bins))
    for start in range(0, texts, size):
        rows = slice(start, start + size)
        total += weights[:, rows] @ histogram[rows].reshape(-1, kinds * bins).astype(np.float64)
    return total.reshape(-1, kinds, bins)


def interval(resampled: Array) -> tuple[Array, Array]:
    """95 % percentile interval over the first axis: [B, ...] -> [...], [...]; its ends are values of resamples."""
    low = np.quantile(resampled, TAIL, axis=0, method="lower")
    return low, np.quantile(resampled, 1 - TAIL, axis=0, method="higher")
