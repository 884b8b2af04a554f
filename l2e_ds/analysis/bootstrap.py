"""Compute 95 % intervals by resampling texts, feature by feature. (The tokens of a text are not independent.)

A resample is a row of weights, which say how often each text was drawn. Its moments are then matrix products over
texts. The weights depend on the seed and the labels only, so two models that are analysed on the same texts have the
same resamples, and their difference has a paired interval.

Shapes: B resamples, F features, T tokens of a text, C neurons (a block of a layer's), BINS bins of the score.
"""

from __future__ import annotations

import numpy as np

from l2e_ds.analysis.measures import BLOCK_VALUES, Array, FeatureMoments

RESAMPLES = 200
TAIL = 0.025


def resample_weights(labels: Array, resamples: int, seed: int) -> Array:
    """Return how often each text was drawn, float64 [B, texts]; each feature's texts are drawn with replacement."""
    weights = np.empty((resamples, len(labels)))
    random = np.random.default_rng(seed)
    for feature in np.unique(labels):
        rows = np.flatnonzero(labels == feature)
        weights[:, rows] = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples)
    return weights


def resampled_moments(
    weights: Array, mean: Array, variance: Array, labels: Array, moments: FeatureMoments
) -> FeatureMoments:
    """Return the moments of each resample, as those of `feature_moments` with a leading axis, [B, F, C].

    weights: [B, texts]; mean, variance: [texts, C]; moments: those of the texts as they are.
    """
    shape = (len(weights), *moments.mean.shape)
    means, variances = np.empty(shape), np.empty(shape)
    for feature, texts in enumerate(moments.texts):
        rows = labels == feature
        shares = weights[:, rows] / texts
        distance = mean[rows].astype(np.float64) - moments.mean[feature]
        shift = shares @ distance
        means[:, feature] = moments.mean[feature] + shift
        variances[:, feature] = np.maximum(shares @ (variance[rows] + distance * distance) - shift * shift, 0.0)
    return FeatureMoments(moments.texts, moments.tokens, means, variances)


def own_scores_of_resamples(inside: Array, own: Array) -> Array:
    """Return each resample's mean score of the neurons' own features, held fixed, [B, C]; 0 for own = -1.

    inside: [B, F, C]; own: [C]. The own score is a maximum over features, so noise alone increases it. Choosing l* anew
    in a resample would increase it twice: in simulations such intervals lay entirely above the estimate.
    """
    chosen = np.take_along_axis(inside, np.maximum(own, 0)[None, None], axis=1)[:, 0]
    return np.where(own >= 0, chosen, 0.0)


def resampled_histogram(weights: Array, histogram: Array) -> Array:
    """Return each resample's histogram, float64 [B, 2, BINS]: each text's counts as often as it was drawn.

    weights: [B, texts]; histogram: [texts, 2, BINS]. The neurons' own features, means and S are those of the whole set.
    """
    texts, kinds, bins = histogram.shape
    total = np.zeros((len(weights), kinds * bins))
    size = max(1, BLOCK_VALUES // (kinds * bins))
    for start in range(0, texts, size):
        rows = slice(start, start + size)
        total += weights[:, rows] @ histogram[rows].reshape(-1, kinds * bins).astype(np.float64)
    return total.reshape(-1, kinds, bins)


def interval(resampled: Array) -> tuple[Array, Array]:
    """Return the 95 % percentile interval over the first axis, [...] each; its ends are values of resamples."""
    low = np.quantile(resampled, TAIL, axis=0, method="lower")
    return low, np.quantile(resampled, 1 - TAIL, axis=0, method="higher")
