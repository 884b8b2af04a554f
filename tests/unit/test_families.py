"""Every registered model family, on tiny random models: its neurons, training with inhibition, the LM loss.

Shapes: B sequences, T tokens, M = B * T, N neurons, V vocabulary.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from l2e_ds.config.sections import ModelConfig
from l2e_ds.errors import ConfigError, SelfTestError
from l2e_ds.inhibition import Inhibitor, Settings
from l2e_ds.inhibition.measure import observed
from l2e_ds.models.counts import (
    layer_matrices,
    layer_matrix_parameters,
    matrix_parameters,
    parameter_counts,
    unbuilt,
)
from l2e_ds.models.families import FAMILIES, blocks_of, neurons_of
from l2e_ds.models.network import build_network
from l2e_ds.models.pythia import network_config
from l2e_ds.models.sites import neuron_sites
from l2e_ds.training import loss
from l2e_ds.training.loss import LossHead
from tests.tolerances import rounding

VOCABULARY, HIDDEN, LAYERS = 97, 32, 3
SIZES = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
GATED = {**SIZES, **TOKENS, "intermediate_size": 56, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, **TOKENS}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {**SIZES, "ffn_dim": 80, "dropout": 0.0, "word_embed_proj_dim": HIDDEN}

# name: configuration; the output projection of layer {} in the model without head; neurons; kind of site; exact GELU
MODELS: dict[str, tuple[PretrainedConfig, str, int, str, bool]] = {
    "gpt_neox": (
        *(GPTNeoXConfig(**SIZES, intermediate_size=128), "layers.{}.mlp.dense_4h_to_h", 128),
        *("activation", True),
    ),
    "llama": (LlamaConfig(**GATED), "layers.{}.mlp.down_proj", 56, "projection", False),
    "llama tied": (LlamaConfig(**GATED, tie_word_embeddings=True), "layers.{}.mlp.down_proj", 56, "projection", False),
    "mistral": (MistralConfig(**GATED, sliding_window=8), "layers.{}.mlp.down_proj", 56, "projection", False),
    "qwen2": (Qwen2Config(**GATED), "layers.{}.mlp.down_proj", 56, "projection", False),
    "qwen3": (Qwen3Config(**GATED, head_dim=12), "layers.{}.mlp.down_proj", 56, "projection", False),
    "gpt2": (GPT2Config(**GPT2, **NO_DROPOUT), "h.{}.mlp.c_proj", 4 * HIDDEN, "activation", False),
    "gpt2 narrow": (GPT2Config(**GPT2, **NO_DROPOUT, n_inner=48), "h.{}.mlp.c_proj", 48, "activation", False),
    "opt": (OPTConfig(**OPT), "decoder.layers.{}.fc2", 80, "activation", False),
    "opt 350m": (  # as that size: embeddings of another width, norms after
        OPTConfig(**OPT | {"word_embed_proj_dim": 16}, do_layer_norm_before=False),
        *("decoder.layers.{}.fc2", 80, "activation", False),
    ),
    "opt gelu": (OPTConfig(**OPT, activation_function="gelu"), "decoder.layers.{}.fc2", 80, "activation", True),
    "bloom": (
        BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=4),
        *("h.{}.mlp.dense_4h_to_h", 4 * HIDDEN, "activation", False),
    ),
    "falcon": (FalconConfig(**SIZES, **TOKENS), "h.{}.mlp.dense_4h_to_h", 4 * HIDDEN, "activation", True),
    "falcon 40b": (  # as that size: groups of keys, two norms; alibi as of 1b
        FalconConfig(
            **{**SIZES, **TOKENS, "num_kv_heads": 2, "ffn_hidden_size": 72},
            new_decoder_architecture=True,
            alibi=True,
        ),
        *("h.{}.mlp.dense_4h_to_h", 72, "activation", True),
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)
every_family = pytest.mark.parametrize("name", FAMILIES)
TIED = {"llama tied", "gpt2", "gpt2 narrow", "opt", "opt 350m", "opt gelu", "bloom", "falcon", "falcon 40b"}


def build(name: str):
    """Return a model in training mode, with weights large enough for the layers to differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name][0], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.train()


def text(seed: int, sequences: int = 4) -> torch.Tensor:
    return torch.randint(VOCABULARY, (sequences, 25), generator=torch.Generator().manual_seed(seed))


def lm_loss(model, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def projection_inputs(model, name: str) -> dict[int, torch.Tensor]:
    """Filled by each forward pass with what the output projections are given, [M, N], found by their names."""
    seen: dict[int, torch.Tensor] = {}
    for layer in range(LAYERS):
        projection = model.base_model.get_submodule(MODELS[name][1].format(layer))
        projection.register_forward_pre_hook(
            lambda _, inputs, layer=layer: seen.update({layer: inputs[0].reshape(-1, inputs[0].shape[-1])})
        )
    return seen


def test_every_family_is_tested():
    assert {config.model_type for config, *_ in MODELS.values()} == set(FAMILIES)


# --- where the neurons are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("headless", [False, True])
@every_model
def test_neurons_are_the_input_of_the_output_projection(name, headless):
    """What a site shows is what the projection is given, to the bit; counts, sizes and kinds are as configured."""
    config, _, neurons, kind, is_gelu = MODELS[name]
    torch.manual_seed(0)
    model = AutoModel.from_config(config).train() if headless else build(name)
    sites = neuron_sites(model, "all")
    assert [site.layer for site in sites] == list(range(LAYERS))
    assert {(site.neurons, site.kind) for site in sites} == {(neurons, kind)}
    assert {site.function for site in sites} == {"gelu" if is_gelu else None}
    assert neurons_of(config) == neurons and len(blocks_of(model)) == LAYERS
    given, shown = projection_inputs(model, name), {}
    with observed(sites, lambda index, z: shown.update({index: z})):
        model(input_ids=text(1)[:, :-1], use_cache=False)
    for layer in range(LAYERS):
        assert given[layer].shape == (4 * 24, neurons)
        assert torch.equal(shown[layer], given[layer])
    assert not torch.equal(shown[0], shown[1])


# --- training with inhibition ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, "opt 350m", "falcon 40b"])
def test_gradients_are_those_of_the_written_out_sum(name):
    """LM loss + lambda * sum over layers of L_MS (eq. 5), written out in float64 with the projections' inputs as
    neurons; statistics with NumPy."""
    share, coefficient = 0.05, 0.3
    model = build(name)
    reference = copy.deepcopy(model).double()
    neurons = projection_inputs(reference, name)
    settings = Settings(loss="published", target_share=share, coefficient=coefficient, statistics_window=None)
    inhibitor = Inhibitor(neuron_sites(model, [0, 2]), settings)
    seen: dict[int, list[np.ndarray]] = {0: [], 2: []}
    with inhibitor:
        for seed in (1, 2):  # history for the statistics; the weights do not move
            inhibitor.attach_loss(lm_loss(model, text(seed))).backward()
            inhibitor.step()
            lm_loss(reference, text(seed))
            for layer, earlier in seen.items():
                earlier.append(neurons[layer].detach().numpy())
        model.zero_grad()
        taus = [float(hook.running.tau) for hook in inhibitor.hooks]
        inhibitor.attach_loss(lm_loss(model, text(3))).backward()

    total = lm_loss(reference, text(3))
    for (layer, earlier), tau in zip(seen.items(), taus, strict=True):
        z = neurons[layer]
        samples = np.concatenate(earlier)
        mean, variance = torch.from_numpy(samples.mean(0)), torch.from_numpy(samples.var(0, ddof=1))
        d2 = (z - mean) ** 2
        selected = d2.detach() / variance >= tau
        assert 0 < int(selected.sum()) < selected.numel() / 2
        total = total + coefficient * d2[selected].log().sum() / (share * z.numel())
    total.backward()
    rounding = 1e-7 * max(float(parameter.grad.abs().max()) for parameter in reference.parameters())
    for (key, parameter), exact in zip(model.named_parameters(), reference.parameters(), strict=True):
        atol = 1e-4 * float(exact.grad.abs().max()) + rounding  # the gradient of a key's bias is zero
        torch.testing.assert_close(parameter.grad.double(), exact.grad, rtol=1e-3, atol=atol, msg=key)


def train(model, inhibitor: Inhibitor | None, run=None) -> tuple[list[float], list[torch.Tensor]]:
    """Four steps of gradient descent: losses, and the last step's gradients."""
    losses = []
    for seed in range(4):
        model.zero_grad()
        value = lm_loss(run or model, text(seed))
        (value if inhibitor is None else inhibitor.attach_loss(value)).backward()
        losses.append(float(value.detach()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        if inhibitor is not None:
            inhibitor.step()
    return losses, [parameter.grad for parameter in model.parameters()]


@every_family
def test_coefficient_zero_is_plain_training(name):
    """lambda = 0: losses and gradients are those without hooks, to the bit; with lambda > 0 they are not."""
    plain = train(build(name), None)
    for coefficient in (0.0, 0.1):
        model = build(name)
        inhibitor = Inhibitor(neuron_sites(model), Settings(coefficient=coefficient))
        with inhibitor:
            losses, gradients = train(model, inhibitor)
        assert float(inhibitor.last[:, 0].min()) > 0, "something was selected in every layer"
        assert not inhibitor.self_test_pending
        same = losses == plain[0] and all(map(torch.equal, gradients, plain[1]))
        assert same == (coefficient == 0)


def saved(name: str, folder) -> str:
    build(name).save_pretrained(folder)
    return str(folder)


@every_family
def test_loaded_and_recomputed(name, tmp_path):
    """`model.pretrained` gives the saved weights, in training mode; recomputing layers changes no bit of training with
    inhibition, and counts nothing twice."""
    folder, runs = saved(name, tmp_path), []
    attention = "eager" if name == "bloom" else "sdpa"
    for recompute in (False, True):
        config = ModelConfig(pretrained=folder, attention=attention, activation_checkpointing=recompute)
        model = build_network(config, network_config(config, 24), 1, None)
        assert model.training and all(map(torch.equal, model.state_dict().values(), build(name).state_dict().values()))
        inhibitor = Inhibitor(neuron_sites(model, "all"), Settings(coefficient=0.1))
        with inhibitor:
            runs.append((*train(model, inhibitor), inhibitor.state_dict()))
            inhibitor.attach_loss(lm_loss(model, text(9))).backward()
            assert {hook.calls.recomputed for hook in inhibitor.hooks} == {int(recompute)}
    assert runs[0][0] == runs[1][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))
    assert all(torch.equal(value, runs[1][2][key]) for key, value in runs[0][2].items())


def test_compiled_gated_block():
    """Under torch.compile, block by block as `model.compile` does, a hook on a projection runs as often and sees the
    same. (Activations: tests/unit/inhibition/test_hook.py.)"""
    runs = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = build("llama")
        if compiled:
            blocks_of(model)[1].compile(backend="aot_eager")
        inhibitor = Inhibitor(neuron_sites(model, [1]), Settings(coefficient=0.1))
        with inhibitor:
            runs.append((*train(model, inhibitor), inhibitor.state_dict()))
        assert not inhibitor.self_test_pending
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-3, atol=1e-6)
    for key, value in runs[0][2].items():
        torch.testing.assert_close(runs[1][2][key], value, rtol=1e-4, atol=1e-6, msg=key)


# --- the LM loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_one_piece", [True, False])
@every_model
def test_loss_head(monkeypatch, name, in_one_piece):
    """Loss, token losses and all gradients are those of cross-entropy of the model's own logits."""
    model = build(name)
    output = model.get_output_embeddings().weight
    assert (output is model.get_input_embeddings().weight) == (name in TIED)
    tokens = text(5)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(input_ids=inputs).logits
    functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    monkeypatch.setattr(loss, "IN_ONE_PIECE", 10**9 if in_one_piece else 1)
    monkeypatch.setattr(loss, "CHUNK", {"cpu": 13})
    head = LossHead(model)
    value, _ = head.loss(model, inputs, targets)
    value.backward()
    each = functional.cross_entropy(logits.detach().flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(value.detach(), each.mean())
    # the true gradient of some is zero (a bias of keys): what is left are roundings of the others
    off = rounding(steps=1, layers=LAYERS, tokens=targets.numel())
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=off, atol=off * largest)
    with torch.no_grad():
        torch.testing.assert_close(head.token_losses(model, inputs, targets), each)
        assert torch.equal(model(input_ids=inputs).logits, logits)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**GATED, head_dim=8, final_logit_softcapping=30.0),
        GraniteConfig(**GATED, logits_scaling=8.0),
    ],
    ids=lambda config: config.model_type,
)
def test_a_head_that_changes_its_logits_is_refused(config):
    """Capped or scaled logits would come out as capped or scaled losses."""
    model = AutoModelForCausalLM.from_config(config)
    head, tokens = LossHead(model), text(1)
    with pytest.raises(SelfTestError, match="changes its logits after the output projection"):
        head.loss(model, tokens[:, :-1], tokens[:, 1:])


# --- first weights -----------------------------------------------------------------------------------------------


@every_model
def test_first_weights_are_distributed_as_those_of_transformers(name, tmp_path):
    """From a config.json: constants are the same; of n normal numbers the standard deviation is known to 1 / sqrt(2 n),
    and those of two draws agree within six times what they vary by together."""
    MODELS[name][0].save_pretrained(tmp_path)
    config = ModelConfig(config=str(tmp_path), attention="eager")
    hf_config = network_config(config, 16)
    model = build_network(config, hf_config, 1, None)
    torch.manual_seed(1)
    theirs = dict(AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).named_parameters())
    ours = {key: parameter.detach() for key, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for key, parameter in ours.items():
        other = theirs[key].detach()
        if float(other.std()) == 0:
            assert torch.equal(parameter, other), key
        else:
            assert abs(float(parameter.std() / other.std()) - 1) < 6 * (1 / other.numel()) ** 0.5, key
            assert not torch.equal(parameter, other), key
    again, another = (dict(build_network(config, hf_config, seed, None).named_parameters()) for seed in (1, 2))
    assert all(torch.equal(ours[key], again[key]) for key in ours)
    assert any(not torch.equal(ours[key], another[key]) for key in ours)
    before = torch.cuda.initial_seed() if torch.cuda.is_available() else torch.initial_seed()
    build_network(config, hf_config, 3, None)
    assert before == (torch.cuda.initial_seed() if torch.cuda.is_available() else torch.initial_seed())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (name in TIED)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "pythia-14m", "config": "x"}, "give exactly one of model.name, model.config and model.pretrained"),
        ({"config": "x", "num_layers": 2}, "model.num_layers cannot change a model.config"),
        ({"config": "x", "revision": "main"}, "model.revision needs model.pretrained"),
        ({"config": "gone"}, "model.config: no such file, or folder with a config.json: gone"),
        ({"config": "empty"}, "model.config: no such file, or folder with a config.json: empty"),
        ({"config": "number.json"}, "model.config: cannot load 'number.json': "),
        ({"config": "size.json"}, "model.config: cannot load 'size.json': "),
        ({"config": "heads.json"}, "model.config: cannot load 'heads.json': "),
        ({"config": "t5.json"}, "is of the family t5, known are "),
        ({"config": "broken.json"}, "model.config: cannot load 'broken.json': "),
    ],
)
def test_a_config_that_cannot_be_is_one_line(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "t5.json").write_text('{"model_type": "t5"}')
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "size.json").write_text('{"model_type": "gpt_neox", "hidden_size": "abc"}')
    (tmp_path / "heads.json").write_text('{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}')
    (tmp_path / "broken.json").write_text('{"model_type": "llama", ')
    with pytest.raises((ConfigError, ValueError)) as caught:
        network_config(ModelConfig(**given), 16)
    assert said in str(caught.value)
    if isinstance(caught.value, ConfigError):
        assert "\n" not in str(caught.value)


# --- counts ------------------------------------------------------------------------------------------------------


@every_model
def test_parameter_counts(name):
    """The counts are those of the built network: in all, without token embeddings, and without looked-up embeddings."""
    config, model = MODELS[name][0], build(name)
    total = sum(p.numel() for p in model.parameters())
    width = getattr(config, "word_embed_proj_dim", HIDDEN)
    rows = VOCABULARY * width
    assert parameter_counts(config) == (total, total - rows * (1 if name in TIED else 2))
    positions = [p.numel() for key, p in model.named_parameters() if key.endswith(("wpe.weight", "positions.weight"))]
    assert len(positions) == name.startswith(("gpt2", "opt"))
    expected = total - sum(positions) - (0 if name in TIED else rows)
    assert matrix_parameters(model) == matrix_parameters(unbuilt(config)) == expected


@every_model
def test_matrices_of_the_layers(name):
    """What Muon updates: all matrices but those of tokens, of positions and of the output."""
    config, model = MODELS[name][0], build(name)
    ends = ("wte.", "wpe.", "lm_head.", "embed", "word_embeddings.")
    expected = {key for key, p in model.named_parameters() if p.ndim == 2 and not any(end in key for end in ends)}
    names = {id(p): key for key, p in model.named_parameters()}
    assert {names[id(p)] for p in layer_matrices(model)} == expected
    assert layer_matrix_parameters(config) == sum(model.get_parameter(key).numel() for key in expected) > 0


# --- what is refused ---------------------------------------------------------------------------------------------


def pretrained(folder, config: PretrainedConfig) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return ModelConfig(pretrained=str(folder))


def test_unknown_family(tmp_path):
    """One line: what it is, what is known, where another is registered; for training and for analysis."""
    config = PhiConfig(**SIZES, intermediate_size=64)
    words = (
        r"is of the family phi, known are bloom, .*, qwen3;"
        r" another is registered in FAMILIES of l2e_ds/models/families.py"
    )
    with pytest.raises(ConfigError, match=rf"^model\.pretrained: '.*': {words}"):
        network_config(pretrained(tmp_path, config), 24)
    with pytest.raises(ConfigError, match=f"^the model: {words}"):
        neuron_sites(AutoModel.from_config(config))


def test_what_a_family_does_not_have(tmp_path):
    """BLOOM has one kind of attention; layers that are skipped at random cannot be hooked."""
    with pytest.raises(ConfigError, match=r"^model\.attention: got sdpa, a bloom has: eager$"):
        network_config(pretrained(tmp_path, MODELS["bloom"][0]), 24)
    with pytest.raises(ConfigError, match=r"^model\.pretrained: '.*': skips layers at random \(layerdrop 0\.1\)"):
        network_config(pretrained(tmp_path, OPTConfig(**OPT, layerdrop=0.1)), 24)


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_kinds_of_attention(name, attention):
    """The registry says which ones transformers has."""
    config = copy.deepcopy(MODELS[name][0])
    if attention in FAMILIES[config.model_type].attention:
        AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    else:
        with pytest.raises(ValueError, match="does not support"):
            AutoModelForCausalLM.from_config(config, attn_implementation=attention)
