"""Jobs on two nodes of a real SLURM: submitted, stopped, requeued, preempted, cancelled, without one of its nodes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.reliability.virtual_slurm import bring_back_node, kill_node, ready_nodes
from l2e_ds.run_directory.names import newest_step
from tests.processes import REPOSITORY
from tests.tolerances import rounding

STEPS = 300
"""Enough that a run is not finished when it is stopped, also where steps are fast and the scheduler is slow."""
NOT_REPRODUCIBLE = ("tokens_per_second", "step_seconds", "data_wait_seconds", "peak_memory_gib", "time", "mfu")


class Site:
    """A user's folder on the cluster, with a run file, and the actions of the user."""

    limited = ""
    """The job of a run with a time limit of three minutes."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = {
            **environment,
            "PYTHONPATH": str(REPOSITORY),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "TESTAPIKEY": "a-secret-of-the-submitting-shell",
            "SBATCH_TIMELIMIT": "2:00:00",  # as a profile may set it; what a job asks for counts
        }
        content = {
            "model": {"name": "pythia-14m", "vocab_size": 300, "num_layers": 4, "hidden_size": 32, "num_heads": 2},
            "data": {"source": "stdlib", "train_tokenizer": 300, "max_documents": 20, "max_tokens": 20000},
            "optimizer": {"schedule_steps": STEPS},
            "training": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "precision": "fp32"},
            "inhibition": {"coefficient": 0.01},
            "checkpoint": {"every": 25},
            "logging": {"every": 1, "progress": False},
        }
        content["data"] |= {"sequence_length": 16, "held_out": 0.1, "cache": "cache"}
        content["training"] |= {"evaluate_every": 0}
        (folder / "run.yaml").write_text(yaml.safe_dump(content))

    def call(self, *command: object, code: int = 0) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def submit(self, directory: str, *words: object, code: int = 0) -> str:
        """Submit a job of two nodes with one rank each; return its id, or what is printed if it is refused."""
        options = ["--nodes", 2, "--gpus-per-node", 0, "--tasks-per-node", 1]
        overrides = ["run.yaml", f"training.run_directory={directory}"]
        said = self.call(sys.executable, "-m", "l2e_ds.cli", "submit", *overrides, *options, *words, code=code)
        return said if code else re.search(r"job +(\d+):", said).group(1)

    def show(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", self.call("scontrol", "show", "job", job, "--oneliner")))

    def start_now(self, job: str) -> None:
        """Start a requeued job early, which otherwise waits two minutes; SLURM 22.05 fails if it starts at once."""
        self.wait(lambda: self.show(job)["JobState"] == "PENDING", f"job {job} is requeued")
        time.sleep(2)
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def lines(self, directory: str, kind: str = "train") -> list[dict]:
        path = self.folder / directory / "metrics.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in found if line["kind"] == kind]

    def reached(self, directory: str, step: int) -> None:
        self.wait(lambda: any(line["step"] >= step for line in self.lines(directory)), f"{directory}: step {step}")

    def started(self, directory: str, times: int) -> list[int]:
        """Return the steps from which the job started, once it has started so many times."""
        self.wait(lambda: len(self.lines(directory, "start")) >= times, f"{directory}: start {times}")
        return [line["step"] for line in self.lines(directory, "start")]

    def finished(self, job: str) -> None:
        self.wait(lambda: self.show(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED"), f"job {job} ends")
        assert self.show(job)["JobState"] == "COMPLETED", self.logs()

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"waited {seconds} s until {what}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """Return the ends of the logs of jobs and daemons."""
        daemons = Path(self.environment["SLURM_CONF"]).parent.glob("slurm*.log")
        files = [*self.folder.rglob("slurm-*.log"), *daemons]
        known = self.call("sinfo", "-N") + self.call("scontrol", "show", "job")
        return known + "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in files)

    def log(self, directory: str) -> str:
        (path,) = (self.folder / directory).glob("submit-1/slurm-*.log")
        return path.read_text()


@pytest.fixture(scope="module")
def site(slurm, tmp_path_factory) -> Site:
    site = Site(tmp_path_factory.mktemp("site"), slurm)
    # one process, six steps: what jobs are compared with, and the tokens that all runs share
    # (in the same micro-batches as on two ranks: the projected loss depends on that cut, docs/method.md 5.2)
    alone = ["training.steps=6", "training.run_directory=alone", "training.micro_batch=4"]
    site.call(sys.executable, "-m", "l2e_ds.train", "run.yaml", *alone)
    # runs beside the first tests, until SLURM's signal a minute before its time limit
    minutes = ["--time", "3:00", "--signal-seconds", 60]  # two minutes for its start on a busy machine
    site.limited = site.submit("limited", "training.steps=1000000", "checkpoint.every=0", *minutes)
    return site


def comparable(lines: list[dict]) -> dict[int, dict]:
    """Return the lines by step. A step that was trained twice must have the same line."""
    found: dict[int, dict] = {}
    for line in lines:
        numbers = {key: value for key, value in line.items() if key not in NOT_REPRODUCIBLE}
        assert found.setdefault(line["step"], numbers) == numbers
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = run.glob(f"checkpoints/step{STEPS:08d}/**/*model_states.pt")
    return torch.load(path, map_location="cpu", weights_only=False)["module"]


@pytest.mark.full
def test_array_tasks_are_runs_of_their_own(site):
    site.reached("limited", 1)
    nodes = site.show(site.limited)["NodeList"]
    array = REPOSITORY / "launch/slurm/array.sbatch"
    (site.folder / "list").write_text(
        "# a comment and an empty line are no runs\n\n"
        "run.yaml training.steps=3 'training.run_directory=array 0 $(touch pwned)'\n"
        "run.yaml training.steps=1000000 training.run_directory=array1 checkpoint.every=0  # runs until it is stopped\n"
    )
    (site.folder / "bad").write_text("run.yaml ; touch pwned\n")
    sbatch = ["sbatch", "--parsable", "--ntasks-per-node=1"]
    job = site.call(*sbatch, "--array=0-1", array, "list").strip()
    bad = site.call(*sbatch, "--array=0", array, "bad").strip()

    site.finished(f"{job}_0")
    assert [line["step"] for line in site.lines("array 0 $(touch pwned)")] == [1, 2, 3]
    # all at once on the same nodes, each with its own rendezvous
    assert site.show(f"{job}_1")["NodeList"] in ("n1", "n2") and nodes == "n[1-2]"
    # the last task of an array has the array's own job id: requeueing that would requeue them all
    site.reached("array1", 1)
    assert site.show(f"{job}_1")["JobId"] == job
    site.call("scancel", "--signal=USR1", f"{job}_1")
    site.wait(lambda: site.show(f"{job}_1")["JobState"] == "PENDING", "the task is requeued")
    assert site.show(f"{job}_0")["JobState"] == "COMPLETED"
    site.call("scancel", job)

    site.wait(lambda: site.show(f"{bad}_0")["JobState"] == "FAILED", "a list that cannot be read is refused")
    assert site.show(f"{bad}_0")["ExitCode"] == "2:0"
    assert "bad:1: override ';': write section.key=value" in (site.folder / f"slurm-{bad}_0.log").read_text()
    assert not list(site.folder.rglob("pwned"))


@pytest.mark.full
def test_killing_the_ranks_of_an_array_task_leaves_the_other_tasks_alone(site):
    """The task with the array's own job id kills its steps, beside a step that it runs in itself."""
    kill = "from l2e_ds.supervise.processes import kill_all; kill_all(['srun', 'python'])"
    (site.folder / "steps.sbatch").write_text(
        "#!/bin/bash\n"
        "begun='touch begun$SLURM_ARRAY_TASK_ID; until [ -e over ]; do sleep 0.2; done'\n"
        'srun --overlap --ntasks=1 bash -c "$begun" & step=$!\n'
        "until [ -e begun0 -a -e begun1 ]; do sleep 0.2; done\n"
        f"[ $SLURM_JOB_ID = $SLURM_ARRAY_JOB_ID ] && srun --overlap --ntasks=1 python -c \"{kill}; print('alive')\"\n"
        "wait $step; code=$?; touch over; echo $SLURM_JOB_ID $code > end$SLURM_ARRAY_TASK_ID\n"
    )
    job = site.call("sbatch", "--parsable", "--nodes=1", "--array=0-1", "--output=slurm-%a.log", "steps.sbatch").strip()
    site.wait(lambda: all((site.folder / f"end{task}").exists() for task in (0, 1)), "both tasks have ended")
    ends = dict((site.folder / f"end{task}").read_text().split() for task in (0, 1))
    assert ends.pop(job) != "0" and list(ends.values()) == ["0"]
    assert any("alive" in (site.folder / f"slurm-{task}.log").read_text() for task in (0, 1))


@pytest.mark.full
def test_what_sbatch_refuses_leaves_nothing_behind(site):
    said = site.submit("refused", "--time", "30:00", "--partition", "no-such", code=2)
    assert "l2e-ds: error: sbatch: Batch job submission failed" in said and "partition" in said
    assert not (site.folder / "refused/submit-1").exists()


@pytest.mark.full
def test_stopped_requeued_and_preempted_is_the_run_that_never_stopped(site):
    strange = 'runs/it\'s; touch pwned $(touch pwned) "x" %j'
    limited = site.limited
    srun = "--srun-option=--output=task %t $(touch pwned).out"
    whole = site.submit(strange, "--time", "30:00", srun, "--", "--comment=; touch pwned")
    site.finished(whole)
    assert {path.name for path in site.folder.glob("task *")} == {f"task {n} $(touch pwned).out" for n in (0, 1)}
    expected = comparable(site.lines(strange))
    assert list(expected) == list(range(1, STEPS + 1))
    start = site.lines(strange, "start")[0]
    assert (start["ranks"], start["launcher"]) == (2, "srun")
    alone = comparable(site.lines("alone"))
    for step, line in alone.items():
        assert expected[step]["lm_loss"] == pytest.approx(line["lm_loss"], rel=rounding(6, layers=4, tokens=8 * 16))
    site.wait(lambda: site.show(limited)["JobState"] == "PENDING", "the signal before the time limit stops the other")
    site.call("scontrol", "hold", limited)  # until it is its turn again

    # what was frozen; nothing of it was run as a command, and no secret is in it
    folder = site.folder / strange / "submit-1"
    assert {path.name for path in folder.iterdir()} - {"code.diff"} == {
        *("submit.sbatch", "run.yaml", "deepspeed.json", "code.json", f"slurm-{whole}.log")
    }
    code = json.loads((folder / "code.json").read_text())
    assert code["versions"]["torch"] == str(torch.__version__)
    assert re.fullmatch(r"[0-9a-f]{40}", code["git"]["commit"])
    assert not list(site.folder.rglob("pwned"))
    for path in site.folder.rglob("*"):
        assert not path.is_file() or site.environment["TESTAPIKEY"].encode() not in path.read_bytes(), path

    # one run, two interruptions, each in its own way
    job = site.submit("run", "--time", "30:00", "--restarts", 1)
    site.reached("run", 20)
    site.call("scancel", "--signal=USR1", job)  # to the tasks
    site.start_now(job)
    first, second = site.started("run", 2)
    assert first == 0 and second >= 20, "the step at which it stopped was saved"
    assert "stopped: SIGUSR1 at rank" in site.log("run")
    assert f"the run stopped on request; requeueing job {job}" in site.log("run")

    site.reached("run", second + 5)
    urgent = ["--partition=urgent", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", "--wrap=true"]
    site.call("sbatch", *urgent)  # SLURM preempts the run, and requeues it itself
    site.start_now(job)
    third = site.started("run", 3)[-1]
    assert third >= second + 5
    assert "is not requeued" in site.log("run")

    site.finished(job)
    assert len(site.started("run", 3)) == 3
    assert comparable(site.lines("run")) == expected
    ours, theirs = weights(site.folder / "run"), weights(site.folder / strange)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    # the time limit's signal went to the batch script, which had the run saved; the next start goes on
    assert "asking the run to save and stop" in site.log("limited")
    saved = site.lines("limited")[-1]["step"]
    site.start_now(limited)
    site.call("scontrol", "release", limited)
    site.reached("limited", saved + 1)
    assert site.started("limited", 2) == [0, saved]
    assert site.show(limited)["Restarts"] == "1"
    reached = comparable(site.lines("limited"))
    assert all(reached[step] == line for step, line in expected.items() if step in reached)

    # cancelled: the run saves, and stays cancelled
    site.call("scancel", limited)
    site.wait(lambda: site.show(limited)["JobState"] == "CANCELLED", "the job is cancelled")
    last = site.lines("limited")[-1]["step"]
    assert (site.folder / "limited/checkpoints/latest").read_text().strip() == f"step{last:08d}"
    assert f"job {limited} is not requeued: it was cancelled" in site.log("limited")
    time.sleep(2)
    assert site.show(limited)["JobState"] == "CANCELLED"


@pytest.mark.full
def test_two_steps_of_one_job_and_a_script_without_a_step(site):
    """In a batch script find_launch sees one process; two steps at once have their own rendezvous."""
    step = "srun --exact --nodes=2 --ntasks=2 --ntasks-per-node=1 python -m l2e_ds.train run.yaml training.steps=2"
    (site.folder / "steps.sbatch").write_text(
        "#!/bin/bash\n"
        "python -c 'from l2e_ds.distributed.launch import find_launch; print(find_launch())'\n"
        f"{step} training.run_directory=step0 & one=$!\n"
        f"{step} training.run_directory=step1 || exit 1\n"
        "wait $one\n"
    )
    said = site.call(
        *("sbatch", "--wait", "--nodes=2", "--ntasks-per-node=2", "--output=slurm-steps.log", "steps.sbatch")
    )
    assert "Submitted" in said
    log = (site.folder / "slurm-steps.log").read_text()
    assert "Launch(launcher='alone', rank=0, size=1, local_rank=0)" in log
    for name in ("step0", "step1"):
        assert site.lines(name, "start")[0]["ranks"] == 2
        assert len(site.lines(name)) == 2


@pytest.mark.full
def test_a_run_outlives_its_node(site):
    """SLURM misses the node and requeues the job, whose next start resumes from the newest checkpoint."""
    # by the script that users adapt, not by `l2e-ds submit`
    site.environment["L2E_DS_RESTARTS"] = "1"
    options = ["--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=30:00"]
    script = REPOSITORY / "launch/slurm/train.sbatch"
    job = site.call("sbatch", *options, script, "run.yaml", "training.run_directory=robbed").strip()
    site.reached("robbed", 30)
    assert len(kill_node(site.environment, "n2")) > 2, "no task was running there"
    site.wait(lambda: site.show(job)["Restarts"] == "1", "SLURM misses the node")
    site.wait(lambda: site.show(job)["JobState"] == "PENDING", "SLURM requeues the job")
    saved = newest_step(site.folder / "robbed")
    assert 25 <= saved < STEPS
    assert "n2" not in ready_nodes(site.environment)
    bring_back_node(site.environment, "n2")
    site.wait(lambda: "n2" in ready_nodes(site.environment), "the node is back")
    time.sleep(5)  # a job started in that very second is given a node too few
    site.start_now(job)
    site.finished(job)
    assert site.started("robbed", 2) == [0, saved]
    assert list(comparable(site.lines("robbed"))) == list(range(1, STEPS + 1))
