"""Random and planted activations token by token, and the measures of docs/analysis.md, computed slowly from them.

Shapes: F features, T tokens of a text, N neurons of a layer.
"""

from __future__ import annotations

import math

import numpy as np

from l2e_ds.inhibition.losses import is_alive

EDGES = np.concatenate([[0.0], np.geomspace(1e-3, 1e3, 600)])
"""Lower edges of the scores' bins: each is 2.3 % wide."""


def activations(
    seed: int, texts: tuple[int, ...] = (5, 8, 6), tokens: int = 7, neurons: int = 9
) -> tuple[np.ndarray, np.ndarray]:
    """z [texts, T, N] float32-exact float64 with a level of its own for each text and feature; labels [texts]."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(texts)), texts))
    levels = random.normal(size=(len(texts), 1, neurons))[labels]
    z = levels + random.normal(size=(len(labels), 1, neurons)) + random.standard_t(4, (len(labels), tokens, neurons))
    return z.astype(np.float32).astype(np.float64), labels


def text_moments(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[texts, T, N] -> [texts, N] mean, [texts, N] population variance."""
    return z.mean(axis=1), z.var(axis=1)


def token_scores(z: np.ndarray) -> np.ndarray:
    """Score of every token (eq. 1): [texts, T, N]; 0 for dead neurons."""
    flat = z.reshape(-1, z.shape[2])
    mean, variance = flat.mean(axis=0), flat.var(axis=0, ddof=1)
    alive = is_alive(mean, variance)
    return np.where(alive, (z - mean) ** 2 / np.where(alive, variance, 1.0), 0.0)


def slow_scores(z: np.ndarray, labels: np.ndarray, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean score over the tokens of a feature, and of all others (eq. 2): [F, N], [F, N]."""
    phi = token_scores(z)
    inside = np.stack([phi[labels == f].mean(axis=(0, 1)) for f in range(features)])
    return inside, np.stack([phi[labels != f].mean(axis=(0, 1)) for f in range(features)])


def slow_own(z: np.ndarray, labels: np.ndarray, features: int) -> np.ndarray:
    """l* (eq. 3): [N], -1 for dead neurons."""
    inside, _ = slow_scores(z, labels, features)
    return np.where(inside.max(axis=0) > 0, inside.argmax(axis=0), -1)


def slow_killing(z: np.ndarray, labels: np.ndarray, own: np.ndarray, share: float) -> tuple[float, int, int]:
    """tau_k, pairs selected, and of these falsely (eq. 4), over single tokens and neurons."""
    phi = token_scores(z)
    tau = np.sort(phi.ravel())[::-1][math.ceil(share * phi.size - 1e-9) - 1]
    selected = (phi >= tau) & (own >= 0)
    return float(tau), int(selected.sum()), int((selected & (labels[:, None, None] != own)).sum())


def slow_histogram(z: np.ndarray, labels: np.ndarray, own: np.ndarray, edges: np.ndarray = EDGES) -> np.ndarray:
    """[texts, 2, BINS] int64, text by text; dead neurons are not counted."""
    phi = token_scores(z)
    histogram = np.zeros((len(z), 2, len(edges)), dtype=np.int64)
    for text, label in enumerate(labels):
        for kind, neurons in enumerate([(own != label) & (own >= 0), own == label]):
            histogram[text, kind] = np.histogram(phi[text][:, neurons], np.append(edges, np.inf))[0]
    return histogram


def slow_ks(own: np.ndarray, everything: np.ndarray) -> float:
    """Largest distance of the two cumulative distributions, looked up at every value."""
    values = np.unique(np.concatenate([own, everything]))
    return max(abs((own <= v).mean() - (everything <= v).mean()) for v in values)


def kurtosis(z: np.ndarray) -> np.ndarray:
    """[N]: mean of phi^2 over all tokens."""
    return (token_scores(z) ** 2).mean(axis=(0, 1))


def planted(
    answers: list[tuple[int, ...]], features: int = 5, texts: int = 20, tokens: int = 16, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A layer with a neuron for each tuple, which spikes on three tokens in ten of that tuple's features' texts."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(features), texts)
    z = random.normal(size=(len(labels), tokens, len(answers)))
    for neuron, answered in enumerate(answers):
        for feature in answered:
            z[labels == feature, :, neuron] += 10 * (random.random((texts, tokens)) < 0.3)
    return z.astype(np.float32).astype(np.float64), labels
