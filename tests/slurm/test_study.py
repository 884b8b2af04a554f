"""A study as an array job of a real SLURM: trained, evaluated, collected; not submitted twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.processes import REPOSITORY

TASK = """
task: tiny_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


@pytest.mark.full
def test_an_array_of_runs(slurm, tmp_path):
    base = {
        "model": {"name": "pythia-14m", "vocab_size": 300, "num_layers": 4, "hidden_size": 32, "num_heads": 2},
        "data": {"source": "stdlib", "train_tokenizer": 300, "max_documents": 20, "max_tokens": 20000},
        "training": {"steps": 6, "global_batch": 8, "micro_batch": 2, "precision": "fp32", "evaluate_every": 6},
        "logging": {"every": 1, "progress": False},
    }
    base["data"] |= {"sequence_length": 16, "held_out": 0.1}
    study = {
        "title": "Two methods",
        "base": "run.yaml",
        "seeds": [1],
        "factors": {"inhibition.method": ["none", "l2e"]},
        "baseline": {"inhibition.method": "none"},
        "evaluate": [{"tasks": ["tiny_sums"], "num_fewshot": 0, "include_path": ["tasks"]}],
    }
    (tmp_path / "tasks").mkdir()
    document = {"question": "two and two make", "choices": ["4", "5"], "answer": 0}
    (tmp_path / "tasks/tiny.jsonl").write_text(f"{json.dumps(document)}\n" * 8)
    (tmp_path / "tasks/tiny.yaml").write_text(TASK.format(documents=tmp_path / "tasks/tiny.jsonl"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "methods.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    environment = {
        **slurm,
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{slurm['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "hf"),
    }

    def call(*words: str, code: int = 0) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    command = [sys.executable, "-m", "l2e_ds.cli", "study", "methods.yaml"]
    options = ["--slurm", "--gpus-per-node", "0", "--tasks-per-node", "1", "--time", "20:00", "--", "--hold"]
    said = call(*command, *options)
    job = re.search(r"job +(\d+): 2 tasks of 1 nodes x 1 ranks", said)[1]
    folder = tmp_path / "studies/methods"
    assert {path.name for path in (folder / "slurm-1").iterdir()} - {"code.diff"} == {
        *("study.sbatch", "list", "code.json", "job")
    }
    refusal = call(*command, *options, code=2)
    assert f"tasks of the array job {job} are still queued or running (slurm-1)" in refusal
    assert not (folder / "slurm-2").exists()

    call("scontrol", "release", job)
    deadline = time.monotonic() + 800
    states: list[str] = []
    while not states or any(state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING") for state in states):
        states = re.findall(r"JobState=(\w+)", call("scontrol", "show", "job", job, "--oneliner"))
        logs = "\n".join(path.read_text()[-3000:] for path in (folder / "slurm-1").glob("slurm-*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.5)
    assert states == ["COMPLETED", "COMPLETED"], logs

    # the tasks have brought the results up to date themselves, the last one completely
    table = pd.read_csv(folder / "results.csv").set_index("run")
    assert table["state"].tolist() == ["done", "done"]
    assert table["tiny_sums/0-shot/acc"].notna().all() and table["held_out_loss"].notna().all()
    start = json.loads((folder / "runs/l2e-seed1/metrics.jsonl").read_text().splitlines()[0])
    assert (start["kind"], start["launcher"]) == ("start", "srun")
