"""What is collected, against NumPy over single tokens: moments, largest activations, scores by bins, distributions."""

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from l2e_ds.analysis import collect
from l2e_ds.analysis.collect import BINS, ShownNeuron, Texts, bin_edges, bin_of, collect_activations, count_scores
from l2e_ds.analysis.load import LoadedModel
from l2e_ds.analysis.tables import LayerOwn
from l2e_ds.errors import AnalysisError
from l2e_ds.evaluation.model_source import ModelSource
from l2e_ds.models.sites import neuron_sites

TEXTS, LENGTH, NEURONS, FEATURES, BATCH = 11, 8, 32, 3, 4
LABELS = np.arange(TEXTS) % FEATURES


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=60, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=NEURONS
    )
    network = GPTNeoXForCausalLM(config).eval()
    for parameter in network.parameters():  # activations of some size
        torch.nn.init.normal_(parameter, std=0.3)
    source = ModelSource("tiny", "tiny", name="tiny")
    return LoadedModel(source, network.base_model, neuron_sites(network, "all"), 2, 1, None, torch.device("cpu"))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 60, (TEXTS, LENGTH)).astype(np.uint16)


@pytest.fixture(scope="module")
def activations(model, tokens) -> list[np.ndarray]:
    """[texts, T, N] float64 of each layer, text by text."""
    seen = []

    def hook(_module, _inputs, output):
        seen.append(output.double().numpy())

    handles = [layer.mlp.act.register_forward_hook(hook) for layer in model.network.layers]
    for row in tokens:
        model.run(torch.from_numpy(row[None].astype(np.int64)))
    for handle in handles:
        handle.remove()
    return [np.concatenate(seen[layer::2]) for layer in (0, 1)]


def own_of(z: np.ndarray) -> LayerOwn:
    flat = z.reshape(-1, NEURONS)
    own = np.arange(NEURONS) % FEATURES
    own[5] = -1  # as if dead
    return LayerOwn(flat.mean(0), flat.std(0, ddof=1), own)


def score(z: np.ndarray, own: LayerOwn) -> np.ndarray:
    return np.where(own.own >= 0, ((z - own.mean) / own.s) ** 2, 0.0)


def test_bins():
    edges = bin_edges()
    assert len(edges) == BINS and (np.diff(edges) > 0).all()
    assert edges[0] == 0 and edges[1] == 2.0**-8
    widths = np.diff(edges[1:]) / edges[1:-1]
    assert widths.max() <= 1 / 64 + 1e-12
    values = np.concatenate([edges, edges[1:] * (1 - 1e-6), [1e-30, 2.0**16, 1e9, 3.4e38]]).astype(np.float32)
    expected = np.searchsorted(edges, values.astype(np.float64), side="right") - 1
    assert np.array_equal(bin_of(torch.from_numpy(values.copy())).numpy(), expected)


def test_activations_of_texts(model, tokens, activations, tmp_path):
    layers = collect_activations(model, Texts(tokens, BATCH), tmp_path)
    assert [layer.layer for layer in layers] == [0, 1]
    for layer, z in zip(layers, activations, strict=True):
        assert layer.tokens == LENGTH
        np.testing.assert_allclose(layer.mean, z.mean(1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layer.variance, z.var(1), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(layer.top, z.max(1), rtol=1e-5, atol=1e-6)
        for kind, value in (("mean", layer.mean), ("max", layer.top)):
            sample = layer.as_one_sample(kind)
            assert sample.tokens == 1 and sample.mean is value and not sample.variance.any()


def test_scores_by_bins(model, tokens, activations, tmp_path):
    owns = [own_of(z) for z in activations]
    shown = [(1, 3, -0.5, 0.75), (0, 7, -0.2, 0.1)]
    counts_of_layers, distributions = count_scores(model, Texts(tokens, BATCH), LABELS, owns, FEATURES, shown, tmp_path)
    for found, z, own in zip(counts_of_layers, activations, owns, strict=True):
        phi = score(z, own)
        np.testing.assert_allclose(found.fourth, (phi**2).mean((0, 1)), rtol=1e-3, atol=1e-6)
        assert found.fourth[5] == 0
        expected = np.zeros((TEXTS, 2, BINS), dtype=np.int64)
        edges = bin_edges()
        for text in range(TEXTS):
            for neuron in set(range(NEURONS)) - {5}:
                is_own = int(LABELS[text] == own.own[neuron])
                for value in phi[text, :, neuron]:
                    expected[text, is_own, np.searchsorted(edges, value, side="right") - 1] += 1
        assert (found.histogram.sum(2) == expected.sum(2)).all()
        # float32 may put a score that lies on an edge into the neighbouring bin
        assert np.abs(found.histogram.cumsum(2) - expected.cumsum(2)).max() <= 1
        assert np.abs(found.histogram - expected).sum() <= 0.01 * expected.sum()
    for of_neuron, (layer, neuron, low, high) in zip(distributions, shown, strict=True):
        for feature in range(FEATURES):
            values = np.clip(activations[layer][feature == LABELS, :, neuron], low, high)
            counts = np.histogram(values, collect.VALUE_BINS, (low, high))[0]
            assert np.abs(of_neuron[feature] - counts).sum() <= 2
            assert of_neuron[feature].sum() == values.size


def test_samples_of_texts_are_counted_as_tokens_would_be(model, tokens, activations, tmp_path):
    texts = Texts(tokens, BATCH)
    samples = [layer.as_one_sample("max") for layer in collect_activations(model, texts, tmp_path)]
    values = activations[0].max(1)
    own = own_of(values[:, None])
    neuron = ShownNeuron(0, 7, float(values[:, 7].min()), float(values[:, 7].max()))
    (found, _), (distribution,) = count_scores(model, texts, LABELS, [own, own], FEATURES, [neuron], tmp_path, samples)
    assert distribution.sum(1).tolist() == np.bincount(LABELS).tolist()
    phi = score(values, own)
    np.testing.assert_allclose(found.fourth, (phi**2).mean(0), rtol=1e-3, atol=1e-6)
    for text in range(TEXTS):
        is_own = own.own == LABELS[text]
        alive = own.own >= 0
        assert found.histogram[text].sum(1).tolist() == [int((alive & ~is_own).sum()), int((alive & is_own).sum())]
    total = np.histogram(phi[:, np.arange(NEURONS) != 5], [*bin_edges(), np.inf])[0]
    assert np.abs(found.histogram.sum((0, 1)).cumsum() - total.cumsum()).max() <= 1


@pytest.mark.parametrize("batch", [1, TEXTS])
def test_batches_change_rounding_only(model, tokens, tmp_path, batch):
    one = collect_activations(model, Texts(tokens, BATCH), tmp_path / "one")
    other = collect_activations(model, Texts(tokens, batch), tmp_path / "other")
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-4, atol=1e-6)


def test_an_activation_that_is_not_finite(model, tokens, tmp_path):
    """Names model, layer, neuron and text; the model is left without hooks."""
    weight = model.network.layers[1].mlp.dense_h_to_4h.bias
    before = weight.detach().clone()
    with torch.no_grad():
        weight[9] = float("nan")
    try:
        with pytest.raises(AnalysisError, match="tiny: layer 1, neuron 9: its activations in text 0 are not finite"):
            collect_activations(model, Texts(tokens, BATCH), tmp_path)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert not model.network.layers[1].mlp.act._forward_hooks
