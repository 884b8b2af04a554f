"""Worker processes: order, errors, signals, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import psutil
import pytest

from l2e_ds.data.workers import WorkerPool
from l2e_ds.errors import DataError, WorkerError


def multiply_by(factor: int) -> Callable[[int], int]:
    def multiply(number: int) -> int:
        if number == 77:
            raise DataError("77 is refused")
        if number == 99:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02 * (number % 3))  # so that they do not end in order
        return number * factor

    return multiply


@pytest.mark.parametrize("number_of_workers", [0, 2])
def test_in_order_and_only_a_few_ahead(number_of_workers):
    taken = []

    def numbers():
        for number in range(30):
            taken.append(number)
            yield number

    with WorkerPool(number_of_workers, multiply_by, 3) as pool:
        results = pool.map(numbers())
        assert [next(results) for _ in range(5)] == [0, 3, 6, 9, 12]
        assert len(taken) <= 5 + 3 * number_of_workers + 1
        assert list(results) == [3 * number for number in range(5, 30)]
        with pytest.raises(DataError, match="77 is refused"):
            list(pool.map(range(70, 80)))
        assert list(pool.map([1, 2])) == [3, 6]  # it can be used again
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_a_killed_worker_is_an_error():
    with WorkerPool(2, multiply_by, 3) as pool:
        with pytest.raises(WorkerError, match="worker processes was killed"):
            list(pool.map(range(95, 105)))
        assert list(pool.map([1, 2])) == [3, 6]


def test_a_worker_killed_from_outside_while_all_are_busy():
    """Both are started and ignore SIGTERM, with which the pool would end the other one."""
    with WorkerPool(2, multiply_by, 3) as pool:
        results = pool.map(number % 50 for number in count())
        for _ in range(50):
            next(results)
        workers = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
        assert len(workers) == 2
        workers[0].kill()
        with pytest.raises(WorkerError):
            for _ in range(1000):
                next(results)
    assert not any(worker.is_running() for worker in workers)


SCRIPT = """
    import sys, time
    from l2e_ds.data.workers import WorkerPool

    def slow(number):
        time.sleep(0.1)
        return number

    def make_slow():
        return slow

    if __name__ == "__main__":
        import signal
        signal.signal(signal.SIGUSR1, lambda *_: None)  # as a run that notes it
        print("begin", flush=True)
        with WorkerPool(2, make_slow) as pool:
            for number in pool.map(range(int(sys.argv[1]))):
                print(number, flush=True)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))

    def start(count: int) -> subprocess.Popen:
        repository = str(Path(__file__).resolve().parents[3])
        return subprocess.Popen(
            [sys.executable, str(path), str(count)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": repository},
        )

    return start


def test_signals_to_the_group_leave_the_workers_alone(script):
    process = script(10)
    assert process.stdout.readline() == "begin\n"
    for _ in range(40):  # while they start, and while they work
        os.killpg(process.pid, signal.SIGUSR1)
        time.sleep(0.02)
    assert process.stdout.read().split() == [str(number) for number in range(10)]
    assert process.wait(600) == 0


@pytest.mark.full
def test_workers_end_with_a_parent_that_is_killed(script):
    process = script(1000)
    while process.stdout.readline() != "3\n":
        pass
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=600)
    assert not alive
