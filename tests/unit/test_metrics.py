"""Read metrics.jsonl, also of a run that is still writing it, and the table that describes its keys.

What is written: tests/distributed/test_runs.py; that all of it is in the table: the fixture `metric_lines`.
"""

import json

import pytest

from l2e_ds.errors import DataError
from l2e_ds.inhibition import Inhibitor
from l2e_ds.run_directory.metric_table import KINDS, described, find
from l2e_ds.run_directory.metrics import read_lines, read_metrics

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


@pytest.mark.parametrize(
    ("kind", "key", "entry"),
    [
        ("train", "tokens", "tokens"),
        ("train", "tokens/a set/with a slash", "tokens/NAME"),
        ("train", "layer11/tau", "layerI/tau"),
        ("train", "layers/tau", "layerI/tau"),
        ("evaluation", "layer0/mean_s", "layerI/mean_s"),
        ("evaluation", "comparison_layer3/mean_s", "comparison_layerI/mean_s"),
        ("tasks", "mmlu/5-shot/acc", "TASK/N-shot/METRIC"),
    ],
)
def test_entry_of_a_key(kind, key, entry):
    assert described(kind, key).key == entry


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("train", "held_out_loss"),
        ("train", "layerX/tau"),
        ("train", "comparison_layer3/tau"),
        ("train", "tokens/"),
        ("evaluation", "layer0/tau"),
        ("tasks", "mmlu/acc"),
        ("checkpoint", "tokens"),
    ],
)
def test_key_without_an_entry(kind, key):
    assert find(kind, key) is None
    with pytest.raises(KeyError, match="is not in the table of metrics"):
        described(kind, key)


def test_an_unknown_kind():
    with pytest.raises(KeyError):
        find("news", "step")


def test_a_key_has_one_entry():
    for kind in KINDS.values():
        keys = [metric.key for metric in kind.metrics]
        assert len(keys) == len(set(keys))


def test_inhibitors_statistics_are_described():
    """The table has the names that `Inhibitor.metrics` and the lines of training use."""
    for name in Inhibitor.STATISTICS:
        assert find("train", name if name == "inhibition_loss" else f"layer2/{name}") is not None


TRAIN = {"kind": "train", "step": 1, "tokens": 64, "lm_loss": 2.0, "tokens_per_second": 9.0}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({**TRAIN, "tokens": 1.5}, "tokens: got 1.5, must be a whole number"),
        ({**TRAIN, "tokens/code": None}, "tokens/code: got None, must be a whole number"),
        ({**TRAIN, "lm_loss": "low"}, "lm_loss: got 'low', must be a number or null"),
        ({**TRAIN, "of another version": [1]}, "of another version: got \\[1\\], must be a number or null"),
        ({key: value for key, value in TRAIN.items() if key != "lm_loss"}, "has no lm_loss"),
        ({"kind": "start", "step": 0, "git": "abc"}, "git: got 'abc', must be a mapping"),
        ({"kind": "guard", "step": 0, "text": 3, "advice": ""}, "text: got 3, must be text"),
    ],
)
def test_lines_are_checked_by_the_table(tmp_path, line, told):
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(TRAIN)}\n{json.dumps(line)}\n")
    with pytest.raises(DataError, match=rf"metrics\.jsonl:2: {told}$"):
        read_lines(tmp_path)


def test_keys_of_another_version_are_kept(tmp_path):
    start = {"kind": "start", "step": 0, "weather": ["rain"]}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps({**TRAIN, 'old_figure': 3.5})}\n")
    assert read_lines(tmp_path) == [start, {**TRAIN, "old_figure": 3.5}]
