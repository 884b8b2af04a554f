"""`python -m benchmarks throughput` at a tiny size on two real ranks. Nothing here depends on how fast anything is."""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import sys

import pytest

from benchmarks import throughput
from benchmarks.__main__ import main
from benchmarks.contenders import CONTENDERS, OURS, PLAIN
from l2e_ds.errors import L2EError
from tests.processes import environment, finish

TINY = ("--models", "pythia-14m", "model.num_layers=2", "model.hidden_size=32", "model.num_heads=2")
TINY += ("model.vocab_size=64", "--sequence-length", "16", "--micro-batch", "2")


@pytest.mark.full
def test_two_ranks_train_alike_and_are_compared(tmp_path):
    output = tmp_path / "out"
    words = ["throughput", *TINY, "--accumulation", "2", "--steps", "2", "--rounds", "1", "--output", output]
    codes, said = finish("-m", "benchmarks", *words, ranks=2)
    assert codes == [0, 0], said[-4000:]

    record = json.loads((output / "throughput.json").read_text())
    assert record["ranks"] == 2 and {"torch", "deepspeed", "transformers", "accelerate"} <= record["versions"].keys()
    assert record["date"] and record["machine"] and record["options"]["overrides"][0] == "model.num_layers=2"
    found = record["models"]["pythia-14m"]
    assert found["tokens_per_step"] == 2 * 2 * 2 * 16
    assert found["contenders"].keys() == CONTENDERS.keys()
    for rounds in found["contenders"].values():
        assert len(rounds) == 1
        for one in rounds:
            assert one["peak_memory_bytes"] > one["before_building_bytes"] > 2**20
            assert len(one["step_seconds"]) == 2 and all(seconds > 0 for seconds in one["step_seconds"])
            assert sum(one["step_seconds"]) == pytest.approx(one["seconds"])
            assert one["tokens_per_second"] == pytest.approx(2 * 128 / one["seconds"])
            assert "mfu" not in one and one["precision"] == "fp32"

    # the same weights, batches, gradients and optimizer: to the last digits
    plain = [rounds[0] for name, rounds in found["contenders"].items() if name != OURS]
    for key in ("first_loss", "last_loss"):
        assert [one[key] for one in plain] == pytest.approx([plain[0][key]] * 3, rel=1e-5)
    assert all(one["last_loss"] < one["first_loss"] for one in plain)
    ours = found["contenders"][OURS][0]
    assert ours["first_loss"] == pytest.approx(plain[0]["first_loss"], rel=1e-6)
    assert ours["last_loss"] != plain[0]["last_loss"], "the method did nothing"

    assert found["ratios"].keys() == {OURS, PLAIN}
    for one, ratios in found["ratios"].items():
        for other, values in ratios.items():
            pairs = zip(found["contenders"][one], found["contenders"][other], strict=True)
            assert values == pytest.approx([their["seconds"] / our["seconds"] for our, their in pairs])

    table = (output / "throughput.md").read_text()
    assert table in said
    assert str(tmp_path) not in table and socket.gethostname() not in table.split()
    ratio = statistics.median(found["ratios"][OURS]["Hugging Face Trainer"])
    assert re.search(rf"^\| Hugging Face Trainer \|.*\| {ratio:.2f} \(", table, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--models", "pythia-13m"], "--models: got 'pythia-13m', allowed: pythia-14m"),
        (["--models", "model.num_layers=2"], "--models: got none"),
        (["--steps", "0"], "--steps: got 0, allowed: an integer >= 1"),
        (["--sequence-length", "1"], "--sequence-length: got 1"),
        (["--precision", "fp8"], "training.precision: got 'fp8'; must be 'auto', 'fp32', 'bf16' or 'fp16'"),
        (["--method", "l3e"], "inhibition.method: got 'l3e'; must be 'none', 'l2e' or 'memel'"),
        (["--deepspeed", "none.json"], "--deepspeed: no such file: none.json"),
        (["--precision", "fp16", "--deepspeed", "ds_configs/zero0.json"], "training.precision: got fp16"),
        (["training.steps=5"], "override 'training.steps=5': allowed: section.key=value"),
        (["model.layers=5"], "model.layers: unknown key"),
        (["model.num_heads=7"], "model.num_heads: 7 heads"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, says, capsys, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert main(["throughput", *words]) == 2
    said = capsys.readouterr()
    assert says in said.err and len(said.err.splitlines()) == 1 and said.out == ""


def test_a_folder_in_use_is_refused(tmp_path, launch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept").touch()
    started = launch(sys.executable, "-m", "benchmarks", "throughput", *TINY, "--output", tmp_path / "out")
    assert started.end() == 2
    (line,) = started.said().splitlines()
    assert line.startswith("l2e-ds: error: --output: ") and line.endswith("is not an empty folder")


@pytest.mark.parametrize("launcher", ["torchrun or deepspeed", "srun"])
def test_a_contender_finds_its_place_not_its_parents_rendezvous(launcher, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the parent's own; nothing was given
    found = throughput.child_environment(launcher, 0, None)
    assert "TORCHELASTIC_USE_AGENT_STORE" not in found and "DS_ACCELERATOR" not in found
    assert [name in found for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == [launcher != "srun"] * 3
    assert int(found["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)))


@pytest.mark.full
@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("inhibition", {"layers": [9]}, r"inhibition\.layers: got 9, allowed: 0 to 1 \(2 layers\)$"),
        ("model", {"attention": "flash_attention_2"}, r"failed:\n(.*\n)*.*flash_attn"),
    ],
    ids=["what it refuses itself", "what breaks it"],
)
def test_a_contender_that_fails_ends_all(tmp_path, section, values, said):
    """The error names the contender and its reason."""
    content = {
        "model": {"name": "pythia-14m", "num_layers": 2, "hidden_size": 32, "num_heads": 2, "vocab_size": 64},
        "data": {"source": "indexed", "path": "none", "sequence_length": 16},
        "training": {"steps": 2, "global_batch": 2, "micro_batch": 2, "precision": "fp32", "evaluate_every": 0},
        "inhibition": {},
    }
    content[section] |= values
    spec = {"contender": OURS, "run": content, "steps": 2}
    with pytest.raises(L2EError, match=rf"^bench: l2e-ds, rank 0: {said}"):
        throughput.measure_once(spec, environment(), tmp_path / "contender")


def test_what_computes_something_else_is_not_compared():
    one = {"precision": "fp32", "first_loss": 4.2, "last_loss": 3.1}
    throughput.refuse_differences("pythia-14m", {"ours": one, "theirs": one | {"first_loss": 4.2001}})
    for wrong in ({"first_loss": 4.25}, {"last_loss": 3.3}, {"last_loss": float("nan")}):
        with pytest.raises(L2EError, match="not the same is computed: .* of theirs"):
            throughput.refuse_differences("pythia-14m", {"ours": one, "theirs": one | wrong})
