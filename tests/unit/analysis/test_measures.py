"""Each measure against the slow one over single tokens. Shapes: F features, T tokens of a text, N neurons."""

from __future__ import annotations

import numpy as np
import pytest

from l2e_ds.analysis import measures
from l2e_ds.analysis.measures import SHARES
from tests.unit.analysis.single_tokens import (
    EDGES,
    activations,
    planted,
    slow_histogram,
    slow_killing,
    slow_ks,
    slow_own,
    slow_scores,
    text_moments,
    token_scores,
)


def moments_of(z: np.ndarray, labels: np.ndarray, features: int) -> measures.FeatureMoments:
    return measures.feature_moments(*text_moments(z), labels, features, z.shape[1])


@pytest.mark.parametrize("texts", [(5, 8, 6), (4, 4), (2, 9, 3, 5)])
def test_moments_are_those_of_all_tokens(texts):
    """Within features (population variance) and over all (sample variance), whatever the features' sizes."""
    z, labels = activations(1, texts)
    moments = moments_of(z, labels, len(texts))
    for f in range(len(texts)):
        inside = z[labels == f].reshape(-1, z.shape[2])
        np.testing.assert_allclose(moments.mean[f], inside.mean(axis=0), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(moments.variance[f], inside.var(axis=0), rtol=1e-12)
    mean, variance = measures.overall_moments(moments)
    flat = z.reshape(-1, z.shape[2])
    np.testing.assert_allclose(mean, flat.mean(axis=0), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(variance, flat.var(axis=0, ddof=1), rtol=1e-12)


def test_moments_of_neurons_far_from_zero():
    """A mean of 10,000 and S of 1 lose no digit to cancellation."""
    z, labels = activations(2)
    near, far = (moments_of(a, labels, 3) for a in (z, z + 1e4))
    np.testing.assert_allclose(measures.overall_moments(far)[1], measures.overall_moments(near)[1], rtol=1e-7)
    np.testing.assert_allclose(measures.mean_scores(far), measures.mean_scores(near), rtol=1e-7)


@pytest.mark.parametrize("texts", [(5, 8, 6), (4, 4), (2, 9, 3, 5)])
def test_scores_inside_and_outside(texts):
    """Eq. 2 and eq. 3."""
    z, labels = activations(3, texts)
    moments = moments_of(z, labels, len(texts))
    inside = measures.mean_scores(moments)
    slow_inside, slow_outside = slow_scores(z, labels, len(texts))
    np.testing.assert_allclose(inside, slow_inside, rtol=1e-11)
    np.testing.assert_allclose(measures.scores_outside(inside, moments.texts), slow_outside, rtol=1e-11)
    own, score = measures.own_features(inside)
    np.testing.assert_array_equal(own, slow_own(z, labels, len(texts)))
    np.testing.assert_allclose(score, slow_inside.max(axis=0), rtol=1e-11)


def test_a_text_of_one_sample():
    """Samples "mean" and "max": the text's value is one sample, of variance 0 and T = 1."""
    z, labels = activations(4, tokens=1)
    moments = measures.feature_moments(z[:, 0], np.zeros_like(z[:, 0]), labels, 3, 1)
    np.testing.assert_allclose(measures.mean_scores(moments), slow_scores(z, labels, 3)[0], rtol=1e-11)


def test_a_feature_of_equal_values():
    """All its tokens are alike: it has no variance, and its score is its mean's alone."""
    z, labels = activations(5)
    z[labels == 1] = 0.25
    inside = measures.mean_scores(moments_of(z, labels, 3))
    np.testing.assert_allclose(inside, slow_scores(z, labels, 3)[0], rtol=1e-11)
    assert np.all(moments_of(z, labels, 3).variance[1] == 0)


def test_dead_neurons():
    """A neuron that does not vary has scores of 0 and no own feature; the rule is training's."""
    z, labels = activations(6)
    z[:, :, 2] = 0.7
    z[:, :, 5] = 0.0
    z[:, :, 6] = 3.0 + 1e-9 * z[:, :, 6]
    moments = moments_of(z, labels, 3)
    inside = measures.mean_scores(moments)
    assert np.all(inside[:, [2, 5, 6]] == 0)
    own, score = measures.own_features(inside)
    assert own[[2, 5, 6]].tolist() == [-1, -1, -1] and np.all(score[[2, 5, 6]] == 0)
    assert np.all(np.delete(own, [2, 5, 6]) >= 0)


def test_own_against_all():
    """The K-S statistic of its definition; it is larger where neurons answer to one feature than to all alike."""
    z, labels = activations(7, neurons=30)
    inside, _ = slow_scores(z, labels, 3)
    assert measures.own_against_all(inside) == pytest.approx(slow_ks(inside.max(axis=0), inside.ravel()), abs=1e-12)
    one, noise = (
        measures.own_against_all(measures.mean_scores(moments_of(*planted([answers] * 20), 5)))
        for answers in ((0,), (0, 1, 2, 3, 4))
    )
    assert one > noise


def test_holm_by_hand():
    """Three hypotheses: 3 p1, max with 2 p2, max with p3, at most 1; in the order given."""
    np.testing.assert_allclose(measures.holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(measures.holm(np.array([0.5, 0.02, 0.9, 0.5])), [1.0, 0.08, 1.0, 1.0])
    np.testing.assert_allclose(measures.holm(np.array([0.2])), [0.2])


def test_shares_are_the_fixed_grid():
    assert list(SHARES) == sorted(set(SHARES)) and (SHARES[0], SHARES[-1]) == (0.001, 0.2)
    assert {0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2} <= set(SHARES)


def killing_of(z: np.ndarray, labels: np.ndarray, features: int, edges: np.ndarray = EDGES) -> measures.FalseKilling:
    own = slow_own(z, labels, features)
    histogram = slow_histogram(z, labels, own, edges).sum(axis=0)
    return measures.false_killing(histogram, edges, SHARES, z.size)


@pytest.mark.parametrize("bins", [600, 60, 12])
def test_false_killing_within_its_error(bins):
    """tau within its bin, FKR within `error` of the one over single tokens; finer bins, smaller errors."""
    z, labels = activations(8, (20, 25, 30), tokens=16, neurons=12)
    z[:, :, 4] = 1.0  # dead: in the pairs of which the share is, never selected
    edges = np.concatenate([[0.0], np.geomspace(1e-3, 1e2, bins)])
    own = slow_own(z, labels, 3)
    curve = killing_of(z, labels, 3, edges)
    for k, share in enumerate(SHARES):
        tau, selected, false = slow_killing(z, labels, own, share)
        bin_ = np.searchsorted(edges, tau, side="right") - 1
        assert edges[bin_] <= curve.tau[k] <= (edges[bin_ + 1] if bin_ + 1 < len(edges) else edges[bin_])
        assert curve.selected[k] == selected
        assert abs(curve.rate[k] - false / selected) <= curve.error[k] + 1e-12
    assert curve.error.max() < {600: 0.05, 60: 0.15, 12: 0.5}[bins]


def test_false_killing_is_exact_at_an_edge():
    """Where a whole bin is selected nothing is interpolated: 3 of 5 of the highest two bins are others' texts."""
    histogram = np.array([[40, 20, 2, 1], [20, 15, 1, 1]])
    curve = measures.false_killing(histogram, np.array([0.0, 1, 2, 4]), (0.02, 0.05), 100)
    np.testing.assert_allclose(curve.tau, [4.0, 2.0])
    np.testing.assert_allclose(curve.rate, [1 / 2, 3 / 5])
    np.testing.assert_allclose(curve.error, 0, atol=1e-12)


def test_false_killing_with_equal_scores():
    """Many activations at one value (a ReLU's zeros): all of them are selected over tokens; `error` allows for it."""
    z, labels = activations(9, (10, 10, 10), tokens=16)
    z[np.abs(z) < 2.0] = 0.0
    own = slow_own(z, labels, 3)
    curve = killing_of(z, labels, 3)
    for k, share in enumerate(SHARES):
        _, selected, false = slow_killing(z, labels, own, share)
        assert abs(curve.rate[k] - false / selected) <= curve.error[k] + 1e-12


def test_error_allows_for_scores_equal_to_tau():
    """Ten own scores, then five or three others of one value: asked for 11, tokens select 15 (or 13), all of them.

    With own ones of that value the rate falls: six false, then eight own, of which the 7th asked for takes all.
    """
    edges = np.array([0.0, 2.0, 4.0])
    for others in (5, 3):
        curve = measures.false_killing(np.array([[85 - others, others, 0], [5, 0, 10]]), edges, (0.11,), 100)
        assert curve.rate[0] == pytest.approx(1 / 11)
        assert curve.error[0] == pytest.approx(others / (10 + others) - 1 / 11)
    curve = measures.false_killing(np.array([[80, 0, 6], [6, 8, 0]]), edges, (0.07,), 100)
    assert curve.rate[0] == pytest.approx(6 / 7) and curve.error[0] == pytest.approx(6 / 7 - 6 / 14)


def test_false_killing_of_few_live_neurons():
    """Shares beyond the live neurons' take all of these; a layer of dead ones has no tau and no rate."""
    z, labels = activations(10)
    z[:, :, 1:] = 0.0
    curve = killing_of(z, labels, 3)
    own = slow_own(z, labels, 3)
    assert curve.selected[-1] == z.shape[0] * z.shape[1]
    np.testing.assert_allclose(curve.rate[-1], (labels != own[0]).mean())
    dead = killing_of(np.zeros_like(z), labels, 3)
    assert np.isnan(dead.tau).all() and np.isnan(dead.rate).all() and np.isnan(dead.error).all()
    assert np.isnan(measures.suggested_share(dead, SHARES)).all()
    both = measures.join_layers([curve, dead])
    np.testing.assert_array_equal(both.rate, curve.rate)


def test_layers_together():
    """Each layer keeps its tau_k; numerators and denominators are summed, so layers count by what they select."""
    examples = [activations(11, neurons=20), activations(12, neurons=7)]
    both = measures.join_layers([killing_of(z, labels, 3) for z, labels in examples])
    for k, share in enumerate(SHARES):
        slow = [slow_killing(z, labels, slow_own(z, labels, 3), share) for z, labels in examples]
        assert both.selected[k] == sum(selected for _, selected, _ in slow)
        rate = sum(false for *_, false in slow) / both.selected[k]
        assert abs(both.rate[k] - rate) <= both.error[k] + 1e-12


def test_suggested_share():
    """The lowest rate of each row, the smallest share of equal ones."""
    selected = np.full((2, 4), 10.0)
    false = np.array([[5.0, 2, 3, 2], [4, 4, 4, 1]])
    curve = measures.FalseKilling(np.zeros((2, 4)), selected, false, np.zeros((2, 4)))
    share, rate = measures.suggested_share(curve, (0.01, 0.02, 0.05, 0.1))
    assert share.tolist() == [0.02, 0.1] and rate.tolist() == [0.2, 0.1]


def test_planted_neurons():
    """Neurons that answer to one feature: own feature right, FKR near 0 at small k; to three: two of three false."""
    one, labels = planted([(f,) for f in range(5)] * 2)
    three, _ = planted([(f, (f + 1) % 5, (f + 2) % 5) for f in range(5)] * 2)
    for z in (one, three):
        own, _ = measures.own_features(measures.mean_scores(moments_of(z, labels, 5)))
        np.testing.assert_array_equal(own, slow_own(z, labels, 5))
    own, _ = measures.own_features(measures.mean_scores(moments_of(one, labels, 5)))
    assert own.tolist() == [0, 1, 2, 3, 4] * 2
    small = [k for k, share in enumerate(SHARES) if share <= 0.02]
    assert killing_of(one, labels, 5).rate[small].max() < 0.01
    assert killing_of(three, labels, 5).rate[small].min() > 0.4


def test_blocks_cover_every_neuron_once():
    for neurons, rows in ((2500, 10), (3, 10**9), (1024, 2**13)):
        blocks = list(measures.column_blocks(neurons, rows))
        assert [i for block in blocks for i in range(block.start, block.stop)] == list(range(neurons))
        assert max(block.stop - block.start for block in blocks) <= max(1, min(1024, 2**22 // rows))
    assert list(measures.column_blocks(0, 5)) == []


def test_scores_of_tokens_average_to_one():
    """What own features rest on: a live neuron's mean score over all tokens is (count - 1) / count."""
    z, labels = activations(13)
    moments = moments_of(z, labels, 3)
    count = z.shape[0] * z.shape[1]
    weighted = moments.texts @ measures.mean_scores(moments) / len(labels)
    np.testing.assert_allclose(weighted, (count - 1) / count, rtol=1e-12)
    np.testing.assert_allclose(token_scores(z).mean(axis=(0, 1)), (count - 1) / count, rtol=1e-12)
