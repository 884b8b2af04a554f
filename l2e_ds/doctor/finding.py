"""Lines of `l2e-ds doctor`, and how errors, hosts and ranks are worded in them. Standard library only."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """Holds one line of the output; fix: a line for a shell, or "".

    state: "ok"; "note", which is worth knowing or concerns some runs only; "missing", without which no run can start.
    """

    state: str
    name: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.state:<9}{self.name:<15}{self.text}"
        return f"{line}\n  -> {self.fix}" if self.fix else line


class Report:
    """Holds the findings of this process, and prints each as it comes unless `is_silent`."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.is_silent = False

    def add(self, findings: Iterable[Finding]) -> None:
        """Add findings, each printed as it is made."""
        for finding in findings:
            self.findings.append(finding)
            if not self.is_silent:
                print(finding, flush=True)

    def conclude(self) -> int:
        """Print whether a run can start and return the exit code: 0 if it can, else 1."""
        names = list(dict.fromkeys(finding.name for finding in self.findings if finding.state == "missing"))
        print(f"a run cannot start here; missing: {', '.join(names)}" if names else "a run can start here", flush=True)
        return 1 if names else 0


def host() -> str:
    """Return SLURM's name of the node, or the machine's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def few(items: Sequence[Any], what: str = "") -> str:
    """Return the first of some items as words: `rank 3`, `ranks 0, 1`, `n2, n3, n4, n5 and 12 more`."""
    listed = ", ".join(map(str, items[:4])) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
    return f"{what}{'s' if len(items) > 1 else ''} {listed}" if what else listed
