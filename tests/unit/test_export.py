"""Which checkpoint `l2e-ds export` takes, and what it refuses. (Exported weights: tests/distributed/test_runs.py.)"""

import pytest

from l2e_ds.cli import main
from l2e_ds.run_directory import manifest


def checkpoint(run, step, complete=True):
    folder = run / "checkpoints" / f"step{step:08d}"
    folder.mkdir(parents=True)
    (folder / "shard.pt").write_bytes(b"12345")
    manifest.write_manifest(folder, manifest.flush_and_describe(folder, [folder / "shard.pt"]))
    if not complete:
        (folder / "shard.pt").write_bytes(b"1234")
    return folder


def test_find_checkpoint(tmp_path, capsys):
    from l2e_ds.checkpoint.weights import find_checkpoint
    from l2e_ds.errors import CheckpointError

    first, second = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 15, complete=False)
    assert find_checkpoint(tmp_path, None) == second
    assert "shard.pt has 4 bytes instead of 5" in capsys.readouterr().err
    assert find_checkpoint(tmp_path, 5) == first
    assert find_checkpoint(first, None) == first
    for source, step, words in [
        (tmp_path, 7, "complete steps: 5, 10"),
        (tmp_path / "checkpoints/step00000015", None, "4 bytes instead of 5"),
        (tmp_path / "nowhere", None, "neither a run directory nor"),
        (first, 5, "--step"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            find_checkpoint(source, step)


def test_a_damaged_newest_checkpoint_names_the_others(tmp_path, capsys):
    """All commands with --step name them. Its files have the right sizes; reading them shows that a byte differs."""
    for step in (5, 10, 15):
        newest = checkpoint(tmp_path / "run", step)
    (newest / "shard.pt").write_bytes(b"12346")
    arguments = {"export": ["--output", str(tmp_path / "model")], "evaluate": ["--tasks", "arc_easy"]}
    for command, more in arguments.items():
        for step in ([], ["--step", "15"]):
            assert main([command, str(tmp_path / "run"), *more, *step]) == 2
            said = capsys.readouterr().err
            assert len(said.splitlines()) == 1
            assert "step00000015: " in said and "other steps, to be given as --step: 5, 10" in said
        assert main([command, str(newest), *more]) == 2
        assert "--step" not in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said_before_the_work(tmp_path, capsys, monkeypatch):
    checkpoint(tmp_path / "run", 5)
    (tmp_path / "file.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "run", "--output", "file.txt/model"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "--output: cannot write" in said


def test_what_resume_means(tmp_path):
    from l2e_ds.checkpoint.manager import CheckpointManager
    from l2e_ds.errors import CheckpointError

    own, other = tmp_path / "own", tmp_path / "other"
    manager = CheckpointManager(own)
    start = checkpoint(other, 40)
    assert manager.find("auto") is None
    assert manager.find("never") is None
    assert manager.find(str(other)) == start
    assert manager.find(str(start)) == start
    first, second = checkpoint(own, 5), checkpoint(own, 10)
    assert manager.find("auto") == second
    assert manager.find(str(start)) == second  # a job that was requeued must not begin again
    assert manager.find(str(second)) == second
    for resume, words in [("never", "holds step00000010"), (str(first), "not the newest checkpoint")]:
        with pytest.raises(CheckpointError, match=words):
            manager.find(resume)
    (first / "shard.pt").unlink()
    (second / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none is complete"):
        manager.find("auto")


@pytest.mark.parametrize("arguments", [["export", "nowhere", "--output", "out"], ["summary", "nowhere"]])
def test_a_missing_run_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
