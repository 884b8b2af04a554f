"""What `l2e-ds export` writes beside the weights: special tokens, tokenizer files, modes, the trained length."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    pipeline,
)

from l2e_ds.cli import main
from l2e_ds.data.tokenizer import train_tokenizer
from l2e_ds.run_directory import manifest
from tests.unit.evaluation.test_sharing import make_run

TEXTS = ["The old pilot counted", "Es war einmal  ein\n\tKönig,", "1 2 3<|endoftext|>x", "a"]


def tokenizer_json(folder: Path, *special: str) -> Path:
    """FOLDER/tokenizer.json: byte-level BPE whose special tokens have the last ids."""
    content = json.loads(train_tokenizer(iter(TEXTS * 3), 257).backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    del vocabulary["<|endoftext|>"]
    content["model"]["vocab"] = {token: number for number, token in enumerate(vocabulary)}
    content["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(list(special))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def run_with(run: Path, *special: str, **names: str) -> Tokenizer:
    """A run with a tokenizer of these special tokens; names: what its configuration says of them."""
    make_run(run)
    path = tokenizer_json(run / "tokenizer", *special)
    config = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True, **names}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_file(str(path))


def export(run: Path, output: Path) -> Path:
    assert main(["export", str(run), "--output", str(output)]) == 0
    return output


END, BEGIN, PAD = "<|endoftext|>", "<|begin|>", "<|padding|>"


@pytest.mark.parametrize(
    ("special", "names", "eos", "bos", "pad"),
    [
        ([END], {"eos_token": END, "bos_token": END}, END, END, END),
        ([END], {}, END, END, END),  # not named: what ended the documents
        ([BEGIN, END], {"eos_token": END, "bos_token": BEGIN}, END, BEGIN, END),
        ([PAD, END], {"eos_token": END}, END, END, PAD),
        ([END, "<mine>"], {"eos_token": END, "pad_token": "<mine>"}, END, END, "<mine>"),
        (["</s>"], {}, "</s>", "</s>", "</s>"),
        (["<other>"], {}, None, None, None),
    ],
)
def test_special_tokens_are_the_tokenizers(tmp_path, special, names, eos, bos, pad):
    """The run's own configuration says 2 and 0, as one of transformers that nobody has told. Where no beginning is
    named a text begins after the end of another."""
    backend = run_with(tmp_path / "run", *special, **names)
    folder = export(tmp_path / "run", tmp_path / "model")
    config, generation = AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if eos is None:
        assert tokenizer.eos_token is None and config.eos_token_id == 2
        return
    ids = [backend.token_to_id(token) for token in (eos, bos, pad)]
    assert [generation.eos_token_id, generation.bos_token_id, generation.pad_token_id] == ids
    assert [tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id] == ids
    assert [config.eos_token_id, config.bos_token_id, config.pad_token_id] == ids


def test_generation_ends_at_the_end_of_text(tmp_path):
    run_with(tmp_path / "run", END, eos_token=END)
    folder = export(tmp_path / "run", tmp_path / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer("The old", return_tensors="pt")
    with torch.no_grad():  # every answer is the token of this number
        for wanted, length in ((tokenizer.eos_token_id, 1), (0, 8), (2, 8)):
            model.get_output_embeddings().weight.zero_()
            model.get_output_embeddings().weight[wanted] = 1.0
            model.gpt_neox.final_layer_norm.weight.zero_()
            model.gpt_neox.final_layer_norm.bias.fill_(1.0)
            answer = model.generate(**tokens, max_new_tokens=8, do_sample=False)[0, tokens["input_ids"].shape[1] :]
            assert answer.tolist() == [wanted] * length


def test_the_tokenizer_is_read_anywhere_with_the_same_tokens(tmp_path):
    backend = run_with(tmp_path / "run", END, eos_token=END, unk_token=END)
    folder = export(tmp_path / "run", tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4, llama.cpp, CTranslate2 know it
    assert config["model_input_names"] == ["input_ids", "attention_mask"]  # transformers 4 would add token types
    assert [config["bos_token"], config["unk_token"]] == [END, END]  # CTranslate2 reads no model without them
    assert not {"is_local", "local_files_only", "backend", "name_or_path"} & config.keys()
    assert not any(str(tmp_path) in path.read_text() for path in folder.glob("*.json"))
    tokenizer, plain = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        expected = backend.encode(text).ids
        assert tokenizer(text)["input_ids"] == plain.encode(text).ids == expected
        assert tokenizer.decode(expected) == text
    assert set(tokenizer(TEXTS[0])) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("kind", "rotary"),
    [
        (GPTNeoXConfig, {"rope_type": "default", "partial_rotary_factor": 0.5}),
        (LlamaConfig, {"rope_type": "linear", "factor": 4.0}),
        (Qwen2Config, {"rope_type": "default"}),
    ],
)
def test_rotary_settings_stand_under_their_older_names_too(tmp_path, kind, rotary):
    """Transformers 4 and llama.cpp would use other values without saying so. The model stays the same."""
    run = make_run(tmp_path / "run")
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 64}
    heads = {"num_attention_heads": 2} | ({} if kind is GPTNeoXConfig else {"num_key_value_heads": 2})
    hf_config = kind(**sizes, **heads, rope_parameters={"rope_theta": 500.0, **rotary})
    model = AutoModelForCausalLM.from_config(hf_config)
    hf_config.save_pretrained(run / "model")
    checkpoint = next((run / "checkpoints").iterdir())
    files = [checkpoint / "mp_rank_00_model_states.pt", checkpoint / "state.json"]
    torch.save({"module": model.state_dict()}, files[0])
    manifest.write_manifest(checkpoint, manifest.flush_and_describe(checkpoint, files))
    folder = export(run, tmp_path / "exported")
    config = json.loads((folder / "config.json").read_text())
    theta, part = ("rotary_emb_base", "rotary_pct") if hf_config.model_type == "gpt_neox" else ("rope_theta", "")
    assert config[theta] == 500.0 and config.get(part) == (0.5 if part else None)
    scaling = {"rope_type": "linear", "factor": 4.0} if hf_config.model_type == "llama" else None
    assert config.get("rope_scaling") == scaling
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert again.config.rope_parameters == hf_config.rope_parameters
    tokens = torch.arange(40)[None]
    assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)


def test_a_batched_pipeline_writes_what_it_writes_one_by_one(tmp_path):
    run_with(tmp_path / "run", END, eos_token=END)
    folder = export(tmp_path / "run", tmp_path / "model")
    write = pipeline("text-generation", model=str(folder), device="cpu")
    settings = {"max_new_tokens": 6, "do_sample": False}
    texts = [TEXTS[0], TEXTS[3], TEXTS[0] * 3]
    batched = [found[0]["generated_text"] for found in write(texts, batch_size=3, **settings)]
    assert batched == [write(text, **settings)[0]["generated_text"] for text in texts]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_modes_follow_the_umask(tmp_path, umask):
    run_with(tmp_path / "run", END, eos_token=END)
    before = os.umask(umask)
    try:
        folder = export(tmp_path / "run", tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o666 & ~umask}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize(("length", "is_said"), [(64, True), (2048, False), (4096, False)])
def test_a_context_that_was_not_trained_is_said(tmp_path, length, is_said, capsys):
    """The card says it, and `evaluate` does for a run and for an exported folder."""
    make_run(tmp_path / "run", {"data": {"sequence_length": length}})
    tokenizer_json(tmp_path / "run/tokenizer", END)
    folder = export(tmp_path / "run", tmp_path / "model")
    sentence = f"context of 2,048 tokens is longer than the sequences of {length:,} tokens that it was trained on"
    assert (sentence in (folder / "README.md").read_text()) == is_said
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "text.jsonl").write_text(json.dumps({"text": "a b c"}) + "\n")
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "text.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    (tasks / "mine.yaml").write_text(yaml.safe_dump(task))
    for model in (tmp_path / "run", folder):
        capsys.readouterr()
        assert main(["evaluate", str(model), "--tasks", "mine", "--include-path", str(tasks)]) == 0
        assert (sentence in capsys.readouterr().err) == is_said


def test_prompts_that_were_cut_stand_in_the_card(tmp_path):
    make_run(tmp_path / "run")
    lines = (tmp_path / "run/evaluations.jsonl").read_text().splitlines()
    evaluation = json.loads(lines[0])
    name, task = next(iter(evaluation["tasks"].items()))
    assert "cut from the left" not in (export(tmp_path / "run", tmp_path / "none") / "README.md").read_text()
    task |= {"cut": 3, "samples": 1234}
    (tmp_path / "run/evaluations.jsonl").write_text(json.dumps(evaluation | {"step": 20}) + "\n")
    card = (export(tmp_path / "run", tmp_path / "some") / "README.md").read_text()
    assert f"cut from the left: {name.replace('_', chr(92) + '_')} ({task['num_fewshot']}-shot, 3 of 1,234)" in card
