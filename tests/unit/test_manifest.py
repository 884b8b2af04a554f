"""A checkpoint is what its manifest says, to the byte; anything else is named in a few words."""

import json
import pickle
import shutil

import pytest

from l2e_ds.checkpoint.manager import CheckpointManager
from l2e_ds.errors import CheckpointError
from l2e_ds.run_directory import manifest
from l2e_ds.run_directory.names import published_checkpoints


def make(folder, step=7):
    path = folder / f"checkpoints/step{step:08d}"
    path.mkdir(parents=True)
    (path / "mp_rank_00_model_states.pt").write_bytes(bytes(range(256)) * 40)
    (path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"zero" * 100)
    (path / "zero_pp_rank_11_mp_rank_00_optim_states.pt").write_bytes(b"eleven" * 100)
    (path / "rng-rank00011.safetensors").write_bytes(b"r")
    (path / "state.json").write_text(json.dumps({"train": {"step": step}, "identity": {"ranks": 12, "zero_stage": 1}}))
    entries = {}
    for rank in (0, 11):
        entries |= manifest.flush_and_describe(path, manifest.files_of_rank(path, rank))
    manifest.write_manifest(path, entries)
    return path


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forge(path):
    """Make the manifest name a file outside its folder."""
    content = json.loads((path / "manifest.json").read_text())
    content["files"]["../../x.pt"] = {"bytes": 1, "sha256": "0" * 64}
    (path / "manifest.json").write_text(json.dumps(content))


SHARD = "zero_pp_rank_11_mp_rank_00_optim_states.pt"
DAMAGES = {
    "truncated": (lambda p: (p / SHARD).write_bytes(b"eleven" * 99), f"{SHARD} has 594 bytes instead of 600"),
    "zero length": (lambda p: (p / SHARD).write_bytes(b""), f"{SHARD} has 0 bytes instead of 600"),
    "missing": (lambda p: (p / SHARD).unlink(), f"{SHARD} is missing"),
    "bit flipped": (lambda p: flip(p / SHARD), f"{SHARD} is not what was written (its checksum differs)"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "has no manifest (it was not finished)"),
    "cut manifest": (lambda p: (p / "manifest.json").write_text('{"files": {'), "its manifest is not readable"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text('{"files": {}}'), "its manifest is empty"),
    "foreign file": (
        lambda p: (p / "zero_pp_rank_2_mp_rank_00_optim_states.pt").write_bytes(pickle.dumps("x")),
        "zero_pp_rank_2_mp_rank_00_optim_states.pt is not in its manifest",
    ),
    "forged name": (forge, "its manifest is not readable"),
}


def test_each_rank_describes_its_own_files(tmp_path):
    path = make(tmp_path)
    names = {rank: [p.name for p in manifest.files_of_rank(path, rank)] for rank in (0, 1, 11)}
    assert names[1] == []
    assert set(names[11]) == {SHARD, "rng-rank00011.safetensors"}
    assert set(names[0]) == {
        *("manifest.json", "state.json", "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    }


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path, capsys, damage):
    good, bad = make(tmp_path, 3), make(tmp_path, 7)
    assert manifest.verify(bad) is None
    assert CheckpointManager(tmp_path).find("auto") == bad
    do, expected = DAMAGES[damage]
    do(bad)
    assert manifest.verify(bad) == expected
    assert CheckpointManager(tmp_path).find("auto") == good
    said = capsys.readouterr().err.splitlines()
    assert said == [f"l2e-ds: checkpoint {bad}: {expected}; it is not used"]


def test_a_checkpoint_under_another_name_is_not_used(tmp_path, capsys):
    """A copy under the name of a later step is not a checkpoint of that step, and `prune` does not keep it."""
    from l2e_ds.cli import main

    good = make(tmp_path, 3)
    copy = shutil.copytree(good, tmp_path / "checkpoints/step00000009")
    said = "is the checkpoint of step 3 under another name"
    assert manifest.verify(copy) == said
    assert CheckpointManager(tmp_path).find("auto") == good
    assert capsys.readouterr().err == f"l2e-ds: checkpoint {copy}: {said}; it is not used\n"
    with pytest.raises(CheckpointError, match=said):
        CheckpointManager(tmp_path / "branch").find(str(copy))
    assert main(["checkpoint", "prune", str(tmp_path), "--keep-last", "1"]) == 0
    assert list((tmp_path / "checkpoints").iterdir()) == [good]
    assert manifest.verify(shutil.copytree(good, tmp_path / "safe")) is None  # under no step's name


@pytest.mark.parametrize("step", ["manifest", "files", "contents"])
def test_what_a_run_removes_meanwhile_is_no_damage(tmp_path, capsys, monkeypatch, step):
    """A run with `checkpoint.keep_last` removes its oldest checkpoint while a command reads it."""
    from l2e_ds.checkpoint import commands
    from l2e_ds.cli import main

    oldest = make(tmp_path, 3)
    make(tmp_path, 7)
    name = {"manifest": "read_manifest", "files": "check_files", "contents": "check_contents"}[step]
    real = getattr(manifest, name)

    def late(folder, *arguments):
        if folder == oldest:
            shutil.rmtree(oldest, ignore_errors=True)
        return real(folder, *arguments)

    for module in (manifest, commands):
        monkeypatch.setattr(module, name, late, raising=False)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "step00000003  removed meanwhile\nstep00000007  good\n"
    if step != "contents":  # which `list` does not read
        make(tmp_path, 3)
        assert main(["checkpoint", "list", str(tmp_path)]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "7"]
    make(tmp_path, 3)
    assert main(["checkpoint", "prune", str(tmp_path), "--keep-last", "2"]) == 0
    assert capsys.readouterr().out.endswith("kept 7\n")


def test_prune_removes_unfinished_checkpoints_only_while_no_run_can_start(tmp_path, monkeypatch):
    from l2e_ds.checkpoint import commands
    from l2e_ds.cli import main

    for step in (3, 7):
        make(tmp_path, step)
    (tmp_path / "checkpoints/step00000009.tmp").mkdir()
    removed = {}

    def remove(path):
        removed[path.name] = (tmp_path / "lock").exists()

    monkeypatch.setattr(commands, "remove_checkpoint", remove)
    assert main(["checkpoint", "prune", str(tmp_path), "--keep-last", "1"]) == 0
    assert removed == {"step00000009.tmp": True, "step00000003": False}


@pytest.mark.parametrize("name", ["manifest.json", SHARD])
def test_prune_removes_nothing_beside_a_checkpoint_that_cannot_be_read(tmp_path, capsys, name):
    """It may be whole, as after an error of a network's file system. Here a link leads to itself."""
    from l2e_ds.cli import main

    paths = [make(tmp_path, step) for step in (3, 7)]
    (paths[1] / name).unlink()
    (paths[1] / name).symlink_to(name)
    assert main(["checkpoint", "prune", str(tmp_path), "--keep-last", "1"]) == 2
    said = capsys.readouterr()
    reason = "cannot be read (Too many levels of symbolic links); nothing is removed"
    assert (said.out, said.err) == ("", f"l2e-ds: error: {paths[1] / name}: {reason}\n")
    assert sorted((tmp_path / "checkpoints").iterdir()) == paths


def test_prune_says_removed_of_what_it_has_removed(tmp_path, capsys, monkeypatch):
    from l2e_ds.checkpoint import commands
    from l2e_ds.cli import main

    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    paths = [make(tmp_path, step) for step in (3, 7)]
    monkeypatch.setattr(commands, "remove_checkpoint", refused)
    assert main(["checkpoint", "prune", str(tmp_path), "--keep-last", "1"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"l2e-ds: error: {paths[0]}: cannot be removed (Permission denied)\n")


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path):
    (tmp_path / "checkpoints").symlink_to("checkpoints")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        published_checkpoints(tmp_path)
    assert published_checkpoints(tmp_path / "nowhere") == []


def test_shares_of_the_ranks_cover_every_file(tmp_path):
    path = make(tmp_path)
    files = [file for file in path.iterdir() if file.name != manifest.MANIFEST]
    assert len(files) > 4
    for file in files:
        flip(file)
        for parts in range(1, 5):
            found = [manifest.check_contents(path, part, parts) for part in range(parts)]
            (problem,) = [problem for problem in found if problem is not None]
            assert problem.startswith(f"{file.name} is not what was written")
        flip(file)  # back
    assert manifest.verify(path) is None


def test_what_a_resume_passed_over_is_set_aside_and_never_counts_as_kept(tmp_path):
    """The run resumed from step 3, since 9 is damaged, and has now published 5: 5 stays, though 9 is a later step."""
    make(tmp_path, 3)
    flip(make(tmp_path, 9) / SHARD)
    five = make(tmp_path, 5)
    CheckpointManager(tmp_path, keep_last=1)._tidy_up(five)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest", "step00000005", "step00000009.damaged"}
    assert (tmp_path / "checkpoints/latest").read_text() == "step00000005\n"
    assert CheckpointManager(tmp_path).find("auto") == five


def test_retention_removes_nothing_that_only_seems_damaged(tmp_path, monkeypatch):
    paths = [make(tmp_path, step) for step in (1, 2, 3, 4)]
    (paths[2] / "README").write_text("a stray file")  # makes it unusable until somebody takes the file away
    checkpoints = CheckpointManager(tmp_path, keep_last=2)
    checkpoints._tidy_up(paths[3])
    assert checkpoints.published() == paths[1:]

    def fail(path):
        return "manifest.json: not readable (Too many open files)"

    monkeypatch.setattr(manifest, "read_manifest", fail)  # a reading error, of all of them
    checkpoints._tidy_up(paths[3])
    assert checkpoints.published() == paths[1:]


def test_nothing_good_is_an_error_not_a_fresh_start(tmp_path):
    flip(make(tmp_path) / SHARD)
    with pytest.raises(CheckpointError, match="none is complete and undamaged"):
        CheckpointManager(tmp_path).find("auto")
    with pytest.raises(CheckpointError, match="holds step00000007"):
        CheckpointManager(tmp_path).find("never")
    assert CheckpointManager(tmp_path / "other").find("auto") is None


def test_checkpoint_commands(tmp_path, capsys):
    from l2e_ds.cli import main

    paths = [make(tmp_path, step) for step in (2, 4, 6, 8)]
    (tmp_path / "checkpoints/step00000009.tmp").mkdir()
    (tmp_path / "checkpoints/step00000005.damaged").mkdir()
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert "step00000005.damaged" in capsys.readouterr().out
    flip(paths[3] / SHARD)
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert "step00000008  zero_pp_rank_11" in output.out
    assert output.out.count("good") == 3
    assert "1 of 4 checkpoints cannot be used" in output.err
    assert main(["checkpoint", "verify", str(tmp_path), "--step", "4"]) == 0
    assert main(["checkpoint", "verify", str(tmp_path), "--step", "5"]) == 2

    prune = ["checkpoint", "prune", str(tmp_path), "--keep-last", "1", "--keep-every", "4"]
    assert main([*prune, "--dry-run"]) == 0
    assert len(list((tmp_path / "checkpoints").iterdir())) == 6
    assert main(prune) == 0  # the damaged newest does not count as kept; 4 and 8 are multiples of 4
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"step00000004", "step00000006", "step00000008"}
    flip(paths[2] / SHARD)
    (paths[1] / SHARD).unlink()
    capsys.readouterr()
    assert main(prune) == 2
    assert "no undamaged checkpoint; nothing is removed" in capsys.readouterr().err
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    assert main(["checkpoint", "list", str(tmp_path / "nowhere")]) == 2
