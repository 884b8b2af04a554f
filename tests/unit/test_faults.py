"""The benchmark of faults detects differing lines, cut files and the wrong checkpoint."""

from __future__ import annotations

import json
import random
import time

import pytest

from benchmarks.__main__ import main
from benchmarks.reliability import faults
from benchmarks.reliability.watched_run import WatchedRun


@pytest.mark.parametrize("count", [1, 8, 12, 13, 100, 150])
def test_a_plan_has_every_kind_in_its_share(count):
    plan = faults.plan(count, random.Random(1))
    assert len(plan) == count
    assert len(set(plan)) == min(count, len(faults.KINDS))
    if count == 100:
        assert {kind: plan.count(kind) for kind in plan} == {kind: share for kind, (share, _) in faults.KINDS.items()}
    assert plan != faults.plan(count, random.Random(2)) or count == 1


@pytest.fixture
def run(tmp_path):
    """Return a watched run whose log and metrics the test writes itself."""
    reference = {step: {"kind": "train", "step": step, "lm_loss": step / 7} for step in range(1, 100)}
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    return WatchedRun(tmp_path / "run", tmp_path / "log", reference)


def write(run, steps, wrong=None, mode="a"):
    with (run.directory / "metrics.jsonl").open(mode) as file:
        for step in steps:
            line = {"kind": "train", "step": step, "lm_loss": step / 7 + (step == wrong) * 1e-15}
            file.write(json.dumps(line | {"step_seconds": random.random()}) + "\n")


def say(run, line):
    with run.log.open("a") as file:
        file.write(line + "\n")


def save(run, step):
    folder = run.directory / f"checkpoints/step{step:08d}"
    folder.mkdir()
    (folder / "a_states.pt").write_bytes(bytes(100))
    return folder


def resume(run, step):
    """Cut the metrics, and say from which step the run resumes, as a restarted run does."""
    path = run.directory / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines(True) if json.loads(line)["step"] <= step]
    path.with_suffix(".tmp").write_text("".join(kept))
    path.with_suffix(".tmp").replace(path)
    say(run, "l2e-ds: start 2 of at most 4: ...")
    say(run, f"resumed from {run.directory}/checkpoints/step{step:08d}")


def test_lines_after_a_resume_are_compared(run):
    say(run, "l2e-ds: start 1 of at most 4: ...")
    write(run, range(1, 26))
    run.poll()
    save(run, 20)
    resume(run, 20)
    run.poll()
    assert not run.goes_on() and run.starts[1].resumed == 20
    write(run, range(21, 31), wrong=29)
    run.poll()
    first, second = run.starts
    assert (first.last_step, first.compared, first.wrong) == (25, 25, [])
    assert (second.last_step, second.compared) == (30, 10)
    assert run.goes_on() and len(second.wrong) == 1 and second.wrong[0].startswith("step 29: lm_loss")


def test_only_the_newest_good_checkpoint_is_right(run):
    say(run, "l2e-ds: start 1 of at most 4: ...")
    write(run, range(1, 46))
    run.poll()
    save(run, 20)
    newest = save(run, 40)
    assert run.newest_good() == 40
    resume(run, 20)  # although 40 is there
    run.poll()
    assert run.starts[-1].wrong == ["resumed from step 20, the newest good checkpoint is of 40"]

    faults.damage(newest / "a_states.pt", "truncated", random.Random(1))
    run.note_damage(newest)
    assert run.newest_good() == 20
    resume(run, 20)
    run.poll()
    assert run.starts[-1].wrong == []
    say(run, "l2e-ds: start 3 of at most 4: ...")  # and begins afresh, without a word
    write(run, [1], mode="w")
    run.poll()
    assert run.starts[-1].wrong == ["resumed from step 0, the newest good checkpoint is of 20"]


def test_what_a_kill_left_is_no_save(run):
    left = run.directory / "checkpoints/step00000040.tmp"
    left.mkdir()
    time.sleep(0.05)
    say(run, "l2e-ds: start 1 of at most 4: ...")
    run.poll()
    assert not run.is_saving()
    left.rmdir()
    time.sleep(0.05)
    left.mkdir()
    assert run.is_saving()
    left.rename(left.with_suffix(""))
    assert not run.is_saving()


def test_damage(tmp_path):
    for kind in ("truncated", "zero-length", "missing", "bit-flipped"):
        file = tmp_path / kind
        file.write_bytes(bytes(1000))
        said = faults.damage(file, kind, random.Random(3))
        content = file.read_bytes() if file.exists() else None
        if kind == "missing":
            assert content is None
        elif kind == "bit-flipped":
            assert len(content) == 1000 and sum(byte.bit_count() for byte in content) == 1
        else:
            assert len(content) < 1000 and f"1000 bytes cut to {len(content)}" == said


def test_bad_words_are_refused(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for words, expected in (
        (["--faults", "0"], "--faults: got 0, allowed: an integer >= 1"),
        (["--ranks", "1"], "--ranks: got 1, allowed: an integer >= 2"),
        (["--output", str(tmp_path / "full")], "exists and is not an empty folder"),
    ):
        assert main(["faults", "--output", str(tmp_path / "new"), *words]) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and expected in said
        assert not (tmp_path / "new").exists()
