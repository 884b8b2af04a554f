"""Read global batches ahead of the step, in one background thread per rank (docs/data.md).

Shapes: B sequences per micro-batch, T tokens per sequence.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

AHEAD = 2  # steps that may be read before they are needed
_PATIENCE = 10.0  # seconds that `close` waits for the step that is being read


class Loader:
    """Reads this rank's part of one step after the other, copies it to the device, and returns it from `take`.

    When step s is taken, the thread may read up to step s + AHEAD, and it reads all that it may, whatever happens
    meanwhile. Wherever training stops, every rank's thread has therefore read the same steps, so `read` may be
    collective.
    """

    def __init__(self, read: Callable[[int], np.ndarray], first: int, last: int, device: torch.device) -> None:
        """Start the thread. read(step): returns int64 [accumulation, B, T+1], for `first` to `last` - 1, in order."""
        self._read, self._device = read, device
        self._next, self._last = first, last
        self._allowed = min(first + AHEAD, last)  # the first step that may not be read yet
        self._closing = False
        self._changed = threading.Condition()
        self._ready: SimpleQueue[tuple[Tensor, torch.cuda.Event | None] | BaseException] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(first,), name="loader", daemon=True)
        self._thread.start()

    def take(self) -> Tensor:
        """Wait for the next step, and return it, int64 [accumulation, B, T+1] on the device. Raises what `read` raised,
        and ValueError after the last step."""
        if self._next >= self._last:
            raise ValueError(f"Loader.take: step {self._next} comes after the last one, {self._last - 1}")
        found = self._ready.get()
        if isinstance(found, BaseException):
            self._ready.put(found)  # the thread has ended, and every further call must raise the same
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
        """End the thread after the step that it is reading, and return whether it has ended: one that hangs, in a file
        system or with a lost rank, is left behind after some seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_PATIENCE)
        return not self._thread.is_alive()

    def _work(self, step: int) -> None:
        try:
            on_gpu = self._device.type == "cuda"
            if on_gpu:
                torch.cuda.set_device(self._device)  # each thread's own setting, used to pin memory
            stream = torch.cuda.Stream(self._device) if on_gpu else None
            while self._may_read(step):
                self._ready.put(self._on_device(self._read(step), stream))
                step += 1
        except BaseException as error:
            self._ready.put(error)

    def _may_read(self, step: int) -> bool:
        """Wait until the step may be read or the loader is being closed, and return whether it may."""
        with self._changed:
            self._changed.wait_for(lambda: step < self._allowed or self._closing)
            return step < self._allowed

    def _on_device(self, rows: np.ndarray, stream: torch.cuda.Stream | None) -> tuple[Tensor, torch.cuda.Event | None]:
        """Return the rows on the device, and an event that follows the copy if that runs beside other GPU work."""
        batch = torch.from_numpy(rows)
        if stream is None:
            return batch.to(self._device), None
        with torch.cuda.stream(stream):
            return batch.pin_memory().to(self._device, non_blocking=True), stream.record_event()
