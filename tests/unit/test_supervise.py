"""How the supervisor interprets exit codes, stop files and silence."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from l2e_ds.run_directory.stop_file import ask_to_stop, is_asked_to_restart, is_asked_to_stop, stop_file
from l2e_ds.supervise.processes import SignsOfLife, processor_seconds
from l2e_ds.supervise.supervisor import End, judge, killed_by, wait_until_free
from tests.processes import lock_held


@pytest.mark.parametrize(
    "code, noted, asked, restart, step, outcome",
    [
        (0, [], False, False, 10, 0),
        (0, [], False, False, 5, 1),  # a launcher's 0 is not believed
        (1, [75, 75], True, False, 5, 75),
        (1, [75, 75], False, False, 5, 75),  # torchrun: somebody signalled a rank
        (1, [75, 75], False, True, 5, 1),  # another host's part is to be started again: so is this one
        (1, [75, 75], True, True, 5, 75),
        (0, [75], False, True, 10, 0),  # it had come to its end
        (-15, [75], False, False, 5, 75),
        (-9, [75], False, False, 5, 137),
        (1, [3], False, True, 5, 3),
        (247, [], False, False, 5, 247),
    ],
)
def test_judge(code, noted, asked, restart, step, outcome):
    assert judge(End(code, noted, asked, restart), step, 10)[0] == outcome


@pytest.mark.parametrize(
    "code, name",
    [(-9, "SIGKILL"), (-15, "SIGTERM"), (247, "SIGKILL"), (250, "SIGABRT"), (255, None), (251, None), (1, None)],
)
def test_the_signal_behind_an_exit_code(code, name):
    killer = killed_by(code)
    assert (killer and killer.name) == name


def test_a_wish_that_is_taken_back_meanwhile_is_no_wish_to_stop(tmp_path, monkeypatch):
    """The supervisor removes its file between any two looks of a rank at it."""
    ask_to_stop(tmp_path, to_restart=True)

    def then_removed(look):
        def look_and_remove(path, *arguments, **keywords):
            found = look(path, *arguments, **keywords)
            if path.parent == tmp_path:
                path.unlink(missing_ok=True)
            return found

        return look_and_remove

    with monkeypatch.context() as patch:
        for name in ("exists", "read_text"):
            patch.setattr(Path, name, then_removed(getattr(Path, name)))
        asked = is_asked_to_stop(tmp_path)
    assert not asked and list(tmp_path.iterdir()) == []


def test_a_wish_to_restart_never_replaces_a_wish_to_stop(tmp_path):
    run = tmp_path / "new"
    assert not is_asked_to_restart(run) and not is_asked_to_stop(run)
    ask_to_stop(run, to_restart=True)
    assert is_asked_to_restart(run) and not is_asked_to_stop(run)
    ask_to_stop(run)
    assert is_asked_to_stop(run) and not is_asked_to_restart(run)
    ask_to_stop(run, to_restart=True)
    assert is_asked_to_stop(run) and not is_asked_to_restart(run)


def test_a_wish_to_stop_counts_also_while_a_restart_waits(tmp_path, monkeypatch):
    """Ranks on other hosts may hold the directory after a failure, and the user may think better of the run."""
    for is_asked in (True, False):
        with lock_held(tmp_path) as holder, monkeypatch.context() as patch:

            def ends_meanwhile(_, holder=holder, is_asked=is_asked):
                if is_asked:
                    ask_to_stop(tmp_path)
                holder.kill()
                holder.wait()

            patch.setattr("l2e_ds.supervise.supervisor.time.sleep", ends_meanwhile)
            assert wait_until_free(tmp_path, patience=60) is is_asked
        assert not stop_file(tmp_path).exists()


def test_a_suspended_supervisor_has_seen_no_silence(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("l2e_ds.supervise.processes.time.monotonic", lambda: now)
    lock = tmp_path / "lock"
    lock.touch()
    life = SignsOfLife(tmp_path)
    for moment in range(4):
        os.utime(lock, (moment, moment))
        now += 1
        assert not life.are_missing_for(10)
    now += 3600
    for _ in range(10):
        assert not life.are_missing_for(10)
        now += 1
    now += 1
    assert life.are_missing_for(10)


def test_signs_of_life(tmp_path, monkeypatch):
    """The clock stands still but for `look`, so that nothing depends on how much a machine gets done in a second."""
    now, patience = 1000.0, 10
    monkeypatch.setattr("l2e_ds.supervise.processes.time.monotonic", lambda: now)
    lock = tmp_path / "lock"
    lock.touch()

    def look(life: SignsOfLife) -> bool:
        nonlocal now
        now += 1
        return life.are_missing_for(patience)

    never_renewed = SignsOfLife(tmp_path)
    assert not any(look(never_renewed) for _ in range(2 * patience))

    busy = psutil.Popen([sys.executable, "-c", "while True: pass"])
    try:
        life = SignsOfLife(tmp_path)
        for moment in range(4):
            os.utime(lock, (moment, moment))
            assert not look(life)
        for _ in range(2 * patience):
            used = processor_seconds()
            while processor_seconds() < used + 0.02:
                time.sleep(0.01)
            assert not look(life)
        busy.send_signal(signal.SIGSTOP)  # nothing renews the lock, nothing works
        while busy.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        missing = [look(life) for _ in range(patience + 2)]
        assert not any(missing[:patience]) and missing[-1]
    finally:
        busy.kill()
        busy.wait()
