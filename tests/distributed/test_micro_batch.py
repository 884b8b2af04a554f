"""`training.micro_batch: auto` on two ranks: found in child processes, remembered, without a trace in the run."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from l2e_ds.checkpoint.weights import checkpoint_weights
from l2e_ds.distributed.launch import free_port
from tests.distributed.test_runs import timeless
from tests.processes import REPOSITORY


@pytest.fixture(scope="module")
def runs(run_ranks, tmp_path_factory):
    output = tmp_path_factory.mktemp("micro-batches")
    (output / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{i} lights along the coast, {i * i} in all. " * 8}) for i in range(60))
    )
    content = {
        "model": {"name": "pythia-14m", "vocab_size": 320, "num_layers": 4, "hidden_size": 32, "num_heads": 2},
        "data": {"source": "jsonl", "path": str(output / "text.jsonl"), "train_tokenizer": 320, "sequence_length": 16},
        "optimizer": {"peak_learning_rate": 3e-3, "schedule_steps": 12},
        "training": {"steps": 4, "global_batch": 8, "precision": "fp32", "evaluate_every": 2},
        "inhibition": {"coefficient": 0.01, "statistics_window": 5},
        "checkpoint": {"every": 2},
        "logging": {"every": 1, "progress": False},
    }
    content["data"] |= {"held_out": 0.1, "workers": 1, "cache": str(output / "cache")}
    (output / "run.yaml").write_text(yaml.safe_dump(content))
    run_ranks(2, REPOSITORY / "tests/distributed/workers/micro_batches.py", output, *(free_port() for _ in range(5)))
    return output


@pytest.mark.full
def test_a_run_is_that_of_the_number_given_by_hand_to_the_bit(runs, metric_lines):
    auto, given = runs / "auto", runs / "given"
    for kind in ("train", "evaluation"):
        assert timeless(metric_lines(auto, kind)) == timeless(metric_lines(given, kind))
    assert len(metric_lines(auto)) == 4
    first, second = (run / "checkpoints/step00000004" for run in (auto, given))
    weights, others = checkpoint_weights(first, "fp32"), checkpoint_weights(second, "fp32")
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    for file in ("inhibition", "rng-rank00000", "rng-rank00001"):
        ours, theirs = (load_file(path / f"{file}.safetensors") for path in (first, second))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.full
def test_what_a_run_keeps_names_the_number(runs):
    number = json.loads((runs / "auto/micro_batch.json").read_text())["micro_batch"]
    assert yaml.safe_load((runs / "auto/config.yaml").read_text())["training"]["micro_batch"] == number
    ds = json.loads((runs / "auto/deepspeed.json").read_text())
    assert ds == json.loads((runs / "given/deepspeed.json").read_text())
    assert ds["train_micro_batch_size_per_gpu"] == number
    assert ds["train_micro_batch_size_per_gpu"] * ds["gradient_accumulation_steps"] == 4


@pytest.mark.full
def test_the_second_start_remembers(runs):
    number = json.loads((runs / "auto/micro_batch.json").read_text())["micro_batch"]
    first, second = ((runs / f"{name}-rank0.txt").read_text() for name in ("auto", "again"))
    assert f"l2e-ds: micro-batch {number} (of 1, 2, 4; " in first
    assert f"l2e-ds: micro-batch {number} (remembered in {runs / 'auto/micro_batch.json'})" in second
    assert "micro-batch" not in (runs / "again-rank1.txt").read_text()
    assert "changed since that checkpoint: training.micro_batch" not in second


@pytest.mark.full
def test_a_killed_child_costs_its_size_and_nothing_else(runs):
    """As by the kernel, out of memory: the other rank's child, which waits for it in a collective, is ended too."""
    found = [json.loads((runs / f"killed-rank{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0]["micro_batch"] == 1
    assert list(found[0]["measured"]) == ["1"]


@pytest.mark.full
def test_a_limit_is_kept(runs):
    found = [json.loads((runs / f"limited-rank{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0]["micro_batch"] == 2
    assert found[0]["measured"]["2"]["peak_bytes"] <= found[0]["usable_bytes"]
