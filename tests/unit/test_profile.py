"""The trace of `logging.profile` on one process; of whole runs: tests/distributed/test_runs.py."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

from l2e_ds.training.profile import Profile


def profiled(folder: Path, steps: list[int] | None, taken: range) -> list[str]:
    """Take steps of a product of matrices, and return what was said."""
    said: list[str] = []
    profile = Profile(steps, folder, torch.device("cpu"), said.append)
    for step in taken:
        with profile.step(step):
            torch.ones(4, 4) @ torch.ones(4, 4)
        if profile.is_complete(step):
            profile.write()
    profile.write()
    return said


def test_steps_and_shapes_are_in_the_trace(tmp_path):
    said = profiled(tmp_path, [3, 4], range(1, 8))
    path = tmp_path / "profile/step00000003-rank0.json.gz"
    assert said == [f"profile of steps 3 to 4: {path}"]
    assert [*path.parent.iterdir()] == [path]
    events = [event for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if event["ph"] == "X"]
    assert sorted(event["name"] for event in events if "Step" in event["name"]) == ["ProfilerStep#3", "ProfilerStep#4"]
    products = [event for event in events if event["name"] == "aten::mm"]
    assert [event["args"]["Input Dims"] for event in products] == [[[4, 4], [4, 4]]] * 2


def test_what_was_traced_of_a_run_that_ends_early_is_written(tmp_path):
    path = tmp_path / "profile/step00000003-rank0.json.gz"
    assert profiled(tmp_path, [3, 9], range(1, 6)) == [f"profile of steps 3 to 5: {path}"]


def test_nothing_is_written_where_nothing_is_traced(tmp_path):
    """Not asked for; over before; only warmed up; begun with the last step, which would be the one to warm up in."""
    for steps, taken in ((None, range(1, 5)), ([3, 4], range(5, 9)), ([3, 4], range(1, 3)), ([3, 4], range(4, 9))):
        assert profiled(tmp_path, steps, taken) == []
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "profile").touch()
    (line,) = profiled(tmp_path, [2, 2], range(1, 4))
    assert line.startswith("l2e-ds: warning: logging.profile: ") and "File exists" in line
