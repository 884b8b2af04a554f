"""What a part of an acceptance found, and the scale at which a machine is asked."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Results = dict[str, float | str]


@dataclass
class Outcome:
    """What one part found. passed: None where it only measures; results: by name, with the unit in the name."""

    part: str
    passed: bool | None
    results: Results = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0

    def line(self) -> str:
        """Return the part as one line of the table."""
        word = {True: "pass", False: "FAIL", None: "-"}[self.passed]
        shown = ", ".join(f"{name} {_shown(value)}" for name, value in self.results.items())
        return f"{word:<5} {self.part:<11} {self.seconds:5.0f} s  {'; '.join(filter(None, [self.reason, shown]))}"


@dataclass(frozen=True)
class Scale:
    """How large the parts are: those of a GPU, or, on a CPU, as small as shows that they work.

    tokens: of a micro-batch; widths: neurons of a layer by the model that has them; models: whose steps are timed;
    large: [M, N] of more elements than an int32 counts, or None.
    """

    device: torch.device
    tokens: int
    widths: dict[str, int]
    models: tuple[str, ...]
    large: tuple[int, int] | None

    @classmethod
    def of_this_machine(cls) -> Scale:
        if torch.cuda.is_available():
            widths = {"70m": 2048, "410m": 4096, "1b": 8192, "2.8b": 10_240}
            return cls(torch.device("cuda"), 32_768, widths, ("70m", "410m", "1.4b"), (131_072, 20_480))
        return cls(torch.device("cpu"), 512, {"14m": 512}, ("14m",), None)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precisions(self) -> list[str]:
        """The precisions that the device computes in; of a CPU those that every one has."""
        if not self.on_gpu:
            return ["fp32", "bf16"]
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ["fp32", *(["bf16"] if has_bf16 else []), "fp16"]

    def seconds(self, action: Callable[[], Any], repeats: int = 20, rounds: int = 5) -> float:
        """Return the seconds of one call: the median over rounds of many calls between two events (or clock readings).

        The device is not waited for between the calls; where Python launches more slowly than the device computes, as
        for small layers, it is the launching that is measured.
        """
        repeats = repeats if self.on_gpu else 2
        action()
        found = []
        for _ in range(rounds):
            if self.on_gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(repeats):
                    action()
                end.record()
                end.synchronize()
                found.append(begin.elapsed_time(end) / 1e3 / repeats)
            else:
                started = time.perf_counter()
                for _ in range(repeats):
                    action()
                found.append((time.perf_counter() - started) / repeats)
        return statistics.median(found)


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
