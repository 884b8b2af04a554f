"""What happens to a run when a rank fails, a second run comes, the disk fills, a checkpoint is damaged."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from l2e_ds.cli import main
from l2e_ds.distributed.launch import free_port
from tests.integration.running import PATIENCE, lines, newest, saved
from tests.processes import REPOSITORY

TRAIN = ["-m", "l2e_ds.train"]
ALONE = [sys.executable, *TRAIN]
LONG = ["training.steps=3000", "training.evaluate_every=0", "checkpoint.every=10", "logging.progress=false"]


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_killed_rank_is_named_and_ends_the_others(launch_ranks, run_file, tmp_path, lost):
    both = launch_ranks(2, *TRAIN, run_file, *LONG)
    both.wait_for(lambda: newest(tmp_path / "run") >= 15)
    killed, other = both.processes[lost], both.processes[1 - lost]
    killed.kill()
    assert other.wait(PATIENCE) not in (0, 2, 3, 75)
    said = both.said()
    assert f"rank {1 - lost}: rank {lost} (host" in said and f"process {killed.pid}, last seen in" in said
    assert f"l2e-ds: error: rank {1 - lost}: lost contact with another rank" in said
    assert "Traceback" not in said
    assert saved(tmp_path / "run") >= 10


@pytest.mark.full
def test_a_hanging_rank_is_named_and_ends_the_run_in_time(launch_ranks, run_file, tmp_path):
    both = launch_ranks(2, *TRAIN, run_file, *LONG, "training.timeout=0.5")
    both.wait_for(lambda: newest(tmp_path / "run") >= 5)
    other, hanging = both.processes
    hanging.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    both.wait_for(lambda: "no progress for 0.5 minutes (training.timeout)" in both.said())
    assert time.monotonic() - begin > 20  # it is given its 30 s, of which some may be over by now
    assert other.wait(PATIENCE) == 1
    line = next(line for line in both.said().splitlines() if "no progress" in line)
    assert line.startswith("l2e-ds: error: rank 0: ")
    assert f"rank 1 (host {os.uname().nodename}, process {hanging.pid}, last seen in" in line
    assert "is silent" in line


def test_too_little_memory_ends_a_run_for_good_in_one_line(launch, run_file, tmp_path):
    """An embedding of eight terabytes; a restart would not find more memory, so that the exit code is final."""
    # a kernel that promises more memory than there is (vm.overcommit_memory=1) would promise this, too
    limited = ["bash", "-c", f'ulimit -v {2**30}; exec "$@"', "bash"]  # in KiB
    run = launch(*limited, *ALONE, run_file, "model.vocab_size=68719476736", "training.micro_batch=4")
    assert run.end() == 3
    (line,) = [line for line in run.said().splitlines() if "error" in line]
    assert line.startswith("l2e-ds: error: training.micro_batch: got 4, for which the memory is too small (")
    assert "try a smaller one (auto finds the largest that fits) or more ranks" in line
    assert "Traceback" not in run.said()


@pytest.mark.full
def test_a_raising_rank_is_named_with_its_reason(launch_ranks, run_file):
    both = launch_ranks(2, REPOSITORY / "tests/distributed/workers/raising.py", run_file, "training.steps=10")
    assert both.end() == [1, 1]
    assert "l2e-ds: error: rank 1 failed" in both.said()
    assert "ZeroDivisionError: broken on purpose" in both.said()


@pytest.mark.full
def test_ranks_that_read_different_text_do_not_train(launch_ranks, run_file, tmp_path):
    both = launch_ranks(2, REPOSITORY / "tests/distributed/workers/growing_text.py", run_file)
    assert both.end() == [2, 2]
    (line,) = [line for line in both.said().splitlines() if "error" in line]
    assert line.startswith("l2e-ds: error: data: rank 1 reads other text than rank 0 (1 of 2 ranks do): it changed")
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/config.yaml").exists()


def test_a_second_run_is_refused_and_a_killed_one_makes_room(launch, run_file, tmp_path):
    """Secrets of the environment are nowhere in what a run writes or prints."""
    secrets = {name: f"secret-of-{name}" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
    first = launch(*ALONE, run_file, *LONG, **secrets)
    first.wait_for(lambda: newest(tmp_path / "run") >= 11)
    second = launch(*ALONE, run_file, *LONG)
    assert second.end() == 2
    assert len(second.said().splitlines()) == 1
    assert f"another run is writing to {tmp_path / 'run'} (host" in second.said()
    step = newest(tmp_path / "run")
    first.wait_for(lambda: newest(tmp_path / "run") > step)  # undisturbed
    first.process.kill()
    first.process.wait()
    third = launch(*ALONE, run_file, *LONG, f"training.steps={newest(tmp_path / 'run') + 5}", **secrets)
    assert third.end() == 0, third.said()
    assert not (tmp_path / "run/lock").exists()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in [*files, first.log, third.log]:
        assert b"secret-of-" not in path.read_bytes(), path


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_gives_the_same_run(launch, run_file, tmp_path, capsys):
    words = [run_file, "training.steps=9", "checkpoint.every=3", "logging.progress=false"]
    straight = tmp_path / "straight"
    assert launch(*ALONE, *words, f"training.run_directory={straight}").end() == 0
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    checkpoints = run / "checkpoints"
    shard = checkpoints / "step00000009/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 4
    shard.write_bytes(content)
    (checkpoints / "step00000006/mp_rank_00_model_states.pt").unlink()
    one = launch(*ALONE, *words)
    assert one.end() == 0
    assert [line for line in one.said().splitlines() if "it is not used" in line] == [
        f"l2e-ds: checkpoint {checkpoints}/step00000009: {shard.name} is not what was written (its checksum differs);"
        " it is not used",
        f"l2e-ds: checkpoint {checkpoints}/step00000006: mp_rank_00_model_states.pt is missing; it is not used",
    ]
    assert "resumed from " + str(checkpoints / "step00000003") in one.said()
    assert [line["lm_loss"] for line in lines(run)] == [line["lm_loss"] for line in lines(straight)]
    assert main(["checkpoint", "list", str(run)]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == ["step", "3", "6", "9", "step00000009.damaged"]
    assert listed.count("complete") == 3  # 6 and 9 were written again


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system (needs root): {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.full
def test_a_full_disk_costs_no_good_checkpoint(launch_ranks, run_file, small_disk):
    """`stop`: one line, exit code 3, the last good checkpoint stays. `continue`: it trains on, and once there is room
    it saves again."""
    run = small_disk / "run"
    words = [run_file, f"training.run_directory={run}", "logging.progress=false", "training.evaluate_every=0"]
    words += ["training.steps=3000", "checkpoint.every=2", "optimizer.schedule_steps=3000"]
    one = launch_ranks(2, *TRAIN, *words)
    assert one.end() == [3, 3]
    said = [line for line in one.said().splitlines() if "was not saved" in line]
    assert len(said) == 1 and re.search(r": rank [01]: .*No space left on device", said[0]), one.said()
    assert "the newest good checkpoint is step" in said[0]
    good = saved(run)
    assert good >= 4
    checkpoints = run / "checkpoints"
    assert not list(checkpoints.glob("*.tmp"))
    assert main(["checkpoint", "verify", str(run)]) == 0

    one = launch_ranks(2, *TRAIN, *words, "checkpoint.on_error=continue")
    one.wait_for(lambda: one.said().count("training continues (checkpoint.on_error)") >= 2)
    assert saved(run) == good
    for path in sorted(checkpoints.glob("step*"))[:-1]:
        shutil.rmtree(path)
    one.wait_for(lambda: saved(run) > good)
    for process in one.processes:
        process.kill()
    for line in Path(run / "metrics.jsonl").read_text().splitlines():
        json.loads(line)  # whole lines only


def catches(process: psutil.Process, number: int) -> bool:
    """Return whether a process has a handler for this signal by now."""
    mask = re.search(r"^SigCgt:\s+(\w+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.full
def test_asked_to_stop_while_starting_and_after_a_time(launch, launch_ranks, run_file, tmp_path):
    """The first case uses the deepspeed launcher, whose ranks import torch after they have begun to listen."""
    deepspeed = ["deepspeed", "--num_accelerators", "2", "--master_port", free_port(), "--log_level", "error"]
    one = launch(*deepspeed, "--module", "l2e_ds.train", run_file, *LONG)

    def rank_1() -> psutil.Process | None:
        return next((p for p in one.find("l2e_ds.train") if p.environ().get("RANK") == "1"), None)

    one.wait_for(rank_1)
    one.wait_for(lambda: catches(rank_1(), signal.SIGUSR1))
    rank_1().send_signal(signal.SIGUSR1)
    assert one.end() == 75
    assert "l2e-ds: stopped: SIGUSR1 at rank 1; " in one.said()

    both = launch_ranks(2, *TRAIN, run_file, *LONG, "training.time_limit=0.25")
    assert both.end() == [75, 75]
    assert f"training.time_limit is over; step {newest(tmp_path / 'run')} is saved" in both.said()
    assert 0 < saved(tmp_path / "run") == newest(tmp_path / "run") < 3000
