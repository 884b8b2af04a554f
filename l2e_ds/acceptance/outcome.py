"""What a part of an acceptance found, and the scale at which a machine is asked.

Shapes: M tokens of a micro-batch, N neurons of a layer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.benchmark import Timer

Results = dict[str, float]


@dataclass
class Outcome:
    """What one part found. passed: None where it only measures; results: by name, with the unit in the name."""

    passed: bool | None
    results: Results = field(default_factory=dict)
    reason: str = ""
    part: str = ""
    seconds: float = 0.0

    def line(self) -> str:
        """Return the part as one line of the table."""
        word = {True: "pass", False: "FAIL", None: "-"}[self.passed]
        values = self.results.items()
        shown = ", ".join(
            f"{name} {value:.3g}" if abs(value) < 1000 else f"{name} {value:,.0f}" for name, value in values
        )
        return f"{word:<5} {self.part:<11} {self.seconds:5.0f} s  {'; '.join(filter(None, [self.reason, shown]))}"


class Scale:
    """How large the parts are: those of a GPU, or, on a CPU, as small as shows that they work."""

    def __init__(self) -> None:
        self.on_gpu = on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.tokens = 32_768 if on_gpu else 512  # of a micro-batch
        # neurons of a layer, by the model that has them
        self.widths = {"70m": 2048, "410m": 4096, "1b": 8192, "2.8b": 10_240} if on_gpu else {"14m": 512}
        self.models = ("70m", "410m", "1.4b") if on_gpu else ("14m",)  # whose steps are timed
        self.large = (131_072, 20_480) if on_gpu else None  # [M, N] of more elements than an int32 counts
        self.precisions = ["fp32", "bf16"]  # that the device computes in; of a CPU those that every one has
        if on_gpu:
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            self.precisions = ["fp32", "bf16", "fp16"] if has_bf16 else ["fp32", "fp16"]

    def seconds(self, action: Callable[[], Any]) -> float:
        """Return the seconds of one call: the median over five rounds of 20 calls (on a CPU 2), between which the
        device is not waited for; of small layers Python's launching is measured."""
        timer = Timer("action()", globals={"action": action}, num_threads=torch.get_num_threads())
        return statistics.median(timer.timeit(20 if self.on_gpu else 2).mean for _ in range(5))
