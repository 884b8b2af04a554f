"""The folder in which one process at a time prepares data, as others take, move or remove it at the same moment."""

import errno
import fcntl
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from l2e_ds.data import token_files


@pytest.mark.parametrize("window", ["mkdir", "listdir", "open"])
def test_another_process_removes_the_folder_at_any_step(tmp_path, monkeypatch, window):
    """Before the step that looks at the folder, as a process does that has just finished and moved it."""
    folder, real, done = tmp_path / "set.partial", getattr(os, window), []
    folder.mkdir()

    def late(path, *arguments, **keywords):
        if Path(path) in (folder, folder / token_files.LOCK) and not done:
            done.append(path)
            shutil.rmtree(folder)
        return real(path, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, window, late)
        with token_files.Exclusive(folder, wait=True) as own:
            assert done and (own.folder / token_files.LOCK).exists()


def test_what_nfs_shows_when_another_host_removes_the_folder(tmp_path, monkeypatch):
    """A file that was removed while open is called .nfs...; the lock of a removed file is stale. Simulated."""
    folder, real, stale = tmp_path / "set.partial", fcntl.flock, [True]
    folder.mkdir()
    (folder / ".nfs0001").touch()

    def flock(*arguments):
        if stale:
            stale.clear()
            (folder / token_files.LOCK).unlink()
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    with token_files.Exclusive(folder) as own:
        assert not stale and (own.folder / token_files.LOCK).exists()


@pytest.mark.parametrize("is_moved", [True, False])
def test_many_take_turns(tmp_path, is_moved):
    """Each finds the folder empty, is alone in it, and leaves none of it."""
    folder, turns, alone = tmp_path / "set.partial", 10, threading.Lock()

    def work(number):
        for turn in range(turns):
            with token_files.Exclusive(folder, wait=True) as own:
                assert alone.acquire(blocking=False)
                assert os.listdir(own.folder) == [token_files.LOCK]
                (own.folder / "train.bin").touch()
                (own.folder / "tokenizer").mkdir()
                alone.release()
                own.folder.rename(tmp_path / f"{number}-{turn}") if is_moved else own.remove()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(list(tmp_path.iterdir())) == (4 * turns if is_moved else 0)


def test_a_failure_after_the_folder_was_moved(tmp_path):
    """Removes nothing: another process may have made a folder of this name since."""
    folder = tmp_path / "set.partial"
    with pytest.raises(OSError, match="full"), token_files.Exclusive(folder) as own:
        own.folder.rename(tmp_path / "set")
        with token_files.Exclusive(folder) as other:
            (other.folder / token_files.JOURNAL).touch()
        (other.folder / token_files.JOURNAL).unlink()
        raise OSError("full")
    assert os.listdir(folder) == os.listdir(tmp_path / "set") == [token_files.LOCK]
