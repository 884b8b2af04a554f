"""The quick start as a user runs it, and the same run without inhibition beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RUN_TIMEOUT = 900


def run_script(*overrides: str) -> str:
    environment = {**os.environ, "L2E_DS_VENV": sys.prefix, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        ["bash", str(REPOSITORY / "launch/quickstart.sh"), *overrides],
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def lines(run: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.mark.timeout(2 * RUN_TIMEOUT)
def test_quickstart_learns_and_inhibits(tmp_path):
    """Held-out loss falls; the share is on its target; the top share's MS lies below the baseline's."""
    cache = f"data.cache={tmp_path / 'cache'}"
    table = run_script(f"training.run_directory={tmp_path / 'l2e'}", cache)
    run_script(f"training.run_directory={tmp_path / 'none'}", cache, "inhibition.method=none")
    evaluations, baseline = lines(tmp_path / "l2e", "evaluation"), lines(tmp_path / "none", "evaluation")
    held_out = [line["held_out_loss"] for line in evaluations]
    assert held_out == sorted(held_out, reverse=True)
    assert held_out[-1] < held_out[0] - 2
    assert lines(tmp_path / "l2e", "train")[-1]["observed_share"] == pytest.approx(0.02, rel=0.1)
    assert evaluations[-1]["step"] == baseline[-1]["step"] == 160
    for layer in (2, 3):
        key = f"layer{layer}/top_share_score"
        assert evaluations[0][key] == baseline[0][key]
        assert evaluations[-1][key] < baseline[-1][key]
    starts = lines(tmp_path / "l2e", "start")
    assert [start["step"] for start in starts] == [0, 150]
    assert all(start["ranks"] >= 2 for start in starts)
    first, second = ("layer 2: MS of the top 2%", "layer 3: mean S")
    for words in ("held-out LM loss", "observed share", first, second, "tokens/s", "report.html"):
        assert words in table

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "l2e/export")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "l2e/export")
    assert model.config.vocab_size == len(tokenizer) == 4096
