"""Resampled texts against texts really repeated, and how often intervals hold the truth. Shapes: B resamples, F
features, T tokens of a text, N neurons."""

from __future__ import annotations

import numpy as np

from l2e_ds.analysis import bootstrap, measures
from tests.unit.analysis.single_tokens import activations, slow_histogram, slow_own, slow_scores, text_moments


def test_weights_are_draws_within_each_feature():
    labels = np.array([0, 1, 1, 0, 2, 1, 2, 0, 0])
    weights = bootstrap.resample_weights(labels, 500, seed=4)
    assert weights.shape == (500, 9) and weights.min() == 0
    for feature, texts in enumerate([4, 3, 2]):
        assert np.all(weights[:, labels == feature].sum(axis=1) == texts)
    assert np.all(np.abs(weights.mean(axis=0) - 1) < 0.2)
    np.testing.assert_array_equal(weights, bootstrap.resample_weights(labels, 500, seed=4))
    assert np.any(weights != bootstrap.resample_weights(labels, 500, seed=5))


def test_resampled_moments_are_those_of_repeated_texts():
    """Mean, S, scores and own features of each resample, against a set in which each text stands as often as drawn."""
    z, labels = activations(1)
    z[:, :, 3] = 2.0
    weights = bootstrap.resample_weights(labels, 6, seed=0)
    mean, variance = text_moments(z)
    moments = measures.feature_moments(mean, variance, labels, 3, z.shape[1])
    resampled = bootstrap.resampled_moments(weights, mean, variance, labels, moments)
    overall, square = measures.overall_moments(resampled)
    inside = measures.mean_scores(resampled)
    own, _ = measures.own_features(inside)
    outside = measures.scores_outside(inside, moments.texts)
    for b, row in enumerate(weights.astype(int)):
        repeated, their_labels = np.repeat(z, row, axis=0), np.repeat(labels, row)
        flat = repeated.reshape(-1, z.shape[2])
        np.testing.assert_allclose(overall[b], flat.mean(axis=0), rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(square[b], flat.var(axis=0, ddof=1), rtol=1e-11, atol=1e-25)
        slow_inside, slow_outside = slow_scores(repeated, their_labels, 3)
        np.testing.assert_allclose(inside[b], slow_inside, rtol=1e-10)
        np.testing.assert_allclose(outside[b], slow_outside, rtol=1e-10)
        np.testing.assert_array_equal(own[b], slow_own(repeated, their_labels, 3))
        whole = slow_own(z, labels, 3)
        held = [inside[b, f, neuron] if f >= 0 else 0 for neuron, f in enumerate(whole)]
        np.testing.assert_array_equal(bootstrap.own_scores_of_resamples(inside, whole)[b], held)


def test_resampled_histograms_are_those_of_repeated_texts(monkeypatch):
    """The histograms are computed in blocks of two texts."""
    z, labels = activations(2)
    histogram = slow_histogram(z, labels, slow_own(z, labels, 3))
    weights = bootstrap.resample_weights(labels, 5, seed=0)
    expected = [np.repeat(histogram, row, axis=0).sum(axis=0) for row in weights.astype(int)]
    monkeypatch.setattr(bootstrap, "BLOCK_VALUES", 2 * histogram[0].size)
    np.testing.assert_array_equal(bootstrap.resampled_histogram(weights, histogram), expected)


def test_interval_is_the_middle_95_percent():
    low, high = bootstrap.interval(np.random.default_rng(0).permutation(201.0 + np.arange(201))[:, None])
    assert (low.tolist(), high.tolist()) == ([206.0], [396.0])


def test_intervals_hold_the_true_mean_score():
    """Texts with a level of their own: of 300 neurons' true mean scores about 95 % lie in the intervals.

    Texts of a feature f have levels of mean m_f and variance 1, tokens vary by 1 around them. So S^2 = 2 + var(m), and
    the true score inside is (2 + (m_f - mean m)^2) / S^2.
    """
    random = np.random.default_rng(3)
    features, texts, tokens, neurons = 3, 40, 8, 300
    labels = np.repeat(np.arange(features), texts)
    means = np.array([0.0, 1.0, 3.0])
    levels = means[labels][:, None] + random.normal(size=(len(labels), neurons))
    z = levels[:, None] + random.normal(size=(len(labels), tokens, neurons))
    mean, variance = text_moments(z)
    moments = measures.feature_moments(mean, variance, labels, features, tokens)
    weights = bootstrap.resample_weights(labels, 200, seed=0)
    inside = measures.mean_scores(bootstrap.resampled_moments(weights, mean, variance, labels, moments))
    low, high = bootstrap.interval(inside)
    truth = ((2 + (means - means.mean()) ** 2) / (2 + means.var()))[:, None]
    coverage = ((low <= truth) & (truth <= high)).mean(axis=1)
    assert np.all((coverage > 0.88) & (coverage < 0.99)), coverage


def test_intervals_of_own_scores():
    """Features hardly differ. The interval holds the estimate, and in most of 20 sets of texts its expectation.

    Choosing own features anew in each resample would put it above both (see `own_scores_of_resamples`).
    """
    random = np.random.default_rng(1)
    features, texts, tokens, neurons = 4, 30, 8, 60
    labels = np.repeat(np.arange(features), texts)
    means = 0.3 * random.normal(size=(features, neurons))
    estimates, intervals = [], []
    for seed in range(20):
        z = means[labels][:, None] + random.normal(size=(len(labels), 1, neurons))
        mean, variance = text_moments(z + random.normal(size=(len(labels), tokens, neurons)))
        moments = measures.feature_moments(mean, variance, labels, features, tokens)
        own, score = measures.own_features(measures.mean_scores(moments))
        weights = bootstrap.resample_weights(labels, 100, seed)
        resampled = measures.mean_scores(bootstrap.resampled_moments(weights, mean, variance, labels, moments))
        estimates.append(score.mean())
        intervals.append(bootstrap.interval(bootstrap.own_scores_of_resamples(resampled, own).mean(axis=1)))
        assert intervals[-1][0] <= estimates[-1] <= intervals[-1][1] < resampled.max(axis=1).mean()
    low, high = np.array(intervals).T
    assert ((low <= np.mean(estimates)) & (np.mean(estimates) <= high)).mean() >= 0.85
