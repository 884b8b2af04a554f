"""Which checkpoint `l2e-ds export` takes, and what it refuses. (Exported weights: tests/distributed/test_runs.py.)"""

import json

import pytest

from l2e_ds.cli import main


def checkpoint(run, step, complete=True):
    folder = run / "checkpoints" / f"step{step:08d}"
    folder.mkdir(parents=True)
    (folder / "shard.pt").write_bytes(b"12345")
    (folder / "manifest.json").write_text(json.dumps({"files": {"shard.pt": 5 if complete else 6}}))
    return folder


def test_find_checkpoint(tmp_path, capsys):
    from l2e_ds.errors import CheckpointError
    from l2e_ds.evaluation.export import find_checkpoint

    first, second = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 15, complete=False)
    assert find_checkpoint(tmp_path, None) == second
    assert "shard.pt has 5 bytes instead of 6" in capsys.readouterr().err
    assert find_checkpoint(tmp_path, 5) == first
    assert find_checkpoint(first, None) == first
    for source, step, words in [
        (tmp_path, 7, "complete steps: 5, 10"),
        (tmp_path / "checkpoints/step00000015", None, "5 bytes instead of 6"),
        (tmp_path / "nowhere", None, "neither a run directory nor"),
        (first, 5, "--step"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            find_checkpoint(source, step)


@pytest.mark.parametrize("arguments", [["export", "nowhere", "--output", "out"], ["summary", "nowhere"]])
def test_a_missing_run_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
