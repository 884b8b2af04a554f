"""`l2e-ds submit` and lists of runs: what is refused, what is quoted; without SLURM."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from l2e_ds import cli
from l2e_ds.config.sections import slurm_seconds
from l2e_ds.distributed.slurm_step import rendezvous_port
from l2e_ds.errors import ConfigError
from l2e_ds.slurm import job as slurm_job
from l2e_ds.slurm import sbatch

RUN = """
model: {name: pythia-14m, vocab_size: 300, num_layers: 4, hidden_size: 32, num_heads: 2}
data: {source: stdlib, train_tokenizer: 300, sequence_length: 16}
training: {steps: 4, global_batch: 8, micro_batch: 2}
"""
OPTIONS = ["--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "2", "--time", "1:00:00"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)
    return tmp_path


def refused(capsys, *words: str) -> str:
    """Return the one line of a refusal, which leaves no file behind."""
    before = set(os.listdir())
    assert cli.main(["submit", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("l2e-ds: error: ") and said.err.count("\n") == 1 and not said.out
    assert set(os.listdir()) == before
    return said.err


def test_dry_run_prints_the_script_and_writes_nothing(here, capsys):
    """bash and sbatch read every word of the script as it was given, for any name of the run."""
    name = "runs/; rm -rf x '\"$(touch pwned) %j"
    image = "--container-image=/images/my $image.sqsh"
    overrides = [f"training.run_directory={name}", "--dry-run", "--qos=high"]
    overrides += [f"--srun-option={image}", "--srun-option=--mpi=pmix"]
    assert cli.main(["submit", "run.yaml", *overrides, *OPTIONS, "--", "--comment=a b", "--exclusive"]) == 0
    text = capsys.readouterr().out
    assert os.listdir() == ["run.yaml"]
    options = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert ["--comment=a b", "--exclusive"] in options
    given = dict(words[0].removeprefix("--").split("=", 1) for words in options if len(words) == 1 and "=" in words[0])
    assert given["output"] == f"{here}/{name}/submit-1/slurm-%j.log".replace("%j/", "%%j/")
    assert (given["nodes"], given["ntasks-per-node"], given["time"]) == ("2", "2", "1:00:00")
    assert (given["qos"], given["signal"], given["job-name"]) == ("high", "B:USR1@300", "rm_-rf_x_touch_pwned_j")
    assert "gpus" not in text and ["--requeue"] in options
    # bash itself, with the interpreter replaced by one that prints its words
    echo = here / "echo"
    echo.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    echo.chmod(0o755)
    script = text.replace(shlex.quote(sys.executable), shlex.quote(str(echo)))
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[:6] == ["-m", "l2e_ds.slurm", "--restarts", "3", f"{name}/submit-1/run.yaml", "--"]
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=30", image, "--mpi=pmix"]
    assert words[6:] == [*srun, str(echo), "-m", "l2e_ds.train"]
    assert sorted(os.listdir()) == ["echo", "run.yaml"]

    assert cli.main(["submit", "run.yaml", "--gpus-per-node=4", "--time=2-0", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=4\n" in text and "#SBATCH --ntasks-per-node=4\n" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "0"], "--nodes: got 0"),
        (["--gpus-per-node", "-1"], "--gpus-per-node: got -1"),
        (["--gpus-per-node", "8"], "--tasks-per-node: is for --gpus-per-node 0"),
        (["--tasks-per-node", "0"], "--tasks-per-node: got 0"),
        (["--time", "soon"], "--time: got 'soon'"),
        (["--time", "00:05:00"], "--signal-seconds: got 300, allowed: 1 to less than the 300 s"),
        (["--job-name", "x\n#SBATCH --wrap=true"], "--job-name: got"),
        (["--partition", "a b"], "--partition: got 'a b'"),
        (["--restarts", "-1"], "--restarts: got -1"),
        (["--srun-option=image"], "--srun-option: got 'image', allowed: an option of srun"),
        (["--srun-option=--comment=a\nb"], "--srun-option: got '--comment=a\\nb'"),
        (["training.run_directory='a\nb'"], "submit: got"),
        (["training.run_directory=a\\b"], "backslash"),
        (["training.steps=0"], "training.steps"),
        (["training.global_batch=6"], "training.global_batch: 6 is not a multiple"),
        (["training.run_directory=runs/hf_abcdefghij", "--time", "30:00"], "the value of HF_TOKEN"),
        (["--", "words"], "--: got 'words', allowed: options of sbatch, which begin with -"),
        (["--", "--comment=a\nb"], "--: got"),
    ],
)
def test_refused_in_one_line(here, capsys, monkeypatch, words, said):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setattr(sbatch.shutil, "which", lambda _: "/bin/false")
    assert said in refused(capsys, "run.yaml", *OPTIONS, *words)


def test_a_run_directory_of_two_lines_is_refused(here, capsys, monkeypatch):
    monkeypatch.setattr(sbatch.shutil, "which", lambda _: "/bin/false")
    (here / "run.yaml").write_text(RUN.replace("steps: 4", 'steps: 4, run_directory: "a\\nb"'))
    assert "training.run_directory: got 'a\\nb'" in refused(capsys, "run.yaml", *OPTIONS)


def test_without_sbatch(here, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    assert "sbatch is not on PATH" in refused(capsys, "run.yaml", *OPTIONS)


def test_time_limits():
    limits = {"5": 300, "1:30": 90, "1:00:00": 3600, "1-0": 86400, "1-1:1": 90060, "1-00:00:01": 86401}
    assert {limit: slurm_seconds(limit) for limit in limits} == limits


def test_lists_of_runs(here):
    path = here / "list"
    path.write_text("# two runs\n\nrun.yaml training.steps=2 'training.run_directory=a $(touch pwned)'\nrun.yaml # b\n")
    assert slurm_job.list_entry(path, 0) == ["run.yaml", "training.steps=2", "training.run_directory=a $(touch pwned)"]
    assert slurm_job.list_entry(path, 1) == ["run.yaml"]
    with pytest.raises(ConfigError, match=r"has 2 runs, there is none for array task 2"):
        slurm_job.list_entry(path, 2)
    for line, said in {
        "run.yaml ; touch pwned": r"list:1: override ';'",
        "run.yaml $(touch pwned)": r"list:1: override '\$\(touch'",
        "--restarts=99 run.yaml": r"list:1: got '--restarts=99'",
        "run.yaml 'training.steps=1": r"list:1: No closing quotation",
        "run.yaml training.steps=3\nrun.yaml training.steps=4": r"list:2: writes to .*runs/run, as line 1 does",
        "no-such.yaml": r"list:1: no-such.yaml: No such file",
    }.items():
        path.write_text(line + "\n")
        with pytest.raises(ConfigError, match=said):
            slurm_job.list_entry(path, 0)
    assert sorted(os.listdir()) == ["list", "run.yaml"]


def test_ports_of_neighbouring_jobs_and_steps():
    jobs, steps = range(123456, 123456 + 64), range(16)
    ports = {rendezvous_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}) for job in jobs for step in steps}
    assert len(ports) == len(jobs) * len(steps)
    assert min(ports) >= 10_000 and max(ports) < 32_768
