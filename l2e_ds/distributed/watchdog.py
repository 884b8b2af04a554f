"""Say which rank is lost, and end a run that makes no progress.

A thread on every rank tells a small store, held by rank 0, what its main thread is doing. Ranks 0 and 1 read it: a
rank that falls silent was killed, stopped or cut off. A rank that has made no progress for `training.timeout` ends its
process, so that the launcher can start again; without this, ranks wait in a collective for one that will
never come.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from l2e_ds.console import say
from l2e_ds.distributed import collectives, heartbeat

INTERVAL = 2.0
"""Seconds between two reports of a rank."""
SILENT = 3.5 * INTERVAL
"""Seconds without a report after which a rank counts as silent."""
EXIT_CODE = 1

_LOST_CONTACT = re.compile(r"connection|timed? ?out|peer|socket|gloo|nccl", re.IGNORECASE)


class Watchdog:
    """Watches this rank between `__enter__` and `__exit__`, and the other ranks from `meet` on."""

    def __init__(self, timeout_minutes: float) -> None:
        self.timeout = 60 * timeout_minutes
        self.at_every_interval: Callable[[], None] = lambda: None
        """Called at every interval, e.g. to give others a sign of life."""
        self._reports: dict[int, dict[str, Any]] = {}  # the newest report of every rank
        self._changed: dict[int, float] = {}  # when each report last changed, by this rank's clock
        self._missed: set[int] = set()  # ranks that were reported as silent
        self._store: Any = None
        self._beats = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        heartbeat.progress("starting")
        self._thread.start()
        return self

    def meet(self) -> None:
        """Begin to exchange reports with the other ranks. Collective."""
        if collectives.size() > 1:
            store = _make_store()
            # every rank's first report is known, and in the store, before any rank can be lost
            self._reports = dict(enumerate(collectives.all_gather_objects(self._write_report(store))))
            self._changed = dict.fromkeys(self._reports, time.monotonic())
            self._store = store

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if is_lost_contact(error):
            self._name_the_lost()
        self._over.set()
        self._thread.join(timeout=2 * INTERVAL)

    def _name_the_lost(self) -> None:
        """Wait until it is known which ranks are gone, and print it."""
        deadline = time.monotonic() + SILENT + 2 * INTERVAL
        while self._reads and not self._missed and time.monotonic() < deadline:
            time.sleep(0.1)

    @property
    def _reads(self) -> bool:
        """Whether this rank reads the reports: 0 does, and 1 in case rank 0 is the lost one."""
        return self._store is not None and collectives.rank() <= 1

    @property
    def _speaks(self) -> bool:
        return self._reads and (collectives.rank() == 0 or 0 in self._silent())

    # --- the thread ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._is_over():
            for part in (self.at_every_interval, self._report, self._look):
                with contextlib.suppress(Exception):  # no failure of one may prevent the others or the check below
                    part()
            if heartbeat.idle_seconds() > self.timeout:
                try:
                    self._say_why()
                finally:
                    os._exit(EXIT_CODE)

    def _is_over(self) -> bool:
        """Wait for an interval and return whether the watch is over.

        If that takes longer, this process was suspended, and perhaps the others with it: the time does not count.
        """
        begin = time.monotonic()
        over = self._over.wait(INTERVAL)
        late = max(0.0, time.monotonic() - begin - INTERVAL)
        heartbeat.excuse(late)
        changed = self._changed
        for rank in changed:
            changed[rank] += late
        return over

    def _report(self) -> None:
        if self._store is not None:
            self._write_report(self._store)

    def _look(self) -> None:
        if self._reads:
            self._read()
            self._name_silent()

    def _write_report(self, store: Any) -> dict[str, Any]:
        self._beats += 1
        report = {
            "beats": self._beats,
            "doing": heartbeat.doing(),
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
        store.set(str(collectives.rank()), json.dumps(report))
        return report

    def _read(self) -> None:
        now = time.monotonic()
        try:
            found = self._store.multi_get([str(rank) for rank in self._reports])
        except Exception:
            return  # then rank 0's report does not change either, which shows below
        if collectives.rank() > 0:
            self._changed[0] = now  # rank 0 holds the store, which has answered
        for rank, raw in zip(self._reports, found, strict=True):
            report = json.loads(raw)
            if report != self._reports[rank]:
                self._reports[rank], self._changed[rank] = report, now

    def _silent(self) -> list[int]:
        now = time.monotonic()
        silent = [rank for rank, at in self._changed.items() if now - at > SILENT and rank != collectives.rank()]
        # without rank 0 there is no store: nothing is known of the others
        return [0] if 0 in silent else silent

    def _name_silent(self) -> None:
        if not self._speaks:
            return
        silent = set(self._silent())
        for rank in sorted(silent - self._missed):
            _say(f"{self._who(rank)} has been silent for {SILENT:.0f} s: killed, stopped or cut off")
        self._missed = silent

    def _say_why(self) -> None:
        minutes = self.timeout / 60
        if self._speaks:
            silent = self._silent()
            where: dict[str, list[int]] = defaultdict(list)
            for rank, report in sorted(self._reports.items()):
                if rank not in silent:
                    where[report["doing"]].append(rank)
            lost = [f"{self._who(rank)} is silent" for rank in silent]
            busy = [f"{_ranks(ranks)} in {doing}" for doing, ranks in where.items()]
            _say(f"no progress for {minutes:g} minutes (training.timeout): {'; '.join([*lost, *busy])}", "error")
        elif self._store is None:
            _say(f"no progress for {minutes:g} minutes (training.timeout) in {heartbeat.doing()}", "error")

    def _who(self, rank: int) -> str:
        report = self._reports[rank]
        return f"rank {rank} (host {report['host']}, process {report['process']}, last seen in {report['doing']})"


def is_lost_contact(error: BaseException | None) -> bool:
    """Return whether a collective failed because a rank is gone, which each backend words in its own way."""
    known = isinstance(error, RuntimeError) and collectives.size() > 1
    return known and _LOST_CONTACT.search(str(error)) is not None


def _make_store() -> Any:
    address, limit = os.environ["MASTER_ADDR"], timedelta(seconds=SILENT)
    store = None
    if collectives.is_main():
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=limit)
    port = collectives.broadcast_object(store.port if store else None)
    return store or dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"{len(ranks)} ranks ({shown})"


def _say(text: str, kind: str = "warning") -> None:
    say(f"l2e-ds: {kind}: rank {collectives.rank()}: {text}")
