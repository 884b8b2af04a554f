"""Start real runs in the background, watch them, and find every process that they leave."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.processes import Forked, begin_ranks, environment, hear_all_signals

PATIENCE = 400
"""Seconds for what takes ten on a quiet machine: a test waits for things to happen, it does not time them."""


class Launch:
    """A started command, forked if it is `python ...`; `log` is the file of what it prints."""

    def __init__(self, log: Path, *command: object, **variables: str) -> None:
        self.log = log
        log.touch()
        words = [*map(str, command)]
        self.process: Forked | subprocess.Popen
        if words[0] == sys.executable:
            self.process = Forked(words[1:], environment(**variables), log)
        else:
            with log.open("w") as file:
                self.process = subprocess.Popen(
                    words,
                    env=environment(**variables),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    preexec_fn=hear_all_signals,
                )
        self.seen: dict[int, psutil.Process] = {}

    def said(self) -> str:
        return self.log.read_text()

    def find(self, *words: str) -> list[psutil.Process]:
        """Return its processes with all these words in their command lines, in the order of their ids."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            self.seen[process.pid] = process
            if all(any(word in part for part in line) for word in words):
                found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said()[-3000:]}"
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.02)
        self.find("python")  # remember all that are there

    def end(self, timeout: float = PATIENCE) -> int:
        """Wait for its end and return the exit code; no process that it started may be alive then."""
        code = self.process.wait(timeout)
        alive = [p for p in self.seen.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert not alive, f"orphans: {alive}\n{self.said()[-3000:]}"
        return code


class Ranks:
    """`python WORDS` on so many ranks without a launcher, which would end the others when one has failed."""

    def __init__(self, log: Path, count: int, *words: object, **variables: str) -> None:
        self.log = log
        log.touch()
        self.processes = begin_ranks(count, words, environment(**variables), log)

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            codes = [process.poll() for process in self.processes]
            assert codes == [None] * len(codes), f"ended with {codes}:\n{self.said()[-3000:]}"
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.02)

    def end(self, timeout: float = PATIENCE) -> list[int]:
        """Wait for the end of all and return the exit codes, in the order of ranks."""
        return [process.wait(timeout) for process in self.processes]


def lines(run: Path, kind: str = "train") -> list[dict]:
    path = run / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in found if line["kind"] == kind]


def newest(run: Path) -> int:
    return max((line["step"] for line in lines(run)), default=0)


def saved(run: Path) -> int:
    return int((run / "checkpoints/latest").read_text().strip().removeprefix("step"))
