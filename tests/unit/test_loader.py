"""The loader's order, its bound and its end. Steps are told apart by the number in their rows."""

import threading
import time

import numpy as np
import pytest
import torch

from l2e_ds.errors import DataError
from l2e_ds.training.loader import AHEAD, Loader

CPU = torch.device("cpu")


class Reader:
    """Reads steps; notes which, and where; stops at `gate` until it is opened; fails at step `bad`."""

    def __init__(self, bad=None):
        self.steps, self.threads, self.bad = [], set(), bad
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, step):
        self.threads.add(threading.current_thread())
        assert self.gate.wait(600)
        if step == self.bad:
            raise DataError(f"tokens.bin: step {step} is broken")
        self.steps.append(step)
        return np.full((2, 3, 5), step, dtype=np.int64)


def wait_until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_steps_come_in_order_and_never_too_early():
    reader = Reader()
    loader = Loader(reader, 4, 20, CPU)
    for step in range(4, 20):
        wait_until(lambda step=step: len(reader.steps) == min(step - 4 + AHEAD, 16))
        batch = loader.take()
        assert batch.shape == (2, 3, 5) and batch.dtype == torch.int64
        assert bool((batch == step).all())
        assert len(reader.steps) <= step + 1 + AHEAD - 4
    loader.close()
    assert reader.steps == list(range(4, 20))
    with pytest.raises(ValueError, match="step 20 comes after the last one, 19"):
        loader.take()


@pytest.mark.parametrize("taken", [0, 1, 3, 9, 10])
@pytest.mark.parametrize("slow", [False, True])
def test_whenever_it_is_closed_the_same_steps_were_read(taken, slow):
    """However far the thread had come: up to AHEAD steps after the one taken last."""
    reader = Reader()
    loader = Loader(reader, 0, 10, CPU)
    for _ in range(taken):
        loader.take()
    if slow:
        reader.gate.clear()
        threading.Timer(0.05, reader.gate.set).start()
    loader.close()
    assert reader.steps == list(range(min(taken + AHEAD, 10)))
    assert not any(thread.is_alive() for thread in reader.threads)


def test_take_waits_for_a_slow_reader():
    reader = Reader()
    reader.gate.clear()
    loader = Loader(reader, 0, 3, CPU)
    threading.Timer(0.05, reader.gate.set).start()
    assert int(loader.take()[0, 0, 0]) == 0
    loader.close()


def test_an_error_comes_at_its_step_unchanged_and_again():
    reader = Reader(bad=2)
    loader = Loader(reader, 0, 10, CPU)
    wait_until(lambda: len(reader.steps) == 2)
    assert [int(loader.take()[0, 0, 0]) for _ in range(2)] == [0, 1]
    raised = []
    for _ in range(2):
        with pytest.raises(DataError, match=r"^tokens\.bin: step 2 is broken$") as caught:
            loader.take()
        raised.append(caught.value)
    assert raised[0] is raised[1]
    loader.close()
    assert not any(thread.is_alive() for thread in reader.threads)


def test_nothing_is_read_of_a_run_that_is_over():
    reader = Reader()
    loader = Loader(reader, 7, 7, CPU)
    loader.close()
    assert reader.steps == [] and not reader.threads
