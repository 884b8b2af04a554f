"""Reading metrics.jsonl, also of a run that goes on. (What is written: tests/distributed/test_runs.py.)"""

import pytest

from l2e_ds.errors import DataError
from l2e_ds.run_directory.metrics import read_metrics

FIRST, SECOND = '{"kind": "train", "step": 1}', '{"kind": "evaluation", "step": 2}'


def test_lines_of_one_kind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{FIRST}\n{SECOND}\n")
    assert read_metrics(path, "train") == [{"kind": "train", "step": 1}]
    assert read_metrics(path, "start") == []


@pytest.mark.parametrize("rest", ['{"kind": "train", "st', '{"kind": "train"', '{"kind": "tr\u00e4'.encode()[:-1], b""])
def test_line_that_is_being_written_does_not_count(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f"{FIRST}\n".encode() + (rest if isinstance(rest, bytes) else rest.encode()))
    assert read_metrics(path, "train") == [{"kind": "train", "step": 1}]


@pytest.mark.parametrize("broken", ['{"kind": "train", "st', "\0\0\0", "[1]", "3", '{"step": 2}', '{"kind": "train"}'])
def test_broken_line_is_named(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{FIRST}\n{broken}\n{SECOND}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: is no line of a run's metrics"):
        read_metrics(path, "train")
