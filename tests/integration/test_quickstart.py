"""The quick start as a user runs it: in a small network, or at full size among the full tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.integration.running import lines
from tests.processes import REPOSITORY

SMALL = ("model.hidden_size=32", "model.num_heads=2", "data.sequence_length=32", "data.max_tokens=100000")


def run_script(*overrides: str) -> str:
    """What it says. It finds installed what launch/test.sh has installed."""
    environment = {**os.environ, "L2E_DS_VENV": sys.prefix, "PYTHONUNBUFFERED": "1"}
    command = ["bash", str(REPOSITORY / "launch/quickstart.sh"), *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert "installing" not in done.stdout
    return done.stdout


def check_what_is_left(run: Path, said: str) -> None:
    """Two launches, the second from the first's checkpoint, and the table, report and exported model of the README."""
    starts = lines(run, "start")
    assert [start["step"] for start in starts] == [0, 150]
    assert [start["ranks"] for start in starts] == 2 * [torch.cuda.device_count() or 2]
    first, second = ("layer 2: MS of the top 2%", "layer 3: mean S")
    for words in ("held-out LM loss", "observed share", first, second, "tokens/s", "report.html"):
        assert words in said
    assert "<svg" in (run / "report.html").read_text()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "export")
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert model.config.vocab_size == len(tokenizer) == 4096


@pytest.mark.short
def test_every_step_of_the_script_in_a_small_network(tmp_path):
    run = tmp_path / "small"
    said = run_script(f"training.run_directory={run}", *SMALL)
    check_what_is_left(run, said)
    held_out = [line["held_out_loss"] for line in lines(run, "evaluation")]
    assert held_out[-1] < held_out[0]
    assert "launch/quickstart-none has another model.hidden_size, model.num_heads, data.max_tokens: not comp" in said


@pytest.mark.full
def test_it_learns_and_inhibits(tmp_path):
    """Held-out loss falls; the share is on its target; the top share's MS ends below the baseline's, while the layers
    keep their scale. Said beside the stored baseline, without a warning."""
    run = tmp_path / "l2e"
    said = run_script(f"training.run_directory={run}")
    check_what_is_left(run, said)
    assert "without inhibition         launch/quickstart-none, same seed" in said and "shrank" not in said
    evaluations = lines(run, "evaluation")
    stored = lines(REPOSITORY / "launch/quickstart-none", "evaluation")
    held_out = [line["held_out_loss"] for line in evaluations]
    assert held_out == sorted(held_out, reverse=True)
    assert held_out[-1] < held_out[0] - 2
    assert lines(run, "train")[-1]["observed_share"] == pytest.approx(0.02, rel=0.1)
    assert evaluations[-1]["step"] == stored[-1]["step"] == 160
    (began,) = [line for line in evaluations if line["step"] == 50]
    # until inhibition begins they are the same run, but for the text: this Python's library, about the stored one's
    assert stored[1]["step"] == 50
    assert began["held_out_loss"] == pytest.approx(stored[1]["held_out_loss"], rel=0.03)
    for layer in (2, 3):
        key = f"layer{layer}/top_share_score"
        assert evaluations[-1][key] < 0.97 * stored[-1][key]  # 0.91 and 0.93 on the stored run's text
        assert evaluations[-1][f"layer{layer}/mean_s"] == pytest.approx(stored[-1][f"layer{layer}/mean_s"], rel=0.1)
