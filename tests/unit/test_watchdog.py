"""A run that makes no progress is ended; one that was suspended is not."""

import os
import signal
import subprocess
import sys
import time

SUSPENDED = """
import os, signal, time
from l2e_ds.distributed import heartbeat, watchdog
watchdog.INTERVAL = 0.1
with watchdog.Watchdog(1.5 / 60):
    os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(5):  # a step that takes a while, then
        time.sleep(0.1)
    heartbeat.progress("the step after waking")
    print("alive", flush=True)
    time.sleep(600)
"""


def test_time_in_which_a_process_was_suspended_does_not_count():
    """A suspension does not hide a hang that follows."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SUSPENDED], stdout=pipe, stderr=pipe, text=True) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        time.sleep(3)  # twice the timeout
        process.send_signal(signal.SIGCONT)
        said, why = process.communicate(timeout=60)
    assert (said, process.returncode) == ("alive\n", 1)
    assert why == ("l2e-ds: error: rank 0: no progress for 0.025 minutes (training.timeout) in the step after waking\n")
