"""`srun python -m l2e_ds.train` on two nodes of a real SLURM: ranks and rendezvous from SLURM's variables alone."""

import json
import os
import subprocess
import sys

import pytest

from l2e_ds.distributed.launch import find_launch
from l2e_ds.distributed.slurm_step import set_first_host
from l2e_ds.errors import ConfigError
from tests.processes import REPOSITORY
from tests.tolerances import rounding


def test_srun_makes_the_run_of_one_process(slurm, tmp_path):
    run_file = tmp_path / "run.yaml"
    run_file.write_text(
        """
model: {name: pythia-14m, vocab_size: 300, num_layers: 4, hidden_size: 32, num_heads: 2}
data: {source: stdlib, train_tokenizer: 300, max_documents: 20, max_tokens: 20000, sequence_length: 16, held_out: 0.1}
training: {steps: 4, global_batch: 8, micro_batch: 2, precision: fp32, evaluate_every: 2, evaluation_sequences: 10}
inhibition: {coefficient: 0.01}
logging: {every: 1}
"""
    )
    environment = {**slurm, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    train = [sys.executable, "-m", "l2e_ds.train", str(run_file), f"data.cache={tmp_path / 'cache'}"]
    commands = {
        # the same micro-batches as on four ranks: the projected loss depends on that cut (docs/method.md 5.2)
        "alone": [*train, "training.micro_batch=8"],
        "srun": ["srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--kill-on-bad-exit=1", *train],
    }
    losses = {}
    for name, command in commands.items():
        run = tmp_path / name
        done = subprocess.run(
            [*command, f"training.run_directory={run}"], env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["lm_loss"] for line in lines if line["kind"] == "train"]
        start = next(line for line in lines if line["kind"] == "start")
        assert (start["ranks"], start["launcher"]) == {"alone": (1, "alone"), "srun": (4, "srun")}[name]
    assert len(losses["srun"]) == 4
    assert losses["srun"] == pytest.approx(losses["alone"], rel=rounding(4, layers=4, tokens=8 * 16))


def test_a_given_address_needs_no_slurm(monkeypatch):
    """In a container there is no scontrol; the batch script, outside of it, has set the address for all ranks."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    set_first_host()
    assert os.environ["MASTER_ADDR"] == "10.0.0.1"
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        set_first_host()


def test_a_batch_script_without_srun_is_one_process():
    """sbatch gives its script a process id and a task count, but the script is no task of a step."""
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}
    assert (find_launch(batch).launcher, find_launch(batch).size) == ("alone", 1)
    step = {**batch, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"}
    launch = find_launch(step)
    assert (launch.launcher, launch.rank, launch.size, launch.local_rank) == ("srun", 9, 16, 1)
    assert os.environ.get("SLURM_STEP_ID") is None
