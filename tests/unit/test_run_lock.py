"""Two runs never write to one directory; a dead run's lock holds nobody up."""

import errno
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from l2e_ds.errors import ConfigError, SaveError
from l2e_ds.run_directory import lock as run_directory_lock
from l2e_ds.run_directory.lock import RunLock
from tests.processes import lock_held


def test_the_second_is_refused_until_the_first_has_ended(tmp_path, monkeypatch):
    with lock_held(tmp_path) as holder, pytest.raises(ConfigError) as refused:
        RunLock(tmp_path).acquire()
    assert re.search(f"another run is writing to .* process {holder.pid}", str(refused.value))
    lock = RunLock(tmp_path)  # the killed run left its file behind
    monkeypatch.setattr(
        run_directory_lock.time, "sleep", lambda _: pytest.fail("waits for a process that is known to be dead")
    )
    lock.acquire()
    assert json.loads(lock.path.read_text())["process"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_whether_it_is_free(tmp_path):
    with lock_held(tmp_path) as holder:
        assert f"process {holder.pid}" in str(RunLock(tmp_path).why_not_free())
    assert RunLock(tmp_path).why_not_free() is None
    (tmp_path / "file").touch()
    assert "cannot write" in str(RunLock(tmp_path / "file").why_not_free())


def test_a_lock_that_cannot_be_written_is_not_held(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    lock = RunLock(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run_directory_lock.os, "pwrite", full)
        assert "No space left" in str(lock.why_not_free())
    with lock_held(tmp_path):  # another process can take it
        pass


def test_another_host_s_lock_counts_as_long_as_it_is_renewed(tmp_path, monkeypatch):
    """Act as on a file system where hosts do not see each other's locks."""
    monkeypatch.setattr(run_directory_lock, "WATCHED_FOR", 3)
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "another", "process": 1, "since": "yesterday"}))
    touch = subprocess.Popen(["bash", "-c", f"while true; do sleep 0.5; touch -c '{path}'; done"])
    try:
        with pytest.raises(ConfigError, match="host another, process 1"):
            RunLock(tmp_path).acquire()
    finally:
        touch.kill()
        touch.wait()
    assert json.loads(path.read_text())["host"] == "another"
    lock = RunLock(tmp_path)
    lock.acquire()  # it has stopped: the host is dead
    lock.release()


def test_a_run_that_was_frozen_leaves_the_lock_to_the_one_that_took_it(tmp_path, monkeypatch):
    """On a file system without locks the newest one to look at a lock that is not renewed takes it."""
    monkeypatch.setattr(run_directory_lock, "WATCHED_FOR", 1)
    monkeypatch.setattr(run_directory_lock.fcntl, "lockf", raise_no_locks)
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    monkeypatch.setattr(run_directory_lock.socket, "gethostname", lambda: "frozen")
    first.acquire()
    first.renew()
    assert not first.is_taken()
    monkeypatch.setattr(run_directory_lock.socket, "gethostname", lambda: "awake")
    second.acquire()
    assert first.is_taken() and not second.is_taken()
    first.release()
    assert json.loads(second.path.read_text())["host"] == "awake" and not second.is_taken()
    second.release()
    assert list(tmp_path.iterdir()) == []


def raise_no_locks(*_: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def test_a_lock_that_is_removed_by_hand_is_nobody_s_and_one_that_is_made_again_is_another_s(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.path.unlink()
    assert not lock.is_taken()
    with RunLock(tmp_path) as another:
        assert lock.is_taken() and not another.is_taken()
        lock.release()
        assert another.path.exists()


def test_a_lock_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(SaveError, match="the disk is full"), RunLock(tmp_path):
        raise SaveError("the disk is full")
