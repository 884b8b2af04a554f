"""What a run remembers: random states, and lines of metrics that are newer than the checkpoint."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, Qwen3Config

from l2e_ds.checkpoint.state import reseed, rng_state, seed_everything, set_rng_state
from l2e_ds.models.counts import attention_width, flops_per_token
from l2e_ds.run_directory.metrics import keep_lines, read_metrics

CPU = torch.device("cpu")


def draw() -> list:
    """Return numbers from every generator, of every kind that keeps something between calls."""
    return [
        [random.random() for _ in range(3)],
        [random.gauss(0, 1) for _ in range(3)],
        np.random.rand(3).tolist(),
        np.random.standard_normal(3).tolist(),
        torch.rand(3).tolist(),
        torch.randn(3).tolist(),
    ]


@pytest.mark.parametrize("pending", [0, 1])
@pytest.mark.parametrize("used", [0, 1, 5000])
def test_rng_round_trip(pending, used, tmp_path):
    """All generators go on bit-identically, through a file too; `pending`: the second half of a Gaussian pair,
    which Python, NumPy and torch keep for the next call; `used`: another place within their blocks of words."""
    seed_everything(7, rank=1)
    for _ in range(used):
        random.random(), np.random.rand(), torch.rand(())
    for _ in range(pending):
        random.gauss(0, 1), np.random.standard_normal(), torch.randn(())
    save_file(rng_state(CPU), tmp_path / "rng.safetensors")
    expected = draw()
    seed_everything(99, rank=0)
    assert draw() != expected
    set_rng_state(load_file(tmp_path / "rng.safetensors"), CPU)
    assert draw() == expected


def test_taking_the_state_draws_nothing():
    """`rng_state` does not change any generator."""
    seed_everything(7, rank=1)
    expected = draw()
    seed_everything(7, rank=1)
    rng_state(CPU)
    assert draw() == expected


def test_reseeded_streams_follow_from_seed_step_and_rank():
    """Each of the three arguments changes the random numbers; the same three give the same numbers."""
    drawn = []
    for triple in [(7, 100, 0), (8, 100, 0), (7, 101, 0), (7, 100, 1), (100, 7, 0), (7, 100, 0)]:
        reseed(*triple)
        drawn.append(str(draw()))
    assert drawn[-1] == drawn[0]
    assert len(set(drawn)) == 5


def test_seeds_differ_between_ranks_and_seeds():
    """Every (seed, rank) has random numbers of its own, always the same."""

    def drawn(seed: int, rank: int) -> list:
        seed_everything(seed, rank)
        return draw()

    streams = [drawn(1, 0), drawn(1, 1), drawn(5, 0)]
    for i in range(len(streams[0])):
        assert len({str(stream[i]) for stream in streams}) == 3
    assert drawn(1, 1) == streams[1]


# --- metrics.jsonl -----------------------------------------------------------------------------------------------

LINES = [
    {"kind": "start", "step": 0},
    {"kind": "train", "step": 10, "lm_loss": 2.5},
    {"kind": "evaluation", "step": 10, "held_out_loss": None},
    {"kind": "train", "step": 20, "lm_loss": 2.25},
    {"kind": "train", "step": 30, "lm_loss": 2.0},
]


@pytest.mark.parametrize("step", [0, 9, 10, 20, 25, 30, 1000])
@pytest.mark.parametrize("end", ["\n", "", '\n{"kind": "train", "st', '\n{"kind": "train"}\n', "\n\n"])
def test_keep_lines(step, end, tmp_path):
    """Lines up to the step stay as they were; later ones and a last line cut off by a kill are removed."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES) + end, encoding="utf-8")
    keep_lines(path, lambda _, own: own <= step)
    expected = [line for line in LINES if line["step"] <= step]
    assert path.read_text(encoding="utf-8") == "".join(json.dumps(line) + "\n" for line in expected)
    assert read_metrics(path, "train") == [line for line in expected if line["kind"] == "train"]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_keep_lines_without_a_file(tmp_path):
    """A fresh run has no metrics yet, and no file is made."""
    keep_lines(tmp_path / "metrics.jsonl", lambda *_: True)
    assert list(tmp_path.iterdir()) == []


def test_keep_lines_of_an_empty_file(tmp_path):
    """An empty file stays empty."""
    path = tmp_path / "metrics.jsonl"
    path.touch()
    keep_lines(path, lambda *_: True)
    assert path.read_text(encoding="utf-8") == ""


def test_width_of_the_attention():
    """Where the heads do not add up to the hidden size, theirs."""
    assert attention_width(GPTNeoXConfig(hidden_size=96, num_attention_heads=4)) == 96
    assert attention_width(Qwen3Config(hidden_size=96, num_attention_heads=4, head_dim=64)) == 256


def test_flops_per_token_counts_the_matrix_products():
    """6 P + 6 L h T: two operations a weight and token forward, twice that backward; half of full attention's."""
    layers, hidden, length, vocabulary = 3, 64, 128, 500
    matrices = layers * 12 * hidden * hidden + vocabulary * hidden
    forward = 2 * matrices
    for position in range(length):  # scores and weighted sum over the positions seen so far, a token on average
        forward += layers * 2 * 2 * hidden * (position + 1) / length
    assert flops_per_token(matrices, layers, hidden, length) == pytest.approx(3 * forward, rel=0.01)
