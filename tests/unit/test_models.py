"""The Pythia family, its initialisation, the choice of layers, and the schedule made for it."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch

from l2e_ds.checkpoint.disk import count_due, is_due
from l2e_ds.config.sections import ModelConfig
from l2e_ds.engine.engine import group_rates, parameter_groups, set_learning_rate
from l2e_ds.errors import ConfigError
from l2e_ds.models.counts import parameter_counts
from l2e_ds.models.network import build_network
from l2e_ds.models.pythia import PYTHIA, network_config, published_learning_rate
from l2e_ds.models.sites import chosen_layers, neuron_sites
from l2e_ds.training.loss import LossHead

# docs/method.md, 10: layers, hidden, heads, peak learning rate, vocabulary rows; total parameters as published.
FAMILY = {
    "pythia-14m": (6, 128, 4, 1.0e-3, 50304, 14_067_712),
    "pythia-31m": (6, 256, 8, 1.0e-3, 50304, 30_494_720),
    "pythia-70m": (6, 512, 8, 1.0e-3, 50304, 70_426_624),
    "pythia-160m": (12, 768, 12, 6.0e-4, 50304, 162_322_944),
    "pythia-410m": (24, 1024, 16, 3.0e-4, 50304, 405_334_016),
    "pythia-1b": (16, 2048, 8, 2.5e-4, 50304, 1_011_781_632),
    "pythia-1.4b": (24, 2048, 16, 2.0e-4, 50304, 1_414_647_808),
    "pythia-2.8b": (32, 2560, 32, 1.6e-4, 50304, 2_775_208_960),
    "pythia-6.9b": (32, 4096, 32, 1.2e-4, 50432, 6_857_302_016),
    "pythia-12b": (36, 5120, 40, 1.2e-4, 50688, 11_846_072_320),
}
TINY = ModelConfig(name="pythia-14m", num_layers=3, hidden_size=64, num_heads=4, vocab_size=500)


def build(seed: int = 1, **changes):
    config = TINY.model_copy(update=changes)
    return build_network(config, network_config(config, 64), seed, zero3=None)


def test_the_family_is_complete():
    """Exactly the published sizes, no more and no fewer."""
    assert set(PYTHIA) == set(FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_family_table(name):
    """Sizes, learning rate and architecture are the published ones; the parameter count follows from them."""
    layers, h, heads, rate, vocabulary, published = FAMILY[name]
    config = ModelConfig(name=name)
    hf_config = network_config(config, 2048)
    assert (hf_config.num_hidden_layers, hf_config.hidden_size, hf_config.num_attention_heads) == (layers, h, heads)
    assert hf_config.vocab_size == vocabulary and hf_config.intermediate_size == 4 * h
    assert published_learning_rate(config) == rate
    assert hf_config.hidden_act == "gelu" and hf_config.use_parallel_residual and not hf_config.tie_word_embeddings
    assert hf_config.rope_parameters["partial_rotary_factor"] == 0.25 and hf_config.max_position_embeddings == 2048
    assert hf_config.attention_dropout == hf_config.hidden_dropout == 0.0
    # a layer: qkv, dense, two MLP matrices with biases, two norms; then the last norm and two embeddings
    layer = (3 * h * h + 3 * h) + (h * h + h) + (4 * h * h + 4 * h) + (4 * h * h + h) + 2 * (2 * h)
    total = layers * layer + 2 * h + 2 * vocabulary * h
    assert total == published
    assert parameter_counts(hf_config) == (total, total - 2 * vocabulary * h)


def test_overrides_and_unknown_names():
    """Studies may shrink a size; a name outside the family or heads that do not fit are refused by key."""
    hf_config = network_config(TINY, 4096)
    assert (hf_config.num_hidden_layers, hf_config.hidden_size, hf_config.vocab_size) == (3, 64, 500)
    assert hf_config.max_position_embeddings == 4096
    with pytest.raises(ConfigError, match=r"model\.name: got 'pythia-71m', allowed: pythia-14m, "):
        network_config(ModelConfig(name="pythia-71m"), 64)
    for heads in (7, 64):
        with pytest.raises(ConfigError, match=rf"model\.num_heads: {heads} heads .* model\.hidden_size 64"):
            network_config(TINY.model_copy(update={"num_heads": heads}), 64)


def test_pretrained_has_no_published_rate():
    """A pretrained model needs optimizer.peak_learning_rate."""
    with pytest.raises(ConfigError, match=r"optimizer\.peak_learning_rate: is required"):
        published_learning_rate(ModelConfig(pretrained="somewhere"))


# --- initialisation ----------------------------------------------------------------------------------------------


def test_initialisation_is_pythia_s():
    """small_init sqrt(2 / 5h); wang_init 2 / (L sqrt(h)) where a layer writes to the residual stream; biases zero,
    norms one; normally distributed, within five standard errors."""
    model = build()
    small, wang = math.sqrt(2 / (5 * 64)), 2 / (3 * math.sqrt(64))
    kinds = {"small": 0, "wang": 0, "bias": 0, "norm": 0}
    for name, parameter in model.named_parameters():
        values = parameter.detach().double()
        assert parameter.dtype == torch.float32
        if name.endswith("bias"):
            kinds["bias"] += 1
            assert values.count_nonzero() == 0
        elif "norm" in name:
            kinds["norm"] += 1
            assert bool((values == 1).all())
        else:
            residual = name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight"))
            kinds["wang" if residual else "small"] += 1
            std, n = (wang if residual else small), values.numel()
            assert float(values.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
            assert abs(float(values.mean())) < 5 * std / math.sqrt(n), name
            assert float((values / std).pow(4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / n)), name
    # 3 layers: qkv and up, dense and down; embeddings in and out; 4 biases and 2 norms with biases; the last norm
    assert kinds == {"small": 3 * 2 + 2, "wang": 3 * 2, "bias": 3 * 6 + 1, "norm": 3 * 2 + 1}


def test_same_seed_same_weights():
    """The seed alone decides: neither torch's own state nor what was built before; another seed differs."""
    torch.manual_seed(1)
    one = build(seed=5).state_dict()
    torch.manual_seed(2)
    torch.randn(100)
    build(seed=6)
    again, other = build(seed=5).state_dict(), build(seed=6).state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    matrices = [name for name in one if one[name].dim() == 2]
    assert not any(torch.equal(one[name], other[name]) for name in matrices)


def test_weights_do_not_depend_on_the_order_of_construction():
    """A matrix has the same weights whatever stands around it: here in a deeper model with more vocabulary rows."""
    one, deeper = build().state_dict(), build(num_layers=5, vocab_size=600).state_dict()
    for name in ("attention.query_key_value.weight", "mlp.dense_h_to_4h.weight"):
        for layer in range(3):
            key = f"gpt_neox.layers.{layer}.{name}"
            assert torch.equal(one[key], deeper[key])
    distinct = {float(value.flatten()[0]) for value in one.values() if value.dim() == 2}
    assert len(distinct) == sum(value.dim() == 2 for value in one.values()), "two matrices share their numbers"


def test_building_leaves_the_random_state_alone():
    """Making the first weights draws nothing from torch's own generator."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    build()
    assert torch.equal(torch.rand(2), expected)


def test_packed_sequences_have_no_mask(monkeypatch):
    """Attention is torch's own, causal, without a [T, T] mask that would keep it from its flash kernels."""
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments, **options):
        seen.append((options.get("attn_mask"), options.get("is_causal")))
        return attention(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    config = ModelConfig(name="pythia-14m", vocab_size=64, num_layers=2, hidden_size=32, num_heads=2)
    model = build_network(config, network_config(config, 16), 1, None)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    LossHead(model).loss(model, tokens, tokens)[0].backward()
    assert seen == [(None, True)] * 2


def test_training_mode_and_checkpointing():
    """The network comes in training mode; activation checkpointing is non-reentrant and changes no gradient."""
    gradients = []
    for checkpointing in (False, True):
        model = build(activation_checkpointing=checkpointing)
        assert model.training and not model.config.use_cache
        assert model.is_gradient_checkpointing == checkpointing
        model(torch.arange(20).reshape(2, 10)).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


# --- layers ------------------------------------------------------------------------------------------------------

CHOICES = [
    ("mid-2", 1, [0]),
    ("mid-2", 2, [0, 1]),
    ("mid-2", 6, [2, 3]),
    ("mid-2", 12, [5, 6]),
    ("mid-2", 24, [11, 12]),
    ("mid-2", 32, [15, 16]),
    ("mid-third", 1, [0]),
    ("mid-third", 3, [1]),
    ("mid-third", 6, [2, 3]),
    ("mid-third", 12, [4, 5, 6, 7]),
    ("mid-third", 24, list(range(8, 16))),
    ("mid-third", 36, list(range(12, 24))),
    ("top-bottom", 1, [0]),
    ("top-bottom", 6, [0, 5]),
    ("top-bottom", 32, [0, 31]),
    ("all", 1, [0]),
    ("all", 6, [0, 1, 2, 3, 4, 5]),
    ([4, 1], 6, [1, 4]),
    ([0, 5], 6, [0, 5]),
]


@pytest.mark.parametrize(("choice", "layers", "expected"), CHOICES)
def test_chosen_layers(choice, layers, expected):
    """The paper's choices (docs/method.md, 7) and explicit lists, ascending."""
    assert chosen_layers(choice, layers) == expected


@pytest.mark.parametrize("choice", ["mid-2", "mid-third"])
@pytest.mark.parametrize("layers", range(1, 40))
def test_middle_is_the_middle(choice, layers):
    """The chosen block is contiguous, inside the model and centred to half a layer for every depth."""
    chosen = chosen_layers(choice, layers)
    assert chosen == list(range(chosen[0], chosen[-1] + 1)) and chosen[0] >= 0 and chosen[-1] < layers
    assert abs((chosen[0] + chosen[-1]) / 2 - (layers - 1) / 2) <= 0.5
    assert len(chosen) == (min(2, layers) if choice == "mid-2" else max(1, round(layers / 3)))


@pytest.mark.parametrize("wrong", [-1, 6, 100])
def test_layers_out_of_range(wrong):
    """A layer that is not there is refused: the key, what was given, what is allowed."""
    with pytest.raises(ConfigError, match=rf"^inhibition\.layers: got {wrong}, allowed: 0 to 5 \(6 layers\)$"):
        chosen_layers([2, wrong], 6)


@pytest.mark.parametrize("wrong", ["zz", "mid", "", [], [1, 1], [1, "x"], [1.5], (1, 2), None, 3])
def test_layers_that_cannot_be_chosen(wrong):
    """Neither a misspelt name nor an odd list is silently another choice."""
    allowed = "mid-2, mid-third, top-bottom, all, or a list of distinct numbers from 0 to 5"
    with pytest.raises(ConfigError, match=f"^{re.escape(f'inhibition.layers: got {wrong!r}, allowed: {allowed}')}$"):
        chosen_layers(wrong, 6)


def test_sites_of_another_kind_of_model():
    """One line says what is needed and where it is described."""
    for model in (torch.nn.Linear(2, 2), torch.nn.DataParallel(build())):
        words = rf"^neuron_sites: got a {type(model).__name__} without `config`, .*a NeuronSite a layer \(docs/"
        with pytest.raises(ConfigError, match=words):
            neuron_sites(model)


def test_sites_see_the_activations():
    """A site's module returns the neurons: [B, T, 4 * hidden], after the exact GELU."""
    model = build()
    sites = neuron_sites(model, [2, 0])
    assert [(site.layer, site.neurons, site.kind) for site in sites] == [(0, 256, "activation"), (2, 256, "activation")]
    seen = {}
    for site in sites:
        mlp = site.module
        mlp.dense_h_to_4h.register_forward_hook(lambda m, i, out, layer=site.layer: seen.update({("in", layer): out}))
        getattr(mlp, site.attribute).register_forward_hook(
            lambda m, i, out, layer=site.layer: seen.update({("out", layer): out})
        )
    model(torch.arange(20).reshape(2, 10))
    for layer in (0, 2):
        x, z = seen["in", layer].double(), seen["out", layer]
        assert z.shape == (2, 10, 256)
        torch.testing.assert_close(z.double(), 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), rtol=1e-4, atol=1e-6)


# --- groups, checkpoints -------------------------------------------------------------------------------


def test_groups_keep_their_proportions_of_the_rate():
    """DeepSpeed's Muon has a rate of its own for matrices, e.g. 20 times Adam's."""
    groups = [{"lr": 2e-2}, {"lr": 1e-3}]
    engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups))
    shares = [rate / 1e-3 for rate in group_rates(engine)]
    for rate in (5e-4, 1e-3):
        set_learning_rate(engine, rate, shares)
        assert group_rates(engine) == pytest.approx([20 * rate, rate])


def test_parameter_groups():
    """Matrices and embeddings decay, biases and norms do not; every parameter is in exactly one group."""
    model = build()
    groups = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = [{names[id(parameter)] for parameter in group["params"]} for group in groups]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert members[1] == {name for name in names.values() if name.endswith("bias") or "norm" in name}
    assert members[0] == set(names.values()) - members[1]
    assert sum(len(group["params"]) for group in groups) == len(names)
    muon, *others = parameter_groups(model, 0.1, has_muon=True)
    assert [names[id(parameter)] for parameter in muon["params"]] == [
        *(f"gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight" for layer in range(3)),
        *(f"gpt_neox.layers.{layer}.attention.query_key_value.weight" for layer in range(3)),
        *(f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight" for layer in range(3)),
        *(f"gpt_neox.layers.{layer}.attention.dense.weight" for layer in range(3)),
    ]
    assert [group["weight_decay"] for group in (muon, *others)] == [0.1, 0.1, 0.0]
    ends = {names[id(parameter)] for parameter in others[0]["params"]}
    assert ends == {"gpt_neox.embed_in.weight", "lm_head.weight"}
    assert [id(parameter) for parameter in others[1]["params"]] == [id(parameter) for parameter in groups[1]["params"]]


def test_early_checkpoints_are_pythia_s():
    """0, 1, 2, 4 ... 512, then every 1,000 steps and the last: the 154 published checkpoints."""
    due = [step for step in range(143_001) if is_due(step, 143_000, 1000, True)]
    assert due == [0, *(2**i for i in range(10)), *range(1000, 143_001, 1000)]
    assert len(due) == count_due(143_000, 1000, True) == 154


@pytest.mark.parametrize(
    ("every", "early", "expected"),
    [
        (0, False, [25]),
        (10, False, [10, 20, 25]),
        (25, False, [25]),
        (0, True, [0, 1, 2, 4, 8, 16, 25]),
        (4, True, [0, 1, 2, 4, 8, 12, 16, 20, 24, 25]),
    ],
)
def test_due(every, early, expected):
    """Every N steps, never at 0 unless early, and always at the end."""
    assert [step for step in range(26) if is_due(step, 25, every, early)] == expected
    assert count_due(25, every, early) == len(expected)
