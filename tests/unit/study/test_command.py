"""`l2e-ds study`: what is refused in one line before anything starts, and what a dry run says."""

import os
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from l2e_ds import cli
from l2e_ds.distributed.launch import without_launcher
from l2e_ds.errors import ConfigError
from l2e_ds.study.processes import places
from tests.processes import lock_held
from tests.unit.study.folders import BASE, begin_run, begun_study, checkpoint, study_file

SLURM = ["--slurm", "--gpus-per-node", "0", "--tasks-per-node", "2", "--time", "1:00:00"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    study_file(tmp_path)
    return tmp_path


def refused(capsys, *words: str) -> str:
    """Return the one line of a refusal, which leaves no file behind."""
    before = set(os.listdir())
    assert cli.main(["study", "study.yaml", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("l2e-ds: error: ") and said.err.count("\n") == 1 and not said.out, said
    assert set(os.listdir()) == before
    return said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["training.steps=0"],
            "error: override 'training.steps=0': none-seed1: training.steps: got 0; must be greater",
        ),
        (["trainig.steps=0"], "error: override 'trainig.steps=0': none-seed1: trainig: unknown key; did you mean"),
        (["data.path=nowhere"], "none-seed1: data.path: no such file or folder: /"),
        (["training.global_batch=7"], "none-seed1: training.global_batch: 7 is not a multiple"),
        (["inhibition.methd=l2e"], "inhibition.methd: unknown key; did you mean 'method'?"),
        (["training.precision=fp16"], "none-seed1: training.precision: got fp16"),
        (["--devices", "0"], "--devices: got 0, allowed: an integer >= 1"),
        (["--devices", "9999"], "--devices: got 9999, allowed: an integer >= 1 and <= "),
        (["--ranks", "-1"], "--ranks: got -1"),
        (["--devices", "2", "--ranks", "2"], "--ranks: with --devices every run has one rank"),
        (["--restarts", "-1"], "--restarts: got -1"),
        (["--time", "1:00:00"], "--time: is for --slurm"),
        (["--nodes", "1"], "--nodes: is for --slurm"),
        (["--srun-option=--mpi=pmix"], "--srun-option: is for --slurm"),
        (["--signal-seconds", "300"], "--signal-seconds: is for --slurm"),
        (["--directory", ""], "--directory: got '', allowed: a folder"),
        (["--directory", "", "--collect"], "--directory: got '', allowed: a folder"),
        (["--directory", "/proc/x"], "error: --directory: "),
        (["--", "--mem=0"], "--: is for --slurm"),
        (["--slurm"], "--slurm: needs --gpus-per-node"),
        ([*SLURM, "--devices", "2"], "--devices: is for runs on this machine"),
        ([*SLURM, "--nodes", "0"], "--nodes: got 0"),
        (["--collect"], "out/study.json: No such file or directory; no study was begun in out"),
    ],
)
def test_refused_in_one_line(here, capsys, no_fp16, words, said):
    assert said in refused(capsys, *words)


TWO = {"none": {"inhibition.method": "none"}, "l2e": {"inhibition.method": "l2e"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": [1, -1]}, "study.yaml: seeds: none-seed-1: training.seed: got -1; must be "),
        ({"set": {"training.steps": 0}}, "study.yaml: set.training.steps: none-seed1: training.steps: got 0"),
        ({"set": {"trainig.steps": 1}}, "study.yaml: set.trainig.steps: none-seed1: trainig: unknown key"),
        ({"set": {"data.path": "no"}}, "study.yaml: set.data.path: none-seed1: data.path: no such file or folder"),
        # of two keys that do not go together the one that the study gives
        (
            {"set": {"training.micro_batch": 3}},
            "study.yaml: set.training.micro_batch: none-seed1: training.global_batc",
        ),
        (
            {"factors": {"method": TWO | {"l2e": {"inhibition.method": "l3e"}}}},
            "study.yaml: factors.method.l2e: l2e-seed1: inhibition.method: got 'l3e'",
        ),
        (
            {"factors": {"method": TWO, "inhibition.target_share": [0.1, 7]}},
            "study.yaml: factors.inhibition.target_share: none-7-seed1: inhibition.target_share: got 7",
        ),
        ({"directory": "/proc/x"}, "study.yaml: directory: "),
    ],
)
def test_a_mistake_of_the_study_is_told_where_it_stands(here, capsys, changes, said):
    study_file(here, **changes)
    assert refused(capsys).startswith(f"l2e-ds: error: {said}")


def test_a_mistake_of_the_base_is_told_there(here, capsys):
    (here / "base.yaml").write_text(yaml.safe_dump(BASE | {"training": BASE["training"] | {"steps": -3}}))
    assert f"error: none-seed1: {here}/base.yaml: training.steps: got -3" in refused(capsys)


def test_without_sbatch(here, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    assert "--slurm: sbatch is not on PATH" in refused(capsys, *SLURM)


def test_dry_run_says_how_far_runs_are_and_writes_nothing(here, capsys):
    study, runs = begun_study(here)
    begin_run(study, runs, "none-seed1")
    checkpoint(study.directory / "runs/none-seed1", 20)
    begin_run(study, runs, "l2e-seed1")
    checkpoint(study.directory / "runs/l2e-seed1", 10)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    assert cli.main(["study", "study.yaml", "--dry-run", "--ranks", "1"]) == 0
    text = capsys.readouterr().out
    assert "| none-seed1 | inhibition.method=none | done | 0 | 0 |" in text
    assert "| l2e-seed1 | inhibition.method=l2e | at step 10 | 10 | 1,280 |" in text
    assert "| l2e-seed3 | inhibition.method=l2e | not begun | 20 | 2,560 |" in text
    assert "6: 1 done, 1 begun, 4 not begun" in text and "to go       90 steps, 11,520 tokens" in text
    assert "8 sequences = 2 micro-batch x 1 ranks x 4 accumulation steps" in text
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before

    # of an array job also the script, for the runs that are left; quoted as a shell reads it
    assert cli.main(["study", "study.yaml", "--dry-run", *SLURM, "--srun-option=--mpi=a b", "--", "--comment=a b"]) == 0
    text = capsys.readouterr().out
    assert "2 micro-batch x 2 ranks" in text
    options = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert ["--nodes=1"] in options and any("@300" in word for words in options for word in words)  # the defaults
    assert ["--array=0-4"] in options and ["--comment=a b"] in options and ["--requeue"] in options
    assert "-m l2e_ds.study.array_task --restarts 3 out/slurm-N/list" in text
    assert "    -- srun --kill-on-bad-exit=0 --wait=30 '--mpi=a b' " in text
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


def test_one_study_at_a_time(here, capsys):
    with lock_held(Path("out")) as other:
        said = refused(capsys)
    assert f"directory: another study is writing to out (host {os.uname().nodename}, process {other.pid}" in said
    assert os.listdir("out") == ["lock"]


def test_where_runs_are_computed(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    chosen = {"CUDA_VISIBLE_DEVICES": "2,5,6,7"}
    assert [place.environment for place in places(2, None, chosen)] == [
        {"CUDA_VISIBLE_DEVICES": "2"},
        {"CUDA_VISIBLE_DEVICES": "5"},
    ]
    (whole,) = places(None, None, {})
    assert whole.ranks == 4 and whole.environment == {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    words = whole.launcher()
    assert words[0].endswith("deepspeed") and "--num_accelerators" not in words and words[-1] == "--module"
    assert places(None, 1, chosen)[0].launcher() == [sys.executable, "-u", "-m"]
    with pytest.raises(ConfigError, match="--devices: got 5, allowed: an integer >= 1 and <= 4"):
        places(5, None, chosen)

    # without a GPU (or where none is to be used) the cores are shared
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    found = places(3, None, {"DS_ACCELERATOR": "cpu"})
    assert len(found) == 3 and {place.environment["OMP_NUM_THREADS"] for place in found} == {"2"}
    (two,) = places(None, 2, {"DS_ACCELERATOR": "cpu"})
    assert two.environment["OMP_NUM_THREADS"] == "4" and "--num_accelerators" in two.launcher()
    assert (
        places(None, None, {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "3"})[0].environment["OMP_NUM_THREADS"] == "3"
    )


def test_no_run_takes_itself_for_a_rank_of_the_launcher_around_the_study():
    around = {
        "RANK": "1",
        "MASTER_PORT": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "1",
        "SLURM_JOB_ID": "7",
        "HOME": "/",
    }
    assert without_launcher(around) == {"SLURM_JOB_ID": "7", "HOME": "/"}
