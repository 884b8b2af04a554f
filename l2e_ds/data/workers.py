"""An ordered map over worker processes, in constant memory, of which none outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

from l2e_ds.errors import L2EError, WorkerError
from l2e_ds.system.process import serve_parent, without_stop_signals

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 3  # items submitted for each worker: enough to keep it busy, few enough to keep memory constant


class WorkerPool(Generic[Item, Result]):
    """Applies a function to items in `count` processes, or in this process if `count` is 0. A context manager.

    make_function: a module-level callable; make_function(*arguments) makes the function, once in each process.
    The processes are spawned at the first `map`, so that they inherit neither threads nor signal handlers nor open
    files. They ignore the signals that stop a run, and end with their parent.
    """

    def __init__(self, count: int, make_function: Callable[..., Callable[[Item], Result]], *arguments: Any) -> None:
        self.count = count
        self._make_function, self._arguments = make_function, arguments
        self._own_function: Callable[[Item], Result] | None = None
        self._executor: ProcessPoolExecutor | None = None

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results in the order of the items, of which only a few for each worker are taken ahead.

        Raises what the function raises, an L2EError of the items after the results of all items before it, and
        WorkerError if a worker dies.
        """
        if self.count == 0:
            self._own_function = self._own_function or self._make_function(*self._arguments)
            yield from map(self._own_function, items)
            return
        if self._executor is None:
            with without_stop_signals():  # the executor's locks start multiprocessing's tracker: a signal would end it
                try:
                    self._executor = ProcessPoolExecutor(
                        self.count,
                        mp_context=multiprocessing.get_context("spawn"),
                        initializer=_start,
                        initargs=(self._make_function, self._arguments),
                    )
                except OSError as error:  # it does not name /dev/shm, where its locks are files
                    raise WorkerError(f"/dev/shm, where worker processes keep their locks: {error.strerror}") from None
        pending: deque[Future[Result]] = deque()
        failures: list[L2EError] = []

        def items_before_failure() -> Iterator[Item]:
            try:
                yield from items
            except L2EError as error:
                failures.append(error)

        try:
            for item in items_before_failure():
                with without_stop_signals():  # a signal would end a process that is just starting
                    pending.append(self._executor.submit(_apply, item))
                if len(pending) > _AHEAD * self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
            if failures:
                raise failures[0]
        except BrokenProcessPool:
            self._kill()
            raise WorkerError(
                f"one of {self.count} worker processes was killed (out of memory?); start again to resume, with fewer"
                " workers or more memory"
            ) from None
        finally:
            for future in pending:
                future.cancel()

    def __enter__(self) -> WorkerPool[Item, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kill(self) -> None:
        """Kill all workers. (The executor sends SIGTERM, which ours ignore, and would wait for them for ever.)"""
        assert self._executor is not None
        for process in list((self._executor._processes or {}).values()):
            process.kill()
        self.close()

    def close(self) -> None:
        """End the processes. The next `map` starts new ones."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None


_function: Callable[[Any], Any]  # of a worker process


def _start(make_function: Callable[..., Callable[[Any], Any]], arguments: tuple) -> None:
    global _function
    serve_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _function = make_function(*arguments)


def _apply(item: Any) -> Any:
    return _function(item)


def default_workers() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
