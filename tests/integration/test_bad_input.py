"""What a user can get wrong ends in one line, exit code 2, and nothing written: the real main(), in this process."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest

from l2e_ds.errors import ConfigError
from l2e_ds.train import main
from l2e_ds.training.preflight import preflight


def broken_pair(folder: Path) -> None:
    from l2e_ds.data.indexed import write_pair

    write_pair(folder / "pair", (np.arange(start, start + 50, dtype=np.uint16) for start in range(100)), np.uint16)
    with open(folder / "pair.bin", "r+b") as file:
        file.truncate(1000)


def large_token(folder: Path) -> None:
    from l2e_ds.data.indexed import write_pair

    write_pair(
        folder / "large",
        (np.full(50, 999 if start == 37 else start, dtype=np.uint16) for start in range(100)),
        np.uint16,
    )


def write_json(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# name: (overrides from the test's folder, what the line must say)
CASES = {
    "unknown key": (lambda t: ["training.stesp=3"], ["training.stesp", "unknown key", "'steps'"]),
    "unknown section": (lambda t: ["trainin.steps=3"], ["trainin", "unknown key", "'training'"]),
    "wrong type": (lambda t: ["training.steps=many"], ["training.steps", "'many'", "integer"]),
    "out of range": (lambda t: ["inhibition.target_share=1.5"], ["inhibition.target_share", "1.5", "less than 1"]),
    "bad choice": (lambda t: ["inhibition.reduce=never"], ["inhibition.reduce", "'never'", "'step' or 'forward'"]),
    "bad override": (lambda t: ["steps=3"], ["steps=3", "section.key=value"]),
    "batch product": (lambda t: ["training.micro_batch=3"], ["training.global_batch", "8", "allowed micro-batches"]),
    "missing corpus": (lambda t: [f"data.path={t / 'nowhere'}"], ["data.path", "nowhere"]),
    "empty corpus": (lambda t: [f"data.path={write_json(t / 'e.txt', '  ')}"], ["data.path", "e.txt", "no text"]),
    "missing tokenizer": (
        lambda t: ["data.train_tokenizer=null", f"data.tokenizer={t / 'no.json'}"],
        ["data.tokenizer", "no.json"],
    ),
    "large vocabulary": (lambda t: ["model.vocab_size=300"], ["data.train_tokenizer", "320", "300"]),
    "layer out of range": (lambda t: ["inhibition.layers=[1,4]"], ["inhibition.layers", "4", "0 to 3"]),
    "unknown model": (lambda t: ["model.name=pythia-3m"], ["model.name", "pythia-3m", "pythia-14m"]),
    "pretrained missing": (
        lambda t: [
            *(f"model.{key}=null" for key in ("name", "vocab_size", "num_layers", "hidden_size", "num_heads")),
            f"model.pretrained={t / 'nowhere'}",
        ],
        ["model.pretrained", "nowhere"],
    ),
    "fp16 without support": (lambda t: ["training.precision=fp16"], ["training.precision", "fp16", "allowed: fp32"]),
    "fp16 with ZeRO-0": (
        lambda t: ["training.precision=fp16", "deepspeed.config=ds_configs/zero0.json"],
        ["training.precision", "fp16", "stage"],
    ),
    "missing DeepSpeed JSON": (lambda t: ["deepspeed.config=zero9.json"], ["deepspeed.config", "zero9.json"]),
    "misspelt DeepSpeed key": (
        lambda t: [f"deepspeed.config={write_json(t / 'ds.json', {'zero_optimisation': {}})}"],
        ["deepspeed.config", "zero_optimisation", "zero_optimization"],
    ),
    "misspelt nested DeepSpeed key": (
        lambda t: [f"deepspeed.config={write_json(t / 'ds.json', {'zero_optimization': {'stag': 1}})}"],
        ["deepspeed.config", "stag"],
    ),
    "DeepSpeed JSON is no JSON": (
        lambda t: [f"deepspeed.config={write_json(t / 'ds.json', '{bad')}"],
        ["deepspeed.config", "ds.json:1"],
    ),
    "two values": (
        lambda t: [f"deepspeed.config={write_json(t / 'ds.json', {'train_batch_size': 16})}"],
        ["training.global_batch", "8", "train_batch_size: 16"],
    ),
    "truncated .bin": (
        lambda t: [
            broken_pair(t) or "data.source=indexed",
            f"data.path={t / 'pair'}",
            "data.train_tokenizer=null",
        ],
        ["pair.bin", "1000"],
    ),
    "token past the vocabulary": (
        lambda t: [
            large_token(t) or "data.source=indexed",
            f"data.path={t / 'large'}",
            "data.train_tokenizer=null",
        ],
        ["large.bin", "999", "320"],
    ),
    "stream with an end": (
        lambda t: ["data.source=hub", f"data.path={t / 'corpus'}", "data.streaming=true", "data.max_tokens=1000"],
        ["data.max_tokens", "data.streaming"],
    ),
    "text that is missing": (
        lambda t: [f"evaluation.texts=[{{name: own, source: text, path: {t / 'no.txt'}}}]"],
        ["evaluation.texts.0.path", "no.txt"],
    ),
    "empty text": (
        lambda t: [f"evaluation.texts=[{{name: own, source: text, path: {write_json(t / 'e.txt', '  ')}}}]"],
        ["evaluation.texts.0.path", "e.txt", "no text"],
    ),
    "text of tokens": (
        lambda t: ["evaluation.texts=[{name: own, source: indexed, path: pair}]"],
        ["evaluation.texts.0.source", "'indexed'", "'jsonl'"],
    ),
    "streamed text": (
        lambda t: ["evaluation.texts=[{name: own, source: stdlib, streaming: true}]"],
        ["evaluation.texts.0.streaming", "got True", "allowed: False"],
    ),
    "two texts of one name": (
        lambda t: ["evaluation.texts=[{name: own, source: stdlib}, {name: own, source: stdlib}]"],
        ["evaluation.texts.1.name", "'own'", "evaluation.texts.0"],
    ),
    "misspelt key of a text": (
        lambda t: ["evaluation.texts=[{name: own, source: text, paht: x}]"],
        ["evaluation.texts.0.paht", "unknown key", "'path'"],
    ),
    "text without held-out text": (
        lambda t: ["evaluation.texts=[{name: own, source: stdlib}]", "data.held_out=0"],
        ["data.held_out", "got 0 with evaluation.texts"],
    ),
    "text that is never evaluated": (
        lambda t: ["evaluation.texts=[{name: own, source: stdlib}]", "training.evaluate_every=0"],
        ["training.evaluate_every", "got 0 with evaluation.texts"],
    ),
    "guard that never judges": (
        lambda t: ["inhibition.guard=stop", "training.evaluate_every=0"],
        ["training.evaluate_every", "got 0 with inhibition.guard: stop"],
    ),
    "guard without held-out text": (
        lambda t: ["inhibition.guard=stop", "data.held_out=0"],
        ["data.held_out", "got 0 with inhibition.guard: stop"],
    ),
    "samples that no prompt can begin": (
        lambda t: ["evaluation.samples=[a]", "evaluation.sample_tokens=5000"],
        ["evaluation.sample_tokens", "got 5000, allowed: below 2048"],
    ),
    "samples that are never written": (
        lambda t: ["evaluation.samples=[a]", "training.evaluate_every=0"],
        ["training.evaluate_every", "got 0 with evaluation.samples"],
    ),
    "large prime batch": (
        lambda t: ["training.global_batch=1000000007", "training.micro_batch=2"],
        ["training.global_batch", "1000000007", "allowed micro-batches: 1"],
    ),
    "block is no object": (
        lambda t: [f"deepspeed.config={write_json(t / 'ds.json', {'bf16': True})}"],
        ["bf16", "true", "object"],
    ),
    "optimizer without type": (
        lambda t: [f"deepspeed.config={write_json(t / 'ds.json', {'optimizer': {}})}"],
        ["optimizer.type", "required"],
    ),
    "Muon where DeepSpeed clips its updates": (
        lambda t: ["optimizer.name=muon", "deepspeed.config=ds_configs/zero1.json"],
        ["optimizer.name", "got muon in fp32", "zero1.json", "stage 1", "allowed: stage 0"],
    ),
    "8-bit AdamW without bitsandbytes": (
        lambda t: ["optimizer.name=adamw-8bit"],
        ["optimizer.name", "adamw-8bit", "pip install bitsandbytes"],
    ),
    "misspelt optimizer parameter": (
        lambda t: [
            "deepspeed.config="
            + write_json(t / "ds.json", {"optimizer": {"type": "AdamW", "params": {"weight_decy": 1e-3}}})
        ],
        ["optimizer.params", "weight_decy", "weight_decay"],
    ),
    "misspelt block key": (
        lambda t: [f"deepspeed.config={write_json(t / 'ds.json', {'data_types': {'grad_acum_dtype': 'fp32'}})}"],
        ["data_types", "grad_acum_dtype", "grad_accum_dtype"],
    ),
    "run directory is a file": (
        lambda t: [f"training.run_directory={t / 'run.yaml'}"],
        ["training.run_directory", "run.yaml"],
    ),
    "resume from nowhere": (lambda t: [f"training.resume={t / 'nowhere'}"], ["training.resume", "nowhere"]),
    "huge seed": (lambda t: ["training.seed=99999999999999999999"], ["training.seed", "less than"]),
    "zero ranks": (lambda t: ["--dry-run", "--ranks", "0"], ["--ranks", "0"]),
    "ranks without dry run": (lambda t: ["--ranks", "4"], ["--ranks", "--dry-run"]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_code_2(name, run_file, tmp_path, capsys, monkeypatch, no_fp16):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make, words = CASES[name]
    overrides = make(tmp_path)
    assert main([str(run_file), *overrides]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    assert error[0].startswith("l2e-ds: error: ")
    for word in words:
        assert word in error[0]
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()
    import torch.distributed

    assert not torch.distributed.is_initialized()


def test_missing_and_broken_run_files(tmp_path, capsys):
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    (tmp_path / "twice.yaml").write_text("model:\n  name: pythia-14m\nmodel:\n  name: pythia-31m\n")
    assert main([str(tmp_path / "twice.yaml")]) == 2
    assert "twice.yaml:3: key 'model' is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "expected numbers"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_LOCAL_RANK"),
        ({"PMI_SIZE": "2"}, "PMI_RANK"),
        ({"PMIX_RANK": "0"}, "the number of ranks is not"),
        ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, "rank 0 of 0"),
    ],
)
def test_contradicting_launcher(run_file, capsys, monkeypatch, environment, words):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert main([str(run_file)]) == 2
    error = capsys.readouterr().err
    assert words in error


def test_what_only_one_host_lacks_is_said_by_that_host(run_file, tmp_path, capsys, monkeypatch):
    """Before the ranks meet nobody knows whether the others, too, are without a file: one rank of each host says so."""
    rank = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for local_rank, lines in (("0", 1), ("1", 0)):
        for key, value in (rank | {"LOCAL_RANK": local_rank}).items():
            monkeypatch.setenv(key, value)
        assert main([str(run_file), f"data.path={tmp_path / 'nowhere'}"]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines
        assert all(line.startswith(f"l2e-ds: error: rank 2 on {socket.gethostname()}: data.path: ") for line in said)


def test_dry_run_writes_nothing(run_file, tmp_path, capsys):
    assert main([str(run_file), "--dry-run", "--ranks", "2", "optimizer.peak_learning_rate=4e-3"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "8 sequences = 2 micro-batch x 2 ranks x 2 accumulation steps; 128 tokens a step",
        "layers       1, 2 of 0-3",
        "neurons      2 x 128 = 256",
        "peak_learning_rate: 0.004",
        "threshold + regulariser",
    ):
        assert words in printed
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_a_run_with_checkpoints_needs_no_longer_what_it_began_from(run_file, tmp_path):
    overrides = [f"training.resume={tmp_path / 'nowhere'}"]
    with pytest.raises(ConfigError, match="training.resume: no such folder: .*nowhere"):
        preflight(run_file, overrides, 1, this_machine=True)
    (tmp_path / "run/checkpoints/step00000010").mkdir(parents=True)
    assert preflight(run_file, overrides, 1, this_machine=True).config.training.resume.endswith("nowhere")
