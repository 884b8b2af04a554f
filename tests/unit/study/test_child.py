"""Commands that a study starts, and their end."""

import os
import time

import psutil

from l2e_ds.study.processes import Child


def test_all_that_was_started_ends(tmp_path):
    log = tmp_path / "logs/one.log"
    one = Child(["sh", "-c", "sleep 300 & echo $!; wait"], os.environ, log)
    while not log.read_text().endswith("\n"):
        time.sleep(0.02)
    sleeper = psutil.Process(int(log.read_text()))
    one.kill()
    assert one.process.poll() is not None
    assert not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE


def test_a_command_that_has_ended_by_itself():
    one = Child(["true"], os.environ)
    assert one.process.wait(timeout=600) == 0
    one.kill()  # its number is nobody's, or another process's by now
    assert one.process.returncode == 0
