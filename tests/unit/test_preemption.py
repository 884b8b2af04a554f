"""What a process hears and what its children do not."""

import subprocess
import sys

import pytest

from l2e_ds.errors import Interrupted

FORK = """
import os, signal
from l2e_ds.training import preemption
preemption.listen()
assert not preemption.is_asked()
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGUSR1)
try:
    preemption.stop_if_asked()
except preemption.Interrupted as stopped:
    print("alive:", stopped, flush=True)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), number)
        print("child survived", signal.Signals(number).name, flush=True)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("child ended with", code, flush=True)
"""


def test_forked_workers_do_not_inherit_the_handler():
    """SIGTERM ends a worker as its owner expects; SIGUSR1 and SIGHUP, which a scheduler and a terminal may send to all,
    leave it alone."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines() == [
        "alive: SIGUSR1 at rank 0",
        "child ended with -15",
        "child survived SIGUSR1",
        "child ended with 0",
        "child survived SIGHUP",
        "child ended with 0",
    ], done.stderr


HANGUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[1] == "nohup" else signal.SIG_DFL)
import l2e_ds.distributed.collectives
from l2e_ds.training import preemption
preemption.listen()
os.kill(os.getpid(), signal.SIGHUP)
try:
    preemption.stop_if_asked()
    print("goes on")
except preemption.Interrupted as stopped:
    print(stopped)
"""


@pytest.mark.parametrize(("how", "said"), [("plain", "SIGHUP at rank 0"), ("nohup", "goes on")])
def test_a_terminal_that_is_closed_is_a_wish_to_stop_but_for_nohup(how, said):
    done = subprocess.run([sys.executable, "-c", HANGUP, how], capture_output=True, text=True, timeout=600)
    assert done.stdout == f"{said}\n", done.stderr


LONELY = """
import os, time
os.environ["TORCHELASTIC_RUN_ID"] = "x"
import l2e_ds.distributed.collectives
from l2e_ds.training import preemption
preemption.listen()
read, write = os.pipe()
parent = os.getpid()
child = os.fork()
if child == 0:
    preemption.listen()
    print("before:", preemption.is_asked(), flush=True)
    os.write(write, b"x")
    while os.getppid() == parent:
        time.sleep(0.01)
    try:
        preemption.stop_if_asked()
    except preemption.Interrupted as stopped:
        print("after:", stopped, flush=True)
    os._exit(0)
os.read(read, 1)
os._exit(0)
"""


def test_a_rank_whose_launcher_is_gone_stops():
    done = subprocess.run([sys.executable, "-c", LONELY], capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines() == ["before: False", "after: the launcher of rank 0 is gone"], done.stderr


def test_stop_file_and_time_limit(tmp_path, monkeypatch):
    from l2e_ds.training import preemption

    monkeypatch.setattr(preemption.os, "register_at_fork", lambda **_: None)  # not for the rest of this process
    handlers = {number: preemption.signal.getsignal(number) for number in preemption.SIGNALS}
    try:
        preemption.listen()
        preemption.watch(tmp_path, None)
        preemption.stop_if_asked()
        (tmp_path / "stop").touch()
        with pytest.raises(Interrupted, match="stop was written"):
            preemption.stop_if_asked()
        preemption.honoured()
        preemption.stop_if_asked()
        preemption.watch(tmp_path, 1e-9)
        with pytest.raises(Interrupted, match="training.time_limit is over"):
            preemption.stop_if_asked()
    finally:
        for number, handler in handlers.items():
            preemption.signal.signal(number, handler)
