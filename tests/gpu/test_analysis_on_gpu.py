"""What is collected on a GPU is what is collected on a CPU; written without a GPU at hand."""

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from l2e_ds.analysis.collect import ShownNeuron, Texts, collect_activations, count_scores
from l2e_ds.analysis.load import LoadedModel
from l2e_ds.analysis.tables import LayerOwn
from l2e_ds.evaluation.model_source import ModelSource
from l2e_ds.models.sites import neuron_sites

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TEXTS, LENGTH, NEURONS, FEATURES = 11, 8, 32, 3


def collected(device: str, folder) -> tuple:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=60, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=NEURONS
    )
    network = GPTNeoXForCausalLM(config).to(device).eval()
    source = ModelSource("tiny", "tiny", name="tiny")
    model = LoadedModel(source, network.base_model, neuron_sites(network, "all"), 2, 1, None, torch.device(device))
    texts = Texts(np.random.default_rng(1).integers(0, 60, (TEXTS, LENGTH)).astype(np.int32), 4)
    layers = collect_activations(model, texts, folder)
    own = []
    for layer in layers:
        mean = layer.mean.mean(0, dtype=np.float64)
        spread = np.sqrt((layer.variance + (layer.mean - mean) ** 2).mean(0, dtype=np.float64))
        own.append(LayerOwn(mean, spread, np.arange(NEURONS) % FEATURES))
    shown = [ShownNeuron(1, 3, -0.2, 0.2)]
    labels = np.arange(TEXTS) % FEATURES
    return layers, *count_scores(model, texts, labels, own, FEATURES, shown, folder)


def test_tables_of_texts_and_scores(tmp_path):
    for name in ("cpu", "cuda"):
        (tmp_path / name).mkdir()
    layers, counts, distributions = collected("cpu", tmp_path / "cpu")
    on_gpu, counts_on_gpu, distributions_on_gpu = collected("cuda", tmp_path / "cuda")
    for layer, other in zip(layers, on_gpu, strict=True):
        for name in ("mean", "variance", "top", "lowest"):
            np.testing.assert_allclose(getattr(layer, name), getattr(other, name), rtol=1e-3, atol=1e-6, err_msg=name)
    for count, other in zip(counts, counts_on_gpu, strict=True):
        np.testing.assert_allclose(count.fourth, other.fourth, rtol=1e-2)
        assert (count.histogram.sum(2) == other.histogram.sum(2)).all()
        # rounding moves a score into the neighbouring bin now and then
        assert np.abs(count.histogram.cumsum(2) - other.histogram.cumsum(2)).max() <= 2
    assert np.abs(distributions - distributions_on_gpu).sum() <= 4
