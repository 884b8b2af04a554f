"""An ordered map over worker processes: flat memory, and no process that outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Generic, TypeVar

from l2e_ds.errors import WorkerError
from l2e_ds.system.process import serve_parent, without_stop_signals

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 3  # items under way for each worker: enough to keep it busy, few enough to keep memory flat


class WorkerPool(Generic[Item, Result]):
    """`count` processes that apply `function` to items. A context manager.

    The processes are spawned, at the first `map`: they inherit neither threads nor signal handlers nor open files.
    `function` and `setup` are module-level functions; setup(*arguments) runs once in each process. With `count` 0
    everything happens in this process. Workers leave the signals that stop a run to their parent, and end with it.
    """

    def __init__(
        self, count: int, function: Callable[[Item], Result], setup: Callable[..., None], *arguments: Any
    ) -> None:
        self.count = count
        self._function, self._setup, self._arguments = function, setup, arguments
        self._executor: ProcessPoolExecutor | None = None
        self._is_set_up = False

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """The results in the order of the items. Raises what `function` raises, and WorkerError where a worker dies.

        Items are taken as results are: at most a few for each worker are under way.
        """
        if self.count == 0:
            if not self._is_set_up:
                self._setup(*self._arguments)
                self._is_set_up = True
            yield from map(self._function, items)
            return
        if self._executor is None:
            with without_stop_signals():  # its locks start multiprocessing's tracker, which would die of them
                try:
                    self._executor = ProcessPoolExecutor(
                        self.count,
                        mp_context=multiprocessing.get_context("spawn"),
                        initializer=_start,
                        initargs=(self._setup, self._arguments),
                    )
                except OSError as error:  # its locks are files there, which it does not name
                    raise WorkerError(f"/dev/shm, where worker processes keep their locks: {error.strerror}") from None
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                with without_stop_signals():  # a process that starts now would die of them
                    waiting.append(self._executor.submit(self._function, item))
                if len(waiting) > _AHEAD * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            self._kill()
            raise WorkerError(
                f"one of {self.count} worker processes was killed (out of memory?); start again to go on, with fewer"
                " workers or more memory"
            ) from None
        finally:
            for future in waiting:
                future.cancel()

    def __enter__(self) -> WorkerPool[Item, Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _kill(self) -> None:
        """The pool ends broken workers by SIGTERM, which ours leave to their parent, and waits for them for ever."""
        assert self._executor is not None
        for process in list((self._executor._processes or {}).values()):
            process.kill()
        self.close()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None


def _start(setup: Callable[..., None], arguments: tuple) -> None:
    serve_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    setup(*arguments)


def default_workers() -> int:
    """As many as this process may use cores."""
    return len(os.sched_getaffinity(0))
