"""Starting real runs in the background, watching them, and finding every process that they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]


class Launch:
    """A started command; `log` is what it said."""

    def __init__(self, log: Path, *command: object, **environment: str) -> None:
        scripts = str(Path(sys.executable).parent)
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "PATH": scripts + os.pathsep + os.environ["PATH"],
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
            **environment,
        }
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                list(map(str, command)), env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        self.seen: dict[int, psutil.Process] = {}

    def said(self) -> str:
        return self.log.read_text()

    def find(self, *words: str) -> list[psutil.Process]:
        """Its processes with all these words in their command lines, in the order of their ids."""
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
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.said()[-3000:]}"
            assert time.monotonic() < deadline, self.said()[-3000:]
            time.sleep(0.02)
        self.find("python")  # remember all that are there

    def end(self, timeout: float = 120) -> int:
        """Its exit code; nothing that it started may be alive then."""
        code = self.process.wait(timeout)
        alive = [p for p in self.seen.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert not alive, f"orphans: {alive}\n{self.said()[-3000:]}"
        return code


def lines(run: Path, kind: str = "train") -> list[dict]:
    path = run / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in found if line["kind"] == kind]


def newest(run: Path) -> int:
    return max((line["step"] for line in lines(run)), default=0)


def saved(run: Path) -> int:
    return int((run / "checkpoints/latest").read_text().strip().removeprefix("step"))
