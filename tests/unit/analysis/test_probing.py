"""Sparse probing against trying every threshold. Shapes: F features, N neurons."""

from __future__ import annotations

import numpy as np
import pytest

from l2e_ds.analysis import measures, probing
from tests.unit.analysis.single_tokens import planted


def example(seed: int, texts: tuple[int, ...], neurons: int, rounded: bool) -> tuple[np.ndarray, np.ndarray]:
    """values [texts, N] float32, with many equal ones where `rounded`; labels [texts]."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(texts)), texts))
    values = random.normal(size=(len(texts), neurons))[labels] + random.normal(size=(len(labels), neurons))
    return (values.round() if rounded else values).astype(np.float32), labels


def f1(said: np.ndarray, positive: np.ndarray) -> float:
    return 2 * (said & positive).sum() / (said.sum() + positive.sum())


def slow_probe(values: np.ndarray, positive: np.ndarray, train: np.ndarray) -> tuple[float, set]:
    """Best F1 on the training texts, and (direction, F1 on the test texts) of all probes that reach it."""
    distinct = np.unique(values[train].astype(np.float64))
    thresholds = [-np.inf, *((distinct[1:] + distinct[:-1]) / 2), np.inf]
    tried = []
    for threshold in thresholds:
        for direction in (1, -1):
            said = (values > threshold) == (direction == 1)
            tried.append((f1(said[train], positive[train]), direction, f1(said[~train], positive[~train])))
    best = max(fit for fit, *_ in tried)
    return best, {(direction, round(test, 12)) for fit, direction, test in tried if fit > best - 1e-12}


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("texts", [(12, 9, 15), (6, 6), (2, 3, 5, 30)])
def test_against_every_threshold(texts, rounded):
    values, labels = example(len(texts), texts, 12, rounded)
    masks = probing.training_masks(labels, 1, seed=3)
    found = probing.probe_layer(values, labels, len(texts), masks)
    for f in range(len(texts)):
        for neuron in range(values.shape[1]):
            best, probes = slow_probe(values[:, neuron], labels == f, masks[0])
            assert found.f1_train[f, neuron] == pytest.approx(best, abs=1e-12)
            assert (found.direction[f, neuron], round(found.f1_test[f, neuron], 12)) in probes
    assert np.isnan(found.f1_test_sd).all()


def test_seeds_are_averaged():
    values, labels = example(5, (10, 14, 12), 6, False)
    masks = probing.training_masks(labels, 3, seed=1)
    together = probing.probe_layer(values, labels, 3, masks)
    alone = [probing.probe_layer(values, labels, 3, mask[None]) for mask in masks]
    np.testing.assert_allclose(together.f1_train, np.mean([one.f1_train for one in alone], axis=0), rtol=1e-12)
    np.testing.assert_allclose(together.f1_test, np.mean([one.f1_test for one in alone], axis=0), rtol=1e-12)
    np.testing.assert_allclose(together.f1_test_sd, np.std([one.f1_test for one in alone], axis=0, ddof=1), rtol=1e-9)
    np.testing.assert_array_equal(together.direction, np.sign(np.sum([one.direction for one in alone], axis=0)))


def test_test_texts_do_not_move_the_probe():
    """Other values of the test texts leave F1 on the training texts and the direction as they were."""
    values, labels = example(6, (10, 14, 12), 6, False)
    masks = probing.training_masks(labels, 1, seed=1)
    before = probing.probe_layer(values, labels, 3, masks)
    values[~masks[0]] = np.random.default_rng(0).normal(size=((~masks[0]).sum(), 6)) * 5
    after = probing.probe_layer(values, labels, 3, masks)
    np.testing.assert_array_equal(after.f1_train, before.f1_train)
    np.testing.assert_array_equal(after.direction, before.direction)
    assert np.any(after.f1_test != before.f1_test)


def test_splits_are_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [10, 25, 2])
    masks = probing.training_masks(labels, 4, seed=7)
    for mask in masks:
        assert np.bincount(labels[mask]).tolist() == [8, 20, 1]
    assert len({mask.tobytes() for mask in masks}) == 4
    np.testing.assert_array_equal(masks, probing.training_masks(labels, 4, seed=7))
    assert np.any(masks != probing.training_masks(labels, 4, seed=8))


def test_blocks_do_not_change_the_result(tmp_path, monkeypatch):
    """Read from a file in blocks of a few neurons."""
    values, labels = example(8, (9, 9, 9), 11, True)
    masks = probing.training_masks(labels, 2, seed=0)
    whole = probing.probe_layer(values, labels, 3, masks)
    values.tofile(tmp_path / "values")
    mapped = np.memmap(tmp_path / "values", dtype=np.float32, mode="r", shape=values.shape)
    monkeypatch.setattr(measures, "BLOCK_VALUES", 4 * 27 * 4)
    assert len(list(measures.column_blocks(11, 4 * 27))) == 3
    blocks = probing.probe_layer(mapped, labels, 3, masks)
    for name in ("f1_train", "f1_test", "f1_test_sd", "direction"):
        np.testing.assert_array_equal(getattr(blocks, name), getattr(whole, name))


def test_constant_neurons_say_yes_to_all():
    """No threshold tells texts apart: the best is to take all, F1 = 2 P / (texts + P)."""
    labels = np.repeat([0, 1], [10, 30])
    masks = probing.training_masks(labels, 1, seed=0)
    found = probing.probe_layer(np.zeros((40, 2), dtype=np.float32), labels, 2, masks)
    np.testing.assert_allclose(found.f1_train[:, 0], [2 * 8 / 40, 2 * 24 / 56])
    np.testing.assert_allclose(found.f1_test[:, 0], [2 * 2 / 10, 2 * 6 / 14])


def test_inverted_neuron_has_direction_below():
    values, labels = example(9, (20, 20), 1, False)
    values[labels == 1] -= 20
    found = probing.probe_layer(values, labels, 2, probing.training_masks(labels, 3, seed=0))
    assert found.direction[:, 0].tolist() == [1, -1] and np.all(found.f1_test == 1)


def test_places_by_training_f1_then_layer_then_neuron():
    """Equal neurons in order of layer and neuron; dead ones never; fewer places than asked where few live."""
    f1_train = np.array([[0.5, 0.9, 0.9, 0.9, 1.0, 0.2], [0.1, 0.1, 0.1, 0.1, 0.3, 0.1]])
    alive = np.array([True, True, True, True, False, True])
    best = probing.best_neurons(f1_train, alive, places=10)
    assert best.tolist() == [[1, 2, 3, 0, 5], [0, 1, 2, 3, 5]]
    assert probing.best_neurons(f1_train, alive, places=2).tolist() == [[1, 2], [0, 1]]


def test_planted_neuron_is_found():
    """The neuron built for a feature comes first for it; one that answers to three features is found for none."""
    z, labels = planted([*((f, (f + 1) % 5, (f + 2) % 5) for f in range(5)), *((f,) for f in range(5))])
    found = probing.probe_layer(z.mean(axis=1).astype(np.float32), labels, 5, probing.training_masks(labels, 3, 0))
    best = probing.best_neurons(found.f1_train, np.ones(10, dtype=bool), places=1)
    assert best[:, 0].tolist() == [5, 6, 7, 8, 9]
    assert found.f1_test[:, 5:].diagonal().min() > 0.8
    assert found.f1_test[:, :5].max() < 0.8
