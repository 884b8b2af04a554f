"""Every recipe and every DeepSpeed configuration of this repository parses, resolves and builds."""

import pytest
import torch
import yaml

from l2e_ds.checkpoint.disk import checkpoint_bytes
from l2e_ds.config.reading import load_run_config
from l2e_ds.engine.configuration import resolve, zero_stage
from l2e_ds.inhibition import Inhibitor
from l2e_ds.models.counts import parameter_counts
from l2e_ds.models.pythia import PYTHIA, network_config
from l2e_ds.models.sites import neuron_sites
from l2e_ds.training.building import inhibition_settings
from tests.processes import REPOSITORY

RECIPES = sorted((REPOSITORY / "launch/recipes").glob("*.yaml"))


def test_there_is_a_recipe_for_every_size():
    assert {path.stem for path in RECIPES} == {*PYTHIA, "llama-70m", "quickstart"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds(path):
    from transformers import AutoModelForCausalLM

    config = load_run_config(path)
    ranks = 2 if path.stem == "quickstart" else 64
    config, ds, batch = resolve(config, ranks, path)
    assert batch.micro_batch * ranks * batch.accumulation == config.training.global_batch
    hf_config = network_config(config.model, config.data.sequence_length)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    sites = neuron_sites(model, config.inhibition.layers)
    middle = hf_config.num_hidden_layers // 2
    assert [site.layer for site in sites] == [middle - 1, middle]
    assert all(site.neurons == hf_config.intermediate_size for site in sites)
    replaced = getattr(sites[1].module, sites[1].attribute)
    with Inhibitor(sites, inhibition_settings(config), run_steps=config.training.steps):
        assert (getattr(sites[1].module, sites[1].attribute) is replaced) == (sites[1].kind == "projection")
    assert zero_stage(ds) in (1, 3)
    section = config.inhibition
    assert (section.loss, section.power, section.strength, section.coefficient) == ("projected", 1, 0.05, None)
    if path.stem == "quickstart":
        return
    parameters = sum(p.numel() for p in model.parameters())
    every_step = 26 * checkpoint_bytes(parameters, 8 * parameters, zero_stage(ds), 2, len(sites), sites[0].neurons)
    assert (every_step > 1e12) == (config.checkpoint.keep_last is not None)
    assert config.checkpoint.early == (config.checkpoint.keep_last is None), "Pythia's early ones would be removed"
    assert (section.start, section.warmup) == (0.3, 0.2)
    if path.stem == "llama-70m":
        assert parameter_counts(hf_config)[0] == 70_490_624
    size = PYTHIA[path.stem.replace("llama", "pythia")]
    assert config.training.steps == 14300
    assert config.optimizer.schedule_steps == 143000
    assert config.optimizer.peak_learning_rate == size.learning_rate
    assert batch.tokens_per_step == 2_097_152
    assert (ds["bf16"]["enabled"], ds["communication_data_type"]) == (True, "fp32")
    assert config.model.compile == (zero_stage(ds) == 1)
    published = load_run_config(path, ["training.precision=fp16"])
    for ranks in (8, 1024):
        _, in_fp16, _ = resolve(published, ranks, path)
        assert (in_fp16["fp16"]["enabled"], in_fp16["fp16"]["initial_scale_power"]) == (True, 12)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_method_is_changed_by_its_own_keys(path):
    """As docs/recipes.md has it: nothing of the recipe has to be taken back."""
    assert load_run_config(path, ["inhibition.method=memel"]).inhibition.strength is None
    published = load_run_config(path, ["inhibition.loss=published", "inhibition.coefficient=1e-3"]).inhibition
    assert (published.strength, published.coefficient) == (None, 1e-3)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_only_what_it_must(path):
    """Each key is known, and none is given as null."""
    for section, values in yaml.safe_load(path.read_text()).items():
        assert all(value is not None for value in values.values()), section
