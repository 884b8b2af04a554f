"""Reads global batches ahead of the step, in one background thread a rank. m: micro-batch, T: tokens a sequence."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

AHEAD = 2  # steps that may be read before they are needed
_PATIENCE = 10.0  # seconds that `close` waits for what is still being read


class Loader:
    """`take` returns this rank's part of one step after the other, on the device.

    When step s is taken, the thread may go on up to step s + AHEAD, and it reads all that it may, whatever happens
    meanwhile: wherever training stops, every rank's thread has read the same steps. So `read` may be collective.
    """

    def __init__(self, read: Callable[[int], np.ndarray], first: int, last: int, device: torch.device) -> None:
        """read(step): int64 [accumulation, m, T+1], called for steps `first` to `last` - 1 in order."""
        self._read, self._device = read, device
        self._next, self._last = first, last
        self._allowed = min(first + AHEAD, last)  # the first step that may not be read yet
        self._closing = False
        self._changed = threading.Condition()
        self._ready: SimpleQueue[tuple[Tensor, torch.cuda.Event | None] | BaseException] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(first,), name="loader", daemon=True)
        self._thread.start()

    def take(self) -> Tensor:
        """Return the next step, int64 [accumulation, m, T+1]; waits for it. Raises what `read` raised."""
        if self._next >= self._last:
            raise ValueError(f"step {self._next} of {self._last}")
        found = self._ready.get()
        if isinstance(found, BaseException):
            self._ready.put(found)  # the thread has ended: asked again, this is still the answer
            raise found
        self._next += 1
        with self._changed:
            self._allowed = min(self._next + AHEAD, self._last)
            self._changed.notify()
        batch, copied = found
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            batch.record_stream(stream)
        return batch

    def close(self) -> bool:
        """End the thread, which finishes what it reads; one that hangs (a file system, a lost rank) is left behind.

        Returns whether it has ended.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_PATIENCE)
        return not self._thread.is_alive()

    def _work(self, step: int) -> None:
        try:
            on_gpu = self._device.type == "cuda"
            if on_gpu:
                torch.cuda.set_device(self._device)  # a thread's own setting, which pinning memory goes by
            stream = torch.cuda.Stream(self._device) if on_gpu else None
            while self._may_read(step):
                self._ready.put(self._on_device(self._read(step), stream))
                step += 1
        except BaseException as error:
            self._ready.put(error)

    def _may_read(self, step: int) -> bool:
        """Waits until it may, or until there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: step < self._allowed or self._closing)
            return step < self._allowed

    def _on_device(self, rows: np.ndarray, stream: torch.cuda.Stream | None) -> tuple[Tensor, torch.cuda.Event | None]:
        """Copied beside what the GPU computes; `take` lets the network wait for the copy."""
        batch = torch.from_numpy(rows)
        if stream is None:
            return batch.to(self._device), None
        with torch.cuda.stream(stream):
            return batch.pin_memory().to(self._device, non_blocking=True), stream.record_event()
