"""Models of other families, trained by the real command and exported: one gated, from weights and from scratch, and one
with tied embeddings."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from l2e_ds.checkpoint.weights import checkpoint_weights, find_checkpoint
from l2e_ds.config.reading import load_run_config
from l2e_ds.data import prepare_sets
from l2e_ds.data.tokenizer import train_tokenizer
from l2e_ds.export.export import export
from tests.integration.conftest import SENTENCES
from tests.integration.running import lines

VOCABULARY = 300
# family: configuration, ZeRO stage
NETWORKS = {
    "llama": (LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3), 3),
    "gpt2": (GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_positions=64), 1),
}
WITHOUT = ("model.name", "model.vocab_size", "model.num_layers", "model.hidden_size", "model.num_heads")


@pytest.fixture
def pretrained(tmp_path, family) -> str:
    """A folder as transformers saves it, with a tokenizer."""
    hf_config = NETWORKS[family][0]
    hf_config.num_attention_heads = 4
    if family == "llama":
        hf_config.num_key_value_heads = 2
    hf_config.bos_token_id = hf_config.eos_token_id = 0
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(hf_config).save_pretrained(tmp_path / "pretrained")
    train_tokenizer(iter(SENTENCES), VOCABULARY).save_pretrained(tmp_path / "pretrained")
    return str(tmp_path / "pretrained")


@pytest.mark.full
@pytest.mark.parametrize(("family", "key"), [("llama", "pretrained"), ("gpt2", "pretrained"), ("llama", "config")])
def test_trained_and_exported(family, key, pretrained, launch, run_file, tmp_path):
    """Three steps with inhibition. The exported folder holds the checkpoint's weights; its logits give the held-out
    loss that the run measured last."""
    overrides = [
        *(f"{key}=null" for key in (*WITHOUT, "data.train_tokenizer")),
        *(f"model.{key}={pretrained}", f"data.tokenizer={pretrained}", "training.steps=3"),
        f"deepspeed.config=ds_configs/zero{NETWORKS[family][1]}.json",
    ]
    one = launch(sys.executable, "-m", "l2e_ds.train", run_file, *overrides)
    assert one.end() == 0, one.said()[-3000:]
    run = tmp_path / "run"
    steps = lines(run)
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(0 < line["observed_share"] < 0.2 and line["gradient_norm"] > 0 for line in steps[1:])
    evaluations = lines(run, "evaluation")
    assert evaluations[-1]["step"] == 3 and evaluations[-1]["held_out_loss"] < evaluations[0]["held_out_loss"]
    # the third layer is not inhibited: the guard compares with it
    measured = {key for key in evaluations[-1] if key.endswith("/mean_s")}
    assert measured == {"layer0/mean_s", "layer1/mean_s", "comparison_layer2/mean_s"}

    out = tmp_path / "exported"
    report = export(run, out)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    start = AutoModelForCausalLM.from_pretrained(pretrained).eval()
    assert type(model) is type(start) and report.tokenizer and len(AutoTokenizer.from_pretrained(out)) <= VOCABULARY
    assert report.parameters == sum(p.numel() for p in start.parameters())
    assert model.config.tie_word_embeddings == (family == "gpt2")
    stored = checkpoint_weights(find_checkpoint(run, None), "fp32")
    assert all(torch.equal(stored[name], parameter) for name, parameter in model.named_parameters())
    assert not any(map(torch.equal, model.parameters(), start.parameters()))

    config = load_run_config(run_file, overrides)
    held_out = prepare_sets(config.data, tmp_path / "cache", VOCABULARY, 10)[0].held_out
    batch = torch.from_numpy(held_out.batch(np.arange(min(10, len(held_out)))))
    with torch.no_grad():
        logits = model(input_ids=batch[:, :-1]).logits
    found = float(functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()))
    assert found == pytest.approx(evaluations[-1]["held_out_loss"], rel=1e-6)


@pytest.mark.parametrize("family", ["llama"])
def test_plan_is_pythias(pretrained, run_file, capsys):
    """`l2e-ds plan` counts Pythia's activations; of another family it says so, in one line."""
    from l2e_ds.cli import main

    overrides = [*(f"{key}=null" for key in WITHOUT), f"model.pretrained={pretrained}"]
    assert main(["plan", str(run_file), *overrides, "--gpus", "2", "--gpu", "A100-80GB"]) == 2
    error = capsys.readouterr().err.strip()
    assert "is a llama; a plan knows the memory and time of gpt_neox (Pythia) only" in error and "\n" not in error
